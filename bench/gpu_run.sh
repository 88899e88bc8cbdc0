#!/usr/bin/env bash
# Builds, tests and benches on a machine with a GPU, in one go:
#
#   bench/gpu_run.sh                 make cuda, then every part below
#   bench/gpu_run.sh PART...         only these: kernels engine sanitizer step step-adapters adapters
#                                    fixed-split register kernels-bench copies
#   bench/gpu_run.sh --pack FILE     build here, pack programs and libraries for a machine where
#                                    the Debian packages cannot be installed
#   bench/gpu_run.sh --from FILE [PART...]   there: unpack and run, without building
#
# Prints one line per test program; logs and results go to $OUT (default: build-cuda/gpu_run).
set -u
cd "$(dirname "$0")/.."
bin=$PWD/build-cuda
pack=""
case "${1:-}" in
    --pack)
        make cuda || exit 1
        stage=$(mktemp -d)
        mkdir -p "$stage/bin" "$stage/lib"
        find build-cuda -type f -perm -100 \( -name 'test_kernels_*' -o -name 'test_goldens*' -o -name 'test_engine*' \
            -o -name 'test_cuda*' -o -name test_backends -o -name 'bench_*' -o -name polder \) ! -name '*_cpu' \
            ! -name test_kernels_stream -exec cp {} "$stage/bin/" \;
        strip "$stage"/bin/* 2> /dev/null
        for p in "$stage"/bin/*; do ldd "$p" 2> /dev/null; done | awk '$3 ~ /^\// { print $3 }' | sort -u |
            grep -Ev '/(libc|libm|libdl|libpthread|librt|libcublas|libcublasLt|libcusparse|libnccl|libnvJitLink|libstdc\+\+|libgcc_s|libgomp)\.so' |
            while read -r so; do cp -L "$so" "$stage/lib/"; done
        cp -R bench/workloads bench/fixed_split.sh "$stage/"
        git rev-parse HEAD > "$stage/commit"
        XZ_OPT="-9 -T2" tar -C "$stage" -cJf "$2" . && ls -l "$2"
        rm -rf "$stage"
        exit 0 ;;
    --from)
        pack=$(mktemp -d)
        tar -C "$pack" -xJf "$2" || exit 1
        bin=$pack/bin
        shift 2
        nvidia=$(python3 -c 'import nvidia, os; print(os.path.dirname(nvidia.__file__ or list(nvidia.__path__)[0]))' 2> /dev/null)
        LD_LIBRARY_PATH=$pack/lib:/usr/local/cuda/lib64:$(ls -d "$nvidia"/*/lib 2> /dev/null | tr '\n' ':')
        export LD_LIBRARY_PATH ;;
    *) make cuda || exit 1 ;;
esac
OUT=${OUT:-$PWD/build-cuda/gpu_run}
mkdir -p "$OUT"
commit=$(cat "$pack/commit" 2> /dev/null || git rev-parse HEAD)
device=$(nvidia-smi --query-gpu=name --format=csv,noheader 2> /dev/null | head -n 1)
echo "commit $commit on ${device:-no GPU}"
ran=0 failed=0 skipped=0
find_program() { [ -x "$bin/$1" ] && echo "$bin/$1" || find "$bin" -type f -name "$1" -perm -100 | head -n 1; }

# one NAME [ENV...] -- PROGRAM [ARG...]
one() {
    local name=$1 start=$SECONDS
    shift
    env POLDER_TEST_DEVICE=cuda:0 POLDER_TEST_GPU_ONLY=1 timeout "${LIMIT:-150}" "$@" > "$OUT/$name.log" 2>&1
    local code=$?
    ran=$((ran + 1))
    if [ $code -eq 77 ] || grep -q '^SKIPPED' "$OUT/$name.log"; then
        skipped=$((skipped + 1)); echo "skip $name: $(grep -m1 SKIPPED "$OUT/$name.log")"
    elif [ $code -ne 0 ]; then
        failed=$((failed + 1)); echo "FAIL $name ($code, $((SECONDS - start)) s)"; grep -vE '^\[ *(RUN|OK)' "$OUT/$name.log" | tail -n "${TAIL:-12}"
    else
        echo "ok   $name ($((SECONDS - start)) s)"
    fi
}

# ceilings: measures the read and the matmul ceiling of this run into `read` and `matmul`.
ceilings() {
    local line
    line=$("$(find_program bench_kernels_cuda)" none) || { echo "FAIL ceilings"; failed=$((failed + 1)); return 1; }
    read=$(sed -n 's/.*"read_gb_per_s":\([0-9.]*\).*/\1/p' <<< "$line")
    matmul=$(sed -n 's/.*"matmul_tflop_per_s":\([0-9.]*\).*/\1/p' <<< "$line")
}

