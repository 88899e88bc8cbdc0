#!/usr/bin/env bash
# Runs every fuzzer for FUZZ_SECONDS (default 20) over a copy of its seed corpus; prints executions and
# coverage. With PLANT=1 the planted bugs are compiled in and every fuzzer must find its own.
set -eu
build=${1:-build-fuzz}
seconds=${FUZZ_SECONDS:-20}
flags="-DPOLDER_FUZZ=ON -DCMAKE_C_COMPILER=clang -DPOLDER_TESTS=ON"
[ "${PLANT:-0}" = 1 ] && flags="$flags -DCMAKE_C_FLAGS=-DPOLDER_PLANT_BUG"
cmake -S . -B "$build" $flags > "$build.log" 2>&1 || { cat "$build.log"; exit 1; }
targets=$(ls tests/fuzz_*.c | grep -v fuzz_main | xargs -n1 basename | sed 's/\.c$//')
cmake --build "$build" --parallel "$(nproc)" --target $targets > "$build.log" 2>&1 || { tail -40 "$build.log"; exit 1; }
failed=0
for target in $targets; do
    work=$(mktemp -d)
    cp -r "tests/corpus/$target/." "$work/" 2>/dev/null || true
    log=$(mktemp)
    status=0
    (cd "$work" && "$OLDPWD/$build/tests/$target" -max_total_time="$seconds" -timeout=20 -rss_limit_mb=3000 \
        -print_final_stats=1 -max_len=16384 "$work" > "$log" 2>&1) || status=$?
    executions=$(grep -oE 'number_of_executed_units: *[0-9]+' "$log" | grep -oE '[0-9]+$' || echo '?')
    coverage=$(grep -oE 'cov: [0-9]+ ft: [0-9]+' "$log" | tail -1)
    if [ "${PLANT:-0}" = 1 ]; then
        if [ $status -ne 0 ]; then echo "$target: planted bug found"; else echo "$target: planted bug NOT found in ${seconds}s"; failed=1; fi
    elif [ $status -ne 0 ]; then
        echo "$target: FAILED"; tail -40 "$log"; failed=1
    else
        echo "$target: $executions executions in ${seconds}s, $coverage"
    fi
    rm -rf "$work" "$log"
done
exit $failed
