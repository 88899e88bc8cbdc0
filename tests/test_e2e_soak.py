# SPDX-License-Identifier: Apache-2.0
"""Adapters come and go under traffic: POLDER_SOAK cycles (300; by hand 10000) of registering, loading, generating, new
versions, unloading and removing, one in a hundred files broken on purpose. No wrong token for anyone, no stall over a second for the others, no
memory, descriptor, page or file left behind."""
import json
import os
import random
import shutil
import struct
import sys
import tempfile
import threading
import time

from e2e_lib import ADAPTERS, RpcError, Server, key_hash, main, until

TENANTS = "tenants:\n" + "".join("""  - name: %s
    keys_blake2b: [%s]
    allowed_adapters: ["*"]
    manage_adapters: true
    adapter_rpm_limit: 0
    max_parallel_requests: 200
    max_queue: 200
""" % (name, key_hash("key-" + name)) for name in ("churn", "steady"))
CYCLES = int(os.environ.get("POLDER_SOAK", "300"))
NAMES = sorted(os.listdir(ADAPTERS))
PERMANENT = {"kjv": "kjv-all-r4", "fused": "elisp-fused-r4"}
PROMPTS = ["In the beginning", "static int "]
TOKENS, GROWTH_KIB, STALL = 10, 6144, 1.0


# ---- broken files: each takes a directory and spoils it ----

def safetensors_of(directory):
    return os.path.join(directory, "adapter_model.safetensors")


def rewrite(path, change):
    with open(path, "rb") as file:
        data = bytearray(file.read())
    data = change(data)
    os.remove(path)  # it may be a hard link
    with open(path, "wb") as file:
        file.write(data)


def rewrite_config(directory, **fields):
    path = os.path.join(directory, "adapter_config.json")
    rewrite(path, lambda data: json.dumps({**json.loads(data), **fields}).encode())


def with_nan(data):
    data[-400:] = struct.pack("<H", 0x7fc0) * 200  # NaN in bf16, and in f32
    return data


