#!/usr/bin/env bash
# 40 adapters on the demo model and the CPU backend, against the base model and the true LoRA work.
#
#   bench/cpu_adapters.sh BIN [ARG...]
#   bench/cpu_adapters.sh build/bench/bench_adapters --rank 8,16 --targets attention
#
# The same requests (bench/workloads/forty.txt, closed loop) without adapters, with one and with 40,
# in turn, ROUNDS times, all adapters resident; of each the fastest round counts, since other work on
# the machine only ever adds time. Two readings of "true LoRA work", both printed:
#   over_base_and_work   seconds of 40 over (seconds of the base x (1 + multiplications of LoRA over
#                        those of the base)): LoRA at the speed at which the base multiplies
#   over_one_adapter     seconds of 40 over seconds of one adapter of the same rank: the same
#                        arithmetic on the same rows, without the changing of adapters
# Both also in processor seconds (_cpu), which other programs on the machine disturb less.
#
# The first counts no bytes: rows of the base share weights, while each row of another adapter reads
# slices of its own. So a second line, beside it and not instead, compares decode steps of 16
# rows, each with another of the 40 adapters (bench_step, beside BIN), with the base and the reading:
#   over_base_and_read   step with adapters over (step without + bytes of the slices at the rate at
#                        which all threads can read such slices and do nothing else)
# That rate is measured right before (bench_lora_cpu, beside BIN, too).
set -u -o pipefail
[ $# -ge 1 ] || { sed -n '2,26s/^# \{0,1\}//p' "$0"; exit 2; }
bin=$1
shift
cd "$(dirname "$0")/.." || exit 1
lines=$(mktemp)
trap 'rm -f "$lines"' EXIT
spec=bench/workloads/forty.txt${SET:+,$SET}
cases=()
for _ in $(seq "${ROUNDS:-5}"); do
    for n in 0 1 40; do cases+=(--workload "$spec,name=of-$n,adapters=$n"); done
done
"$bin" --model models/demo --device cpu --concurrency "${CONCURRENCY:-16}" --warm 120 --sequences 16 --pool-mib 256 "$@" "${cases[@]}" | tee "$lines" || exit 1
sed -n 's/.*"case":"of-\([0-9]*\)".*"commit":"\([^"]*\)".*"ranks":\(\[[^]]*\]\).*"targets":"\([a-z]*\)".*"seconds":\([0-9.]*\).*"cpu_s":\([0-9.]*\).*"lora_work_share":\([0-9.]*\).*/\1 \2 \3 \4 \5 \6 \7/p' "$lines" |
    awk '
    { commit = $2; ranks = $3; targets = $4; rounds[$1]++; if (!best[$1] || $5 < best[$1]) best[$1] = $5; if (!cpu[$1] || $6 < cpu[$1]) cpu[$1] = $6; share[$1] = $7 }
    END {
        allowed = best[0] * (1 + share[40])
        printf "{\"bench\":\"cpu_adapters\",\"commit\":\"%s\",\"ranks\":%s,\"targets\":\"%s\",\"rounds\":%d,", commit, ranks, targets, rounds[40]
        printf "\"base_s\":%.3f,\"one_adapter_s\":%.3f,\"forty_adapters_s\":%.3f,\"lora_work_share\":%.4f,", best[0], best[1], best[40], share[40]
        printf "\"base_cpu_s\":%.3f,\"one_adapter_cpu_s\":%.3f,\"forty_adapters_cpu_s\":%.3f,", cpu[0], cpu[1], cpu[40]
        printf "\"over_base_and_work_cpu\":%.4f,\"over_one_adapter_cpu\":%.4f,", cpu[40] / (cpu[0] * (1 + share[40])), cpu[40] / cpu[1]
        printf "\"over_base_and_work\":%.4f,\"over_one_adapter\":%.4f,\"allowed\":1.10,\"reached\":%s}\n", best[40] / allowed, best[40] / best[1], (best[40] <= 1.10 * allowed ? "true" : "false")
    }'
folder=$(dirname "$bin")
[ -x "$folder/bench_step" ] && [ -x "$folder/bench_lora_cpu" ] || exit 0
rate=$("$folder/bench_lora_cpu" --shape 0 --only experts | sed -n 's/.*"slices_gbytes_per_s":\([0-9.]*\).*/\1/p')
"$folder/bench_step" --model models/demo --device cpu --batch 16 --context 64 --steps 200 --adapters 40 --pool-mib 400 --read-ceiling "$rate" "$@" | tee "$lines"
sed -n 's/.*"bench":"step_adapters".*"commit":"\([^"]*\)".*"ranks":\(\[[^]]*\]\).*"targets":"\([a-z]*\)".*"base_ms":\([0-9.]*\).*"adapter_ms":\([0-9.]*\).*"adapter_bytes":\([0-9]*\).*"floor_ms":\([0-9.]*\).*/\1 \2 \3 \4 \5 \6 \7/p' "$lines" |
    awk -v rate="$rate" '{
        printf "{\"bench\":\"cpu_adapters_decode\",\"commit\":\"%s\",\"ranks\":%s,\"targets\":\"%s\",\"base_ms\":%s,\"adapter_ms\":%s,", $1, $2, $3, $4, $5
        printf "\"adapter_bytes\":%s,\"slices_gbytes_per_s\":%s,\"read_ms\":%s,\"over_base_and_read\":%.4f,\"allowed\":1.10,\"reached\":%s}\n", $6, rate, $7, $5 / ($4 + $7), ($5 <= 1.10 * ($4 + $7) ? "true" : "false")
    }'