# show FILE: the numbers of its lines that matter, a line each.
show() {
    grep -o '"bench":"step_[a-z]*"\|"model":"[^"]*"\|"median_ms":[0-9.]*\|"batch":[0-9]*\|"tflops":[0-9.]*\|"roofline[a-z_]*":[0-9.]*\|"captures":[0-9]*\|"submit_share":[0-9.]*\|"gate_misses":[0-9]*\|"distinct[a-z_]*":[0-9.]*\|"[a-z]*_s":[0-9.]*\|"ranks":[^]]*]\|"targets":"[a-z]*"\|"\(base\|adapter\|added\|floor\|allowed\)_ms":[-0-9.]*\|"[a-z]*_gate_misses":[0-9]*\|"[a-z]*_experts_per_layer":[0-9.]*\|"rows_[a-z_]*":[0-9]*\|"reached":[a-z]*' "$1" |
        tr '\n' ' ' | sed 's/"bench"/\n&/g'
    echo
}

# step: whole steps of three shapes, with the ceilings of this run.
step() {
    local read matmul start=$SECONDS
    ceilings || return
    for model in ${MODELS:-llama-3-8b olmoe-1b-7b qwen3-30b-a3b}; do
        timeout 200 "$(find_program bench_step)" --model "synth:$model" --device cuda:0 --batch "${BATCHES:-1,8,32,64}" \
            --steps 30 --context 1024 --prefill "${PREFILL:-2048}" --read-ceiling "$read" --matmul-ceiling "$matmul" >> "$OUT/step.jsonl" 2> "$OUT/step_$model.log" ||
            { echo "FAIL bench_step $model: $(tail -n 3 "$OUT/step_$model.log")"; failed=$((failed + 1)); }
        echo "     bench_step $model ($((SECONDS - start)) s)"
    done
    show "$OUT/step.jsonl"
}

# step_adapters_of MODEL ADAPTERS RANKS TARGETS
step_adapters_of() {
    local start=$SECONDS log="$OUT/step_adapters_$1_$3.log"
    timeout "${LIMIT:-300}" "$(find_program bench_step)" --model "synth:$1" --device cuda:0 --adapters "$2" --rank "$3" --targets "$4" \
        --batch "${ADAPTER_BATCHES:-64}" --steps 30 --context 1024 --read-ceiling "$read" >> "$OUT/step_adapters.jsonl" 2> "$log" ||
        { echo "FAIL bench_step $*: $(tail -n 3 "$log")"; failed=$((failed + 1)); }
    echo "     bench_step $* ($((SECONDS - start)) s)"
}

# step-adapters: what resident LoRA adapters add to a decode step, one a row.
step_adapters() {
    local read matmul
    ceilings || return
    step_adapters_of llama-3-8b 64 16 all
    step_adapters_of llama-3-8b 64 8,16,32,64 all
    step_adapters_of olmoe-1b-7b 64 8 attention
    show "$OUT/step_adapters.jsonl"
}

# adapters_of LABEL ARG...: bench_adapters, one JSON line a case.
adapters_of() {
    local start=$SECONDS log="$OUT/adapters_$1.log" label=$1
    shift
    timeout "${LIMIT:-200}" "$(find_program bench_adapters)" --device "${DEVICE:-cuda:0}" "$@" > "$OUT/adapters_$label.jsonl" 2> "$log" ||
        { echo "FAIL bench_adapters $label: $(tail -n 3 "$log")"; failed=$((failed + 1)); }
    echo "     bench_adapters $label ($((SECONDS - start)) s)"
    show_adapters "$OUT/adapters_$label.jsonl"
}

# show_adapters FILE: of each case the numbers that the targets are about.
show_adapters() {
    grep '"bench":"adapters"' "$1" | grep -o '"case":"[^"]*"\|"\(live\|registered\|finished\|failed\|requests_per_s\|output_tokens_per_s\|ttft_p50_ms\|ttft_p99_ms\|tpot_p50_ms\|adapter_wait_p50_ms\|adapter_hit_rate\|adapter_loads\|adapters_given_back\|part_pages\|part_misses\|parts_given_back\|gate_misses\|adapter_bytes\|expert_bytes\|file_read_bytes\|h2d_bytes\|expert_misses\|requests_per_s_over_first\|ttft_p50_over_first\|kv_drops\|swaps_out\|running_mean\|captures\)":[-0-9.]*' |
        tr '\n' ' ' | sed 's/"case"/\n     &/g'
    echo
}

