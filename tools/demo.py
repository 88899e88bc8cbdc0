# SPDX-License-Identifier: Apache-2.0
"""The asking half of `make demo` (tools/demo.sh starts the server).

--prepare MODEL WORK POLDER   writes WORK/tenants.yaml (fresh keys), WORK/keys.json and WORK/modules
--ask MODEL WORK              four tenants ask at once over WORK/socket; streams and a table go to the terminal
"""
import json
import pathlib
import secrets
import subprocess
import sys
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "clients/python"))
CLASSES = ["interactive", "standard", "standard", "batch"]
COLOURS = ["\033[36m", "\033[33m", "\033[32m", "\033[35m"]


def read_demo(model):
    return json.loads((model / "demo.json").read_text())["tenants"]


def prepare(model, work, polder):
    keys, lines = {}, ["tenants:"]
    for number, tenant in enumerate(read_demo(model)):
        key = secrets.token_urlsafe(24)
        hashed = subprocess.run([polder, "hash-key"], input=key.encode(), stdout=subprocess.PIPE, check=True)
        keys[tenant["name"]] = key
        lines += ["  - name: %s" % tenant["name"], "    keys_blake2b: [\"%s\"]" % hashed.stdout.decode().strip(),
                  "    allowed_adapters: [\"%s\"]" % tenant["adapter"], "    priority_class: %s" % CLASSES[number % 4],
                  "    rpm_limit: 600", "    manage_adapters: %s" % ("true" if number == 0 else "false")]
    (work / "tenants.yaml").write_text("\n".join(lines) + "\n")
    (work / "keys.json").write_text(json.dumps(keys))
    adapters = sorted(path for path in (model / "adapters").iterdir() if path.is_dir())
    (work / "modules").write_text("".join("%s %s\n" % (path.name, path) for path in adapters))


class Board:
    """Several answers streaming to one terminal: whole lines, each marked with its tenant."""

    def __init__(self, colours):
        self.lock, self.colours, self.parts = threading.Lock(), colours, {}

    def add(self, number, name, text):
        with self.lock:
            lines = (self.parts.get(number, "") + text).split("\n")
            self.parts[number] = lines.pop()
            for line in lines:
                self.show(number, name, line)

    def end(self, number, name):
        with self.lock:
            self.show(number, name, self.parts.pop(number, ""))

    def show(self, number, name, line):
        mark = "%-14s| " % name
        if self.colours:
            mark = COLOURS[number % 4] + mark + "\033[0m"
        print(mark + line, flush=True)


def ask(number, tenant, key, address, board, start, rows):
    from polder import Client
    row = {"requests": 0, "tokens": 0, "ttft": [], "seconds": 0.0, "error": None}
    rows[number] = row
    try:
        with Client(address, key=key) as client:
            start.wait()
            for prompt in tenant["prompts"]:
                begin, first = time.monotonic(), None
                board.add(number, tenant["name"], prompt)
                stream = client.generate(prompt, model=tenant["adapter"], max_tokens=tenant.get("max_tokens", 96),
                                         temperature=tenant.get("temperature", 0.6), top_p=0.95, seed=7 + number)
                for token in stream:
                    first = first or time.monotonic() - begin
                    row["tokens"] += token.token >= 0
                    board.add(number, tenant["name"], token.text)
                board.end(number, tenant["name"])
                row["requests"] += 1
                row["ttft"].append(first or 0.0)
                row["seconds"] += time.monotonic() - begin
    except Exception as error:  # shown in the table, and the demo fails
        row["error"] = "%s" % error


def print_table(tenants, rows):
    print("\n%-14s %-18s %9s %7s %14s %9s" % ("tenant", "adapter", "requests", "tokens", "first token ms", "tokens/s"))
    for number, tenant in enumerate(tenants):
        row = rows[number]
        ttft = 1e3 * sorted(row["ttft"])[len(row["ttft"]) // 2] if row["ttft"] else float("nan")
        speed = row["tokens"] / row["seconds"] if row["seconds"] else 0.0
        print("%-14s %-18s %9d %7d %14.1f %9.1f%s" % (tenant["name"], tenant["adapter"], row["requests"], row["tokens"],
                                                      ttft, speed, "  " + row["error"] if row["error"] else ""))


def print_pool(stats):
    pool = stats["engine"]["pool"] if "engine" in stats and "pool" in stats["engine"] else stats["pool"]
    print("\npool: %d pages of %d KiB: %d KV, %d adapter, %d expert, %d free" % (
        pool["pages"], pool["page_bytes"] // 1024, pool["kv"], pool["adapter"], pool["expert"], pool["free"]))


def run(model, work):
    from polder import Client
    tenants, keys = read_demo(model), json.loads((work / "keys.json").read_text())
    address, board = "unix:%s/socket" % work, Board(sys.stdout.isatty())
    start, rows = threading.Event(), {}
    threads = [threading.Thread(target=ask, args=(number, tenant, keys[tenant["name"]], address, board, start, rows))
               for number, tenant in enumerate(tenants)]
    for thread in threads:
        thread.start()
    start.set()
    for thread in threads:
        thread.join()
    print_table(tenants, rows)
    with Client(address, key=keys[tenants[0]["name"]]) as client:
        print_pool(client.stats())
    return 0 if all(row["error"] is None and row["tokens"] for row in rows.values()) else 1


if __name__ == "__main__":
    if sys.argv[1] == "--prepare":
        prepare(pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]), sys.argv[4])
    else:
        sys.exit(run(pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])))