BREAK = {
    "half": lambda d: rewrite(safetensors_of(d), lambda data: data[:len(data) // 2]),
    "empty": lambda d: rewrite(safetensors_of(d), lambda data: b""),
    "header": lambda d: rewrite(safetensors_of(d), lambda data: struct.pack("<Q", 1 << 60) + data[8:]),
    "noise": lambda d: rewrite(safetensors_of(d), lambda data: data[:8] + os.urandom(200) + data[208:]),
    "nan": lambda d: rewrite(safetensors_of(d), with_nan),
    "gone": lambda d: os.remove(safetensors_of(d)),
    "pickle": lambda d: os.rename(safetensors_of(d), os.path.join(d, "adapter_model.bin")),
    "config": lambda d: rewrite(os.path.join(d, "adapter_config.json"), lambda data: data[:-20]),
    "rank": lambda d: rewrite_config(d, r=3),
    "dora": lambda d: rewrite_config(d, use_dora=True),
}


def sources(folder):
    """Copies below the operator's directory: the good ones, and each kind of broken one."""
    for name in NAMES:
        shutil.copytree(os.path.join(ADAPTERS, name), os.path.join(folder, name))
    for kind, spoil in BREAK.items():
        bad = os.path.join(folder, "bad-" + kind)
        shutil.copytree(os.path.join(ADAPTERS, "man-it-attn-r8"), bad)
        spoil(bad)


# ---- the others ----

class Steady(threading.Thread):
    """Generates on the base model and on adapters that stay, and looks at every token and every pause."""

    def __init__(self, server, want):
        super().__init__(daemon=True)
        self.server, self.want = server, want
        self.requests, self.worst, self.wrong, self.stop = 0, 0.0, [], False

    def run(self):
        try:
            with self.server.peer("key-steady") as peer:
                while not self.stop:
                    self.one(peer, *random.choice(list(self.want)))
        except Exception as error:  # told by the test
            self.wrong.append(repr(error))

    def one(self, peer, model, prompt):
        more = {"model": model} if model else {}
        last = time.monotonic()
        msgid = peer.send("generate", prompt=prompt, max_tokens=TOKENS, temperature=0, stream=True, **more)
        while msgid not in peer.answers:
            peer.read()
            now = time.monotonic()
            self.worst, last = max(self.worst, now - last), now
        text = peer.finish(msgid)["text"]
        if text != self.want[model, prompt]:
            self.wrong.append((model, prompt, text, self.want[model, prompt]))
        peer.pieces.clear()
        self.requests += 1


def answer(peer, prompt, model=None):
    more = {"model": model} if model else {}
    return peer.generate(prompt, max_tokens=TOKENS, temperature=0, **more)["text"]


def references(server):
    """What base and every adapter say, asked alone."""
    want = {}
    with server.peer("key-churn") as peer:
        for prompt in PROMPTS:
            want[None, prompt] = answer(peer, prompt)
        for name in NAMES:
            peer.call("adapters.register", name="reference", path=name)
            for prompt in PROMPTS:
                want[name, prompt] = answer(peer, prompt, "reference")
            peer.call("adapters.remove", name="reference")
    assert len(set(want.values())) > len(PROMPTS) * 4, want  # adapters change what is said
    return want


# ---- the cycles ----

def may_fail(peer, code, method, name):
    try:
        peer.call(method, name=name)
    except RpcError as error:
        assert error.code == code, error.value


def send(peer, random_, prompt, name):
    return [(prompt, peer.send("generate", prompt=prompt, max_tokens=TOKENS, temperature=0, model=name))
            for _ in range(random_.randint(1, 3))]


def finish(peer, asked, want, source):
    for prompt, msgid in asked:
        text = peer.finish(msgid)["text"]
        assert text == want[source, prompt], (source, prompt, text, want[source, prompt])


def good_cycle(peer, random_, want, name):
    source, prompt = random_.choice(NAMES), random_.choice(PROMPTS)
    report = peer.call("adapters.register", name=name, path=source)["report"]
    assert report["bytes"] > 0, report
    if random_.random() < 0.5:
        may_fail(peer, "pool_full", "adapters.load", name)  # no room at the moment
    asked = send(peer, random_, prompt, name)
    if random_.random() < 0.3:  # a new version while it runs: who runs on the old one finishes on it
        newer = random_.choice(NAMES)
        peer.call("adapters.register", name=name, path=newer)
        later = send(peer, random_, prompt, name)
        finish(peer, later, want, newer)
    gone = random_.random() < 0.5
    if gone:  # removed while it runs
        peer.call("adapters.remove", name=name)
        assert peer.refused("generate", prompt=prompt, model=name)["code"] == "not_found"
    finish(peer, asked, want, source)
    if not gone:
        may_fail(peer, "busy", "adapters.unload", name)  # its last request is on its way out
        peer.call("adapters.remove", name=name)


def bad_cycle(peer, random_, name, told):
    kind = random_.choice(list(BREAK))
    error = peer.refused("adapters.register", name=name, path="bad-" + kind)
    assert error["code"] in ("invalid_argument", "numeric", "corrupt", "unsupported", "not_found") and len(error["message"]) > 15, (kind, error)
    told[kind] = error["code"]
    assert peer.refused("generate", prompt="a", model=name)["code"] == "not_found"


def quiet(server):
    """When nothing runs: the engine's numbers, memory, descriptors, files of the store."""
    def idle():
        with server.peer("key-churn") as peer:
            stats = peer.call("stats")["engine"]
        busy = stats["requests"]["running"] + stats["requests"]["waiting"] + stats["adapters"]["leaving"]
        return None if busy else stats
    stats = until(idle)
    pool = stats["pool"]
    assert pool["free"] + pool["waiting"] + pool["kv"] + pool["adapter"] + pool["expert"] == pool["pages"], pool
    return stats, server.rss_kib(), len(os.listdir("/proc/%d/fd" % server.process.pid))


def test_e2e_adapters_soak(server, state):
    want = references(server)
    with server.peer("key-steady") as peer:  # whose adapters they are
        for name, source in PERMANENT.items():
            peer.call("adapters.register", name=name, path=source)
    others = {(None, p): want[None, p] for p in PROMPTS}
    others.update({(name, p): want[source, p] for name, source in PERMANENT.items() for p in PROMPTS})
    steady = [Steady(server, others) for _ in range(2)]
    for thread in steady:
        thread.start()
    random_, told, early, begin = random.Random(11), {}, None, time.monotonic()
    broken = 0
    with server.peer("key-churn") as peer:
        for i in range(CYCLES):
            name = "soak-%d" % (i % 7)
            if i % 100 == 50 or (CYCLES < 1000 and i % 30 == 20):
                bad_cycle(peer, random_, name, told)
                broken += 1
            else:
                good_cycle(peer, random_, want, name)
            peer.pieces.clear()
            if i == CYCLES // 4:
                early = server.rss_kib(), len(os.listdir("/proc/%d/fd" % server.process.pid))
    seconds = time.monotonic() - begin
    for thread in steady:
        thread.stop = True
        thread.join(60)
    stats, rss, descriptors = quiet(server)
    files = sorted(name for _, _, names in os.walk(os.path.join(state, "adapters")) for name in names
                   if name.endswith(".adapter") or ".new" in name or ".tmp" in name)
    worst = max(thread.worst for thread in steady)
    print("%d cycles in %.0f s, %d broken (%s); %d requests of others, longest pause %.0f ms; RSS %.1f then %.1f MiB; "
          "descriptors %d then %d; %d adapters, %d files" %
          (CYCLES, seconds, broken, told, sum(t.requests for t in steady), 1e3 * worst, early[0] / 1024, rss / 1024,
           early[1], descriptors, stats["adapters"]["registered"], len(files)))
    for thread in steady:
        assert not thread.wrong, thread.wrong[:3]
        assert thread.requests > CYCLES // 10
    assert worst < STALL, "somebody waited %.2f s" % worst
    with open("/proc/%d/maps" % server.process.pid) as maps:
        is_watched = "libasan" in maps.read()  # which keeps freed memory for a while
    assert is_watched or rss - early[0] <= GROWTH_KIB, "grew by %d KiB" % (rss - early[0])
    assert descriptors <= early[1] + 2
    assert stats["adapters"]["registered"] == len(PERMANENT), stats["adapters"]
    assert len(files) == len(PERMANENT), files


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="polder-e2e-soak-") as folder:
        source, state = os.path.join(folder, "source"), os.path.join(folder, "state")
        os.mkdir(source)
        sources(source)
        options = ["--pool-bytes", "160M", "--host-bytes", "8M", "--log-level", "error", "--adapter-dir", source]
        with Server(state, TENANTS, *options) as running:
            code = main([test_e2e_adapters_soak], running, state)
    sys.exit(code)