# adapters: a short version of the table of many adapters.
#   1 and 2,000 registered rank-8 adapters on q, k, v, o under one load; expert adapters of rank 16
#   and 32, as many live as fit and twice as many; 300 of rank 32 for 40 tenants.
# Sizes can be made small for a try elsewhere: DENSE, MOE, LARGE (models), SETS (workload keys),
# POOL (options of the pool of LARGE).
adapters() {
    local w=bench/workloads sets=${SETS:+,$SETS}
    [ -d "$w" ] || w=$pack/workloads
    for model in ${DENSE:-synth:llama-3-8b} ${MOE:-synth:olmoe-1b-7b}; do
        # shellcheck disable=SC2086
        adapters_of "count_${model#*:}" --model "$model" ${SMALL_POOL:---pool-share 0.8} --rank 8 --targets attention --concurrency 64 --warm 64 \
            --workload "$w/slora.txt,name=1-registered,adapters=1,requests=256,output=8..128$sets" \
            --workload "$w/slora.txt,name=2000-registered,adapters=2000,requests=256,output=8..128$sets"
    done
    # shellcheck disable=SC2086
    adapters_of "experts" --model "${LARGE:-synth:qwen3-30b-a3b}" ${POOL:---pool-share 0.93 --host-mib 16384} --sequences 16 --targets all --warm 16 \
        --workload "$w/uniform.txt,name=rank16-fit,rank=16,adapters=fit,requests=20$sets" \
        --workload "$w/uniform.txt,name=rank16-2fit,rank=16,adapters=2fit,requests=20$sets" \
        --workload "$w/uniform.txt,name=rank32-fit,first=1,rank=32,adapters=fit,requests=20$sets" \
        --workload "$w/uniform.txt,name=rank32-2fit,rank=32,adapters=2fit,requests=20$sets" \
        --workload "$w/tenants.txt,name=300-of-40-tenants,first=1,rank=32,requests=24,warm=0$sets"
}

# fixed-split: one pool against splits of it (minutes; not among the parts of a plain run).
fixed_split() {
    local w=bench/workloads sets=${SETS:+,$SETS} start=$SECONDS
    [ -d "$w" ] || w=$pack/workloads
    for load in shift one; do
        # shellcheck disable=SC2086
        "${pack:-bench}/fixed_split.sh" "$(find_program bench_adapters)" "$w/$load.txt$sets" "${GRID:-2 5 10 20 35 50 65 80 90}" --device "${DEVICE:-cuda:0}" \
            --model "${DENSE:-synth:llama-3-8b}" ${SMALL_POOL:---pool-mib 16384} --rank 16 --targets all --concurrency 64 > "$OUT/fixed_split_$load.jsonl" 2> "$OUT/fixed_split_$load.log" ||
            { echo "FAIL fixed split $load: $(tail -n 3 "$OUT/fixed_split_$load.log")"; failed=$((failed + 1)); }
        echo "     fixed split $load ($((SECONDS - start)) s)"
        tail -n 1 "$OUT/fixed_split_$load.jsonl"
    done
}

parts=${*:-kernels engine sanitizer step step-adapters adapters kernels-bench copies}
for part in $parts; do
    case $part in
        kernels) for t in dense attention lora moe sample; do one "kernels_$t" "$(find_program test_kernels_$t)"; done ;;
        test-*) one "kernels_${part#test-}" "$(find_program "test_kernels_${part#test-}")" ;;
        engine) for t in test_cuda test_cuda_libraries test_backends test_goldens test_goldens_demo test_engine test_engine_demo; do one "$t" "$(find_program $t)"; done ;;
        sanitizer)
            for tool in memcheck racecheck initcheck synccheck; do
                for t in dense attention lora moe sample; do
                    LIMIT=${SANITIZER_LIMIT:-120} one "$tool-$t" compute-sanitizer --tool $tool --error-exitcode 9 "$(find_program test_kernels_$t)"
                done
            done ;;
        step) step ;;
        step-adapters) step_adapters ;;
        adapters) adapters ;;
        fixed-split) fixed_split ;;
        register) one bench_register "$(find_program bench_register)" --device "${DEVICE:-cuda:0}" --model "${MOE:-synth:olmoe-1b-7b}" --mib "${MIB:-100}" && tail -n 1 "$OUT/bench_register.log" ;;
        kernels-bench) LIMIT=300 one bench_kernels_cuda "$(find_program bench_kernels_cuda)" ;;
        copies) one bench_copies "$(find_program bench_copies)" ;;
        *) one "$part" "$(find_program "$part")" ;;
    esac
done
echo "{\"commit\":\"$commit\",\"device\":\"$device\",\"tests_run\":$ran,\"failed\":$failed,\"skipped\":$skipped}" | tee "$OUT/summary.json"
[ $failed -eq 0 ]
