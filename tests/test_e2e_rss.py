# SPDX-License-Identifier: Apache-2.0
"""10,000 short requests, bad ones and vanishing clients among them: the server's memory stays where it was after the
first 2,000, and no page of the pool is lost."""
import os
import random
import sys
import tempfile
import time

from e2e_lib import ADAPTERS, RpcError, Server, key_hash, main, until

TENANTS = """tenants:
  - name: alpha
    keys_blake2b: [%s]
    allowed_adapters: ["*"]
    manage_adapters: true
    adapter_rpm_limit: 0
    max_parallel_requests: 2000
    max_queue: 2000
""" % key_hash("key-alpha")
MODULES = {"kjv": "kjv-all-r4", "gcide": "gcide-attn-r16", "it": "man-it-attn-r8"}
FIRST, ALL, PIPE, CONNECTIONS, GROWTH_KIB = 2000, 10000, 24, 4, 2048
BAD = [{"prompt": "a", "model": "nobody"}, {"prompt": [99999]}, {"prompt": "a", "nonsense": 1}, {"prompt": "a" * 40000},
       {"prompt": "a", "max_tokens": 0}, {"max_tokens": 1}]


def some_request(random_):
    """(parameters, whether it must be refused)"""
    if random_.random() < 0.06:
        return random_.choice(BAD), True
    words = " ".join(random_.choice(["the", "static", "int", "Lord", "kernel", "e", "\n"]) for _ in range(random_.randint(1, 30)))
    asked = {"prompt": words, "max_tokens": random_.randint(1, 4), "seed": random_.getrandbits(32),
             "stream": random_.random() < 0.5, "n": random_.choice([1, 1, 1, 1, 2])}
    model = random_.choice([None, *MODULES])
    if model:
        asked["model"] = model
    return asked, False


def one_batch(server, peers, random_, counts):
    """PIPE requests on each connection, then their answers; sometimes the client leaves instead of reading."""
    sent = []
    for peer in peers:
        sent.append([])
        for _ in range(PIPE):
            asked, bad = some_request(random_)
            sent[-1].append((peer.send("generate", **asked), bad))
    for i, peer in enumerate(peers):
        if random_.random() < 0.05:
            peer.close()
            peers[i] = server.peer("key-alpha", tcp=random_.random() < 0.5)
            counts["left unread"] += PIPE
            continue
        for msgid, bad in sent[i]:
            try:
                peer.finish(msgid)
                assert not bad
                counts["answered"] += 1
            except RpcError:
                assert bad
                counts["refused"] += 1
        peer.pieces.clear()


def numbers(server):
    """When all is quiet: the engine's numbers and the server's memory."""
    def quiet():
        with server.peer("key-alpha") as peer:
            stats = peer.call("stats")["engine"]
        return stats if stats["requests"]["running"] + stats["requests"]["waiting"] == 0 else None
    stats = until(quiet)
    pool = stats["pool"]
    assert pool["free"] + pool["waiting"] + pool["kv"] + pool["adapter"] + pool["expert"] == pool["pages"], pool
    assert stats["kv"]["reserved_bytes"] == 0, stats["kv"]
    return stats, server.rss_kib()


def test_e2e_rss_is_flat(server):
    random_, counts = random.Random(7), {"answered": 0, "refused": 0, "left unread": 0}
    peers = [server.peer("key-alpha", tcp=i % 2 == 0) for i in range(CONNECTIONS)]
    begin, early = time.monotonic(), None
    while sum(counts.values()) < ALL:
        one_batch(server, peers, random_, counts)
        if early is None and sum(counts.values()) >= FIRST:
            early = numbers(server)
    late = numbers(server)
    for peer in peers:
        peer.close()
    descriptors = len(os.listdir("/proc/%d/fd" % server.process.pid))
    pool = late[0]["pool"]
    print("RSS after %d: %.1f MiB, after %d: %.1f MiB; %s; %.0f s; %d descriptors; pool: %d kv, %d adapter, %d expert, %d free"
          % (FIRST, early[1] / 1024, sum(counts.values()), late[1] / 1024, counts, time.monotonic() - begin, descriptors,
             pool["kv"], pool["adapter"], pool["expert"], pool["free"]))
    assert late[1] - early[1] <= GROWTH_KIB, "grew by %d KiB" % (late[1] - early[1])
    assert counts["refused"] > 300 and counts["left unread"] > 100


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="polder-e2e-rss-") as folder:
        # A pool that is full after the first thousand, so that what is measured is the steady state.
        options = ["--pool-bytes", "160M", "--host-bytes", "8M", "--log-level", "warn"]
        for name, directory in MODULES.items():
            options += ["--lora-modules", "%s=%s" % (name, os.path.join(ADAPTERS, directory))]
        with Server(os.path.join(folder, "state"), TENANTS, *options) as running:
            code = main([test_e2e_rss_is_flat], running)
    sys.exit(code)
