#!/usr/bin/env bash
# One pool against the best fixed split of the same bytes.
#
#   bench/fixed_split.sh BIN WORKLOAD[,key=value...] "GRID" ARG...
#   bench/fixed_split.sh build-cuda/bench/bench_adapters bench/workloads/shift.txt "2 5 10 20 35 50 65 80 90" \
#       --model synth:llama-3-8b --device cuda:0 --pool-mib 20480 --rank 16 --targets all --concurrency 64
#
# GRID is the search, stated before the run: percentages of what experts leave of the pool that
# adapters may have; KV gets the rest. One process runs all: a run that does not count, the one
# pool, each split, the one pool again (the worse of the two counts), so that all have the same
# device and model and a warm start. Prints every line
# of bench_adapters, then one of its own: requests/s of the one pool and of each split, the best
# split and the ratio. A split that could not serve every request is named and cannot be the best.
set -u -o pipefail
[ $# -ge 4 ] || { sed -n '2,14s/^# \{0,1\}//p' "$0"; exit 2; }
bin=$1 workload=$2 grid=$3
shift 3
lines=$(mktemp)
trap 'rm -f "$lines"' EXIT

cases=(--workload "$workload,name=warm-up" --workload "$workload,name=one-pool")
for share in $grid; do
    cases+=(--workload "$workload,name=split-$share,adapter_share=$share")
done
cases+=(--workload "$workload,name=one-pool-again")
"$bin" "$@" "${cases[@]}" | tee "$lines"

# of KEY: of every case "name value", a line each.
of() { sed -n "s/.*\"case\":\"\([^\"]*\)\".*\"$1\":\([0-9.]*\).*/\1 \2/p" "$lines"; }
join -j 1 <(of requests_per_s | sort) <(of failed | sort) |
    awk -v commit="$(sed -n 's/.*"commit":"\([^"]*\)".*/\1/p' "$lines" | head -n 1)" -v workload="$workload" -v grid="$grid" '
    /^one-pool/ { runs++; bad += $3; if (!one || $2 < one) one = $2 }
    sub(/^split-/, "") {
        all = all (all ? "," : "") "\"" $1 "\":" $2
        tried++
        if ($3) out = out (out ? " " : "") $1
        else if ($2 > best) { best = $2; at = $1 }
    }
    END {
        complete = runs == 2 && !bad && best > 0 && tried == split(grid, words, " ")
        printf "{\"bench\":\"fixed_split\",\"commit\":\"%s\",\"workload\":\"%s\",\"grid_percent\":\"%s\",", commit, workload, grid
        printf "\"one_pool_requests_per_s\":%.4f,\"split_requests_per_s\":{%s},\"splits_left_out\":\"%s\",", one, all, out
        printf "\"best_split_percent\":%s,\"best_split_requests_per_s\":%.4f,", (best > 0 ? at : "null"), best
        printf "\"one_pool_over_best_split\":%.4f,\"complete\":%s}\n", (best > 0 ? one / best : 0), (complete ? "true" : "false")
        exit !complete
    }'
