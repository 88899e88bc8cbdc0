#!/usr/bin/env bash
# make demo: starts the server on the bundled model, lets four tenants with different adapters ask at the
# same time, shows their answers as they stream, prints a table, stops the server. Exit 0 when every
# answer came.
set -eu
build=${1:-build}
here=$(cd "$(dirname "$0")/.." && pwd)
polder=$build/runtime/cli/polder
work=$(mktemp -d)
server=
finish() {
    if [ -n "$server" ]; then kill -TERM "$server" 2> /dev/null || true; wait "$server" 2> /dev/null || true; fi
    rm -rf "$work"
}
trap finish EXIT
python=/usr/bin/python3 # Debian's, which sees python3-msgpack
"$python" "$here/tools/demo.py" --prepare "$here/models/demo" "$work" "$polder"
modules=()
while read -r name directory; do modules+=(--lora-modules "$name=$directory"); done < "$work/modules"
echo "starting: polder serve --model models/demo --tenants (four tenants) ..."
"$polder" serve --model "$here/models/demo" --state-dir "$work/state" --tenants "$work/tenants.yaml" \
    --port 0 --uds "$work/socket" --log-level "${POLDER_DEMO_LOG:-warn}" "${modules[@]}" > "$work/ready" &
server=$!
for _ in $(seq 1 600); do
    grep -q 'ready on' "$work/ready" 2> /dev/null && break
    kill -0 "$server" 2> /dev/null || { echo "the server did not start" >&2; exit 1; }
    sleep 0.1
done
"$python" "$here/tools/demo.py" --ask "$here/models/demo" "$work"
kill -TERM "$server"
code=0
wait "$server" || code=$?
server=
[ $code -eq 0 ] || { echo "the server ended with exit $code" >&2; exit 1; }
echo "the server drained and ended with exit 0"
