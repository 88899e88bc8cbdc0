# SPDX-License-Identifier: Apache-2.0
"""`polder serve` on the demo model as its users meet it: four tenants over real sockets, adapters that come and go,
clients that vanish or do not read, signals. Order matters little; what takes the server down is at the end."""
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time

from e2e_lib import ADAPTERS, MODEL, Peer, RpcError, Server, WAIT, environment, key_hash, main, run, until

FOLDER = tempfile.TemporaryDirectory(prefix="polder-e2e-state-")
STATE = os.path.join(FOLDER.name, "state")
ROOT = os.path.join(FOLDER.name, "adapters")  # --adapter-dir
SLOW_SECONDS = 3
TENANT = """  - name: %s
    keys_blake2b: [%s]
    allowed_adapters: [%s]
    priority_class: %s
"""
TENANTS = "tenants:\n" + TENANT % ("alpha", key_hash("key-alpha"), '"kjv", "own-*"', "interactive") + \
    "    manage_adapters: true\n    see_tenants: true\n    adapter_rpm_limit: 0\n    pinned_adapter_bytes: 1000000\n" + TENANT % ("beta", key_hash("key-beta"), '"gcide", "ru"', "standard") + \
    TENANT % ("gamma", key_hash("key-gamma"), '"elisp", "own-*"', "batch") + \
    TENANT % ("delta", key_hash("key-delta"), "", "standard") + "    rpm_limit: 6\n    max_parallel_requests: 2\n"
MODULES = {"kjv": "kjv-all-r4", "gcide": "gcide-fused-r4", "ru": "man-ru-attn-r32", "elisp": "elisp-fused-r4"}
GREEDY = {"temperature": 0, "ignore_eos": True}
# Who asks what: (key, model, prompt)
ASKED = [("key-alpha", "kjv", "1 Now the word of the LORD came unto"), ("key-alpha", None, "static int ext4_"),
         ("key-beta", "gcide", "Lantern \\Lan\"tern\\, n."), ("key-beta", "ru", "ОПИСАНИЕ\n       Система отправляет"),
         ("key-gamma", "elisp", "(defun buffer-file-name-p (buffer)\n  \""), ("key-gamma", None, "BESCHREIBUNG\n       Die")]


def with_model(model, **params):
    return dict(params, model=model) if model else params


def engine(server):
    """The engine's numbers; only a tenant that manages adapters gets them."""
    with server.peer("key-alpha") as peer:
        return peer.call("stats")["engine"]


def idle(server):
    """Nothing runs, and every KV page is free or cached."""
    def quiet():
        stats = engine(server)
        return stats if stats["requests"]["running"] + stats["requests"]["waiting"] == 0 else None
    stats = until(quiet)
    pool = stats["pool"]
    assert stats["kv"]["reserved_bytes"] == 0, stats["kv"]
    assert pool["free"] + pool["waiting"] + pool["kv"] + pool["adapter"] + pool["expert"] == pool["pages"], pool
    return stats


def joined(peer, msgid, index=0):
    return "".join(piece["text"] for piece in peer.pieces.get(msgid, []) if piece["index"] == index)


def in_threads(functions):
    results, failures = [None] * len(functions), []

    def work(i):
        try:
            results[i] = functions[i]()
        except BaseException as error:
            failures.append(error)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT * 2)
        assert not thread.is_alive(), "a client hangs"
    if failures:
        raise failures[0]
    return results


# ---- answers ----

def test_e2e_many_at_once_answer_as_alone(server):
    alone = []
    for key, model, prompt in ASKED:
        with server.peer(key) as peer:
            alone.append(peer.generate(prompt, **with_model(model, max_tokens=80, **GREEDY))["text"])
    assert len(set(alone)) == len(alone)

    def ask(i, tcp):
        key, model, prompt = ASKED[i]
        with server.peer(key, tcp=tcp) as peer:
            ids = [peer.send("generate", prompt=prompt, stream=True, **with_model(model, max_tokens=80, **GREEDY))
                   for _ in range(3)]
            for msgid in ids:
                result = peer.finish(msgid)
                assert result["text"] == joined(peer, msgid) == alone[i], (model, result["text"], alone[i])
                assert result["usage"]["completion_tokens"] == 80 and result["finish_reason"] == "length"
        return 3
    asked = in_threads([lambda i=i, tcp=tcp: ask(i, tcp) for i in range(len(ASKED)) for tcp in (False, True)])
    idle(server)
    return "%d streams of 80 tokens on 12 connections equal %d answers alone" % (sum(asked), len(alone))


def test_e2e_pieces_are_whole_characters(server):
    """The peer decodes strictly, so a broken piece raises; hot sampling makes odd bytes."""
    pieces = 0
    with server.peer("key-beta") as peer:
        ids = [peer.send("generate", prompt="ИМЯ 🙂", model="ru", stream=True, temperature=2, seed=seed, max_tokens=120)
               for seed in range(8)]
        for msgid in ids:
            result = peer.finish(msgid)
            assert joined(peer, msgid) == result["text"]
            pieces += len(peer.pieces.get(msgid, []))
    return "%d pieces" % pieces


def test_e2e_stop_n_logprobs_seed(server):
    with server.peer("key-alpha") as peer:
        whole = peer.generate("static int ext4_", max_tokens=60, **GREEDY)
        text, stop = whole["text"], whole["text"][20:26]
        for stream in (False, True):
            msgid = peer.send("generate", prompt="static int ext4_", max_tokens=60, stop=["@@@", stop], stream=stream, **GREEDY)
            result = peer.finish(msgid)
            assert result["text"] == text[:text.index(stop)] and result["finish_reason"] == "stop", result
            assert not stream or joined(peer, msgid) == result["text"]
        token = whole["tokens"][10]
        short = peer.generate("static int ext4_", max_tokens=60, stop_token_ids=[token], **GREEDY)
        assert short["finish_reason"] == "stop" and len(short["tokens"]) <= 11
        two = peer.generate("The kernel", max_tokens=20, n=2, seed=7, temperature=1)["choices"]
        ones = [peer.generate("The kernel", max_tokens=20, seed=seed, temperature=1) for seed in (7, 8)]
        assert [choice["text"] for choice in two] == [one["text"] for one in ones] and two[0]["text"] != two[1]["text"]
        result = peer.generate("The kernel", max_tokens=12, logprobs=3, **GREEDY)
        assert len(result["logprobs"]) == 12
        for entry, token in zip(result["logprobs"], result["tokens"]):
            tops = [top[1] for top in entry["top"]]
            assert entry["token"] == token == entry["top"][0][0] and entry["logprob"] <= 0 and len(tops) == 3
            assert abs(entry["logprob"] - tops[0]) < 1e-5 and tops == sorted(tops, reverse=True)
        ids = peer.call("tokenize", text="The kernel")["tokens"]
        assert peer.generate(ids, max_tokens=12, **GREEDY)["tokens"] == result["tokens"]


def test_e2e_tokens_there_and_back(server):
    with server.peer("key-delta") as peer:
        for text in ("a", "naïve 🙂👩‍👩‍👧 日本語\t\r\n  x", "\u0000\u0001", " " * 300, "é" * 500, "İıß"):
            tokens = peer.call("tokenize", text=text)
            assert tokens["count"] == len(tokens["tokens"])
            assert peer.call("detokenize", tokens=tokens["tokens"])["text"] == text, text
        half = peer.call("tokenize", text="\U0001F642")["tokens"][:1]
        assert "\ufffd" in peer.call("detokenize", tokens=half)["text"]
        assert peer.refused("detokenize", tokens=[8192])["code"] == "invalid_argument"
        assert peer.refused("detokenize", tokens=[-1])["code"] == "invalid_argument"
        # a str that is not UTF-8 is refused; what the connection does then is the protocol's business
        peer.sock.sendall(b"\x94\x00\xcd\x30\x39\xa8tokenize\x91\x81\xa4text\xa2\xff\xfe")
        try:
            while 12345 not in peer.answers:
                peer.read()
            assert peer.answers[12345][0]["code"] == "invalid_argument"
        except EOFError:
            assert peer.last_error["code"] == "invalid_argument"


def test_e2e_bad_requests(server):
    with server.peer("key-delta") as peer:
        for words, says in [({"prompt": [8192]}, "token"), ({"prompt": []}, "prompt"), ({"prompt": ""}, "prompt"),
                            ({"prompt": "word " * 3000}, "context"), ({"prompt": "a", "max_tokens": 5000}, "max_tokens"),
                            ({"prompt": "a", "temperature": -1}, "temperature"), ({"prompt": "a", "nope": 1}, "nope"),
                            ({}, "prompt"), ({"prompt": "a", "priority_class": "urgent"}, "priority_class")]:
            error = peer.refused("generate", **words)
            assert error["code"] in ("invalid_argument", "permission_denied") and says in error["message"], (words, error)
            assert error["type"] == 1
        assert peer.call("cancel", id=77)["found"] is False
        assert peer.call("ping") == "pong"
    try:
        server.peer("wrong").close()
        raise AssertionError("a wrong key was taken")
    except RpcError as error:
        assert error.code == "unauthenticated"


# ---- ends that are no ends ----

def test_e2e_cancel_and_disconnect_free(server):
    before = idle(server)["pool"]
    with server.peer("key-beta") as peer:
        ids = [peer.send("generate", prompt="word " * 300 + str(i), stream=True, max_tokens=1200, **GREEDY) for i in range(4)]
        for msgid in ids:
            peer.first_token(msgid)
        assert engine(server)["requests"]["running"] == 4
        for msgid in ids:
            assert peer.call("cancel", id=msgid)["found"] is True
            result = peer.finish(msgid)
            assert result["finish_reason"] == "cancelled" and result["text"] == joined(peer, msgid)
    idle(server)
    peers = [server.peer("key-beta", tcp=i % 2 == 0) for i in range(4)]
    for i, peer in enumerate(peers):
        peer.first_token(peer.send("generate", prompt="word " * 300 + str(i), stream=True, max_tokens=1200, **GREEDY))
    for i, peer in enumerate(peers):
        if i < 2:
            peer.sock.shutdown(socket.SHUT_WR)  # half closed counts as closed
        else:
            peer.close()
    after = idle(server)["pool"]
    for peer in peers:
        peer.close()
    assert after["expert"] == before["expert"] and after["pages"] == before["pages"]
    return "kv pages %d -> %d, all cached" % (before["kv"], after["kv"])


def test_e2e_slow_reader(server):
    """One who does not read is held back, then dropped; another tenant's stream goes on."""
    slow = server.peer("key-gamma", receive_buffer=4096)
    for i in range(3):
        slow.send("generate", prompt="a%d" % i, n=8, logprobs=8, stream=True, max_tokens=1900, **GREEDY)
    begin = time.monotonic()
    with server.peer("key-beta") as peer:
        gaps, last, rounds = [], time.monotonic(), 0

        def connections():
            with server.peer("key-alpha") as alpha:
                return next(t for t in alpha.call("stats")["tenants"] if t["name"] == "gamma")["connections"]
        while connections():
            msgid = peer.send("generate", prompt="The kernel", stream=True, max_tokens=40, **GREEDY)
            last = time.monotonic()
            while msgid not in peer.answers:
                peer.read()
                gaps.append(time.monotonic() - last)
                last = time.monotonic()
            peer.finish(msgid)
            rounds += 1
            assert time.monotonic() - begin < WAIT, "the slow reader was not dropped"
    seconds = time.monotonic() - begin
    assert seconds >= SLOW_SECONDS - 0.5 and max(gaps) < 3, (seconds, max(gaps))
    slow.close()
    idle(server)
    return "dropped after %.1f s; meanwhile %d answers of another tenant, longest wait %.0f ms" % (
        seconds, rounds, 1e3 * max(gaps))


def test_e2e_deadline(server):
    with server.peer("key-beta") as peer:
        begin = time.monotonic()
        error = peer.refused("generate", prompt="a", n=8, max_tokens=1900, deadline_ms=150, **GREEDY)
        assert error["code"] == "deadline_exceeded" and time.monotonic() - begin < 5, error
        assert len(peer.generate("a", max_tokens=4, deadline_ms=60000, **GREEDY)["tokens"]) == 4
    idle(server)


# ---- limits and classes ----

def test_e2e_limits(server):
    with server.peer("key-delta") as peer:
        ids = [peer.send("generate", prompt="a", max_tokens=1500, stream=True, **GREEDY) for _ in range(2)]
        for msgid in ids:
            peer.first_token(msgid)
        error = peer.refused("generate", prompt="a", max_tokens=2)
        assert error["code"] == "resource_exhausted" and error["kind"] == "max_parallel_requests", error
        assert error["limit"] == 2 and error["remaining"] == 0
        for msgid in ids:
            peer.call("cancel", id=msgid)
            peer.finish(msgid)
        error, answered = None, 0
        for _ in range(10):
            try:
                peer.generate("a", max_tokens=1)
                answered += 1
            except RpcError as caught:
                error = caught.value
                break
        assert error and error["code"] == "resource_exhausted" and error["kind"] == "rpm_limit", error
        assert error["limit"] == 6 and 0 < error["retry_after_ms"] <= 61000, error
    with server.peer("key-beta") as peer:
        peer.generate("a", max_tokens=1)  # another tenant is not concerned
    return "rpm: %d answered, then wait %d ms" % (answered, error["retry_after_ms"])


def test_e2e_urgent_request_enters_a_step(server):
    before, firsts = engine(server)["engine"]["pauses"], []
    with server.peer("key-gamma") as batch, server.peer("key-alpha") as urgent:
        urgent.generate("b", max_tokens=1)
        for round_ in range(2):
            ids = [batch.send("generate", prompt=("%d %d word " % (round_, i)) * 350, max_tokens=1, **GREEDY)
                   for i in range(4)]
            for _ in range(6):
                time.sleep(0.05)
                firsts.append(urgent.generate("b", max_tokens=1, **GREEDY)["usage"]["ttft_ms"])
            slowest = 0
            for msgid in ids:
                slowest = max(slowest, batch.finish(msgid)["usage"]["ttft_ms"])
    pauses = engine(server)["engine"]["pauses"] - before
    firsts.sort()
    assert pauses > 0, "no step was left"
    assert firsts[len(firsts) // 2] < slowest, (firsts, slowest)
    return "%d pauses; first token median %.0f ms, worst %.0f ms; batch worst %.0f ms" % (
        pauses, firsts[len(firsts) // 2], firsts[-1], slowest)


# ---- adapters ----

def test_e2e_foreign_adapter_looks_unknown(server):
    def raw(name):
        with server.peer("key-alpha") as peer:
            peer.sock.sendall(msgpack_request(9, "generate", {"prompt": "a", "model": name, "max_tokens": 1}))
            data = b""
            while not data.endswith(b"\xc0"):
                data += peer.sock.recv(4096)
            return data.replace(name.encode(), b"NAME")
    assert raw("ru") == raw("xu") == raw("ry"), "another tenant's adapter is told from an unknown one"
    with server.peer("key-alpha") as peer:
        assert {a["id"] for a in peer.call("models") if a["kind"] == "adapter"} == {"kjv"}
        foreign, unknown = (peer.refused("adapters.remove", name=name) for name in ("ru", "xu"))
        assert str(foreign).replace("ru", "xu") == str(unknown), (foreign, unknown)
        add = [peer.refused("adapters.register", name=name, path=os.path.join(ROOT, "it")) for name in ("ru", "xu")]
        assert str(add[0]).replace('"ru"', '"xu"') == str(add[1]), add
    with server.peer("key-beta") as peer:
        assert peer.refused("adapters.register", name="gcide2", path="it")["code"] == "permission_denied"
        assert peer.refused("adapters.remove", name="gcide")["code"] == "permission_denied"


def msgpack_request(msgid, method, params):
    import msgpack
    return msgpack.packb([0, msgid, method, [params]])


def cli(server, *words, key="key-alpha"):
    code, out, err = run(*words, "--connect", "unix:" + server.unix, env={"POLDER_API_KEY": key})
    return code, out.strip(), err.strip()


def test_e2e_adapters_by_command_line(server):
    code, out, err = cli(server, "adapter", "add", "own-it", os.path.join(ROOT, "it"))
    assert code == 0 and json.loads(out)["report"]["rank_max"] == 8, (out, err)
    code, out, _ = cli(server, "adapter", "list")
    listed = {a["name"]: a for a in json.loads(out)}
    assert code == 0 and set(listed) == {"kjv", "own-it"} and listed["own-it"]["own"], out
    code, out, _ = cli(server, "adapter", "show", "own-it")
    assert code == 0 and "own-it" in out and json.loads(out)["rank_max"] == 8, out
    code, out, err = cli(server, "adapter", "show", "gcide")
    assert code == 1 and "gcide" in err
    code, out, err = cli(server, "adapter", "add", "own-it", os.path.join(ROOT, "it"))
    assert code == 0 and "already, version 1" in err and json.loads(out) == listed["own-it"], (out, err)
    with server.peer("key-alpha") as peer:
        base = peer.generate("NOME\n       kill", max_tokens=30, **GREEDY)["text"]
        before = peer.call("stats")
        own = peer.generate("NOME\n       kill", model="own-it", max_tokens=30, **GREEDY)["text"]
        assert peer.generate("NOME\n       kill", model="own-it", max_tokens=30, **GREEDY)["text"] == own
        after, listed = peer.call("stats"), {a["name"]: a for a in peer.call("adapters.list")}
    assert own != base
    with server.peer("key-gamma") as peer:  # may use names like it, and still not what alpha has registered
        foreign, unknown = (peer.refused("generate", prompt="a", model=name, max_tokens=2) for name in ("own-it", "own-no"))
        assert str(foreign).replace("own-it", "own-no") == str(unknown) and foreign["code"] == "not_found", foreign
        assert "own-it" not in {a["id"] for a in peer.call("models")}
    mine, loads = listed["own-it"], after["engine"]["adapters"]["loads"] - before["engine"]["adapters"]["loads"]
    assert (mine["misses"], mine["hits"], mine["loads"], loads) == (1, 1, 1, 1), mine
    assert mine["device_bytes"] == mine["file_bytes"] > 0 and 0 < mine["load_us_max"] <= mine["load_us"], mine
    waited = after["tenant"]["adapter_wait_us"] - before["tenant"]["adapter_wait_us"]
    assert 0 < waited < 5e6, waited
    code, out, err = cli(server, "adapter", "rm", "own-it")
    assert code == 0, err
    code, out, err = cli(server, "adapter", "rm", "own-it")
    assert code == 1 and "not_found" in err, err
    code, out, err = cli(server, "call", "generate", '{"prompt": "The", "max_tokens": 3, "temperature": 0}', key="key-beta")
    assert code == 0 and json.loads(out)["usage"]["completion_tokens"] == 3, (out, err)
    assert cli(server, "call", "generate", '{"prompt": ')[0] != 0
    code, out, _ = cli(server, "stats", key="key-beta")
    assert code == 0 and json.loads(out)["tenant"]["name"] == "beta" and "engine" not in json.loads(out)
    code, _, err = cli(server, "stats", key="wrong")
    assert code == 1 and "unauthenticated" in err
    code, out, err = run("chat", "--connect", "%s:%d" % server.tcp, "--max-tokens", "5", "--ignore-eos",
                         stdin=b"static int\n/new\nint main\n/quit\n", env={"POLDER_API_KEY": "key-beta"})[0:3]
    assert code == 0 and out.strip(), err


def test_e2e_adapters_by_manifest(server):
    """The same file against a running server: its failures at the end, again without work."""
    file = os.path.join(server.folder.name, "adapters.yaml")
    lines = ["adapters:"]
    for name, directory in [("own-a", "it"), ("own-b", "broken"), ("own-c", "pl"), ("ru", "it")]:
        lines += ["  - name: " + name, "    path: " + os.path.join(ROOT, directory)]
    with open(file, "w") as out:
        out.write("\n".join(lines + ["  - name: own-d", "    path: " + MODEL, ""]))
    for added, unchanged in ((2, 0), (0, 2)):
        code, out, err = cli(server, "adapter", "add", "--manifest", file)
        assert code == 1, (out, err)
        said = out.split("\n")
        assert said[0] == "5 listed: %d registered, %d unchanged, 3 failed, 0 not tried" % (added, unchanged), out
        assert ["own-b" in said[1], "permission_denied" in said[2], "not_found" in said[3]] == [True] * 3, out
        assert err.startswith("[1/5] own-a: " + ("applied to 32 of 802 matrices, rank 8" if added else "registered with")), err
    with server.peer("key-alpha") as peer:
        assert {"own-a", "own-c"} < {a["name"] for a in peer.call("adapters.list")}
        for name in ("own-a", "own-c"):
            peer.call("adapters.remove", name=name)


def test_e2e_adapters_refused(server):
    with server.peer("key-alpha") as peer:
        for path, codes in [("/etc", None), ("../it", None), ("link", None), (ROOT + "/../state", None),
                            ("nowhere", None), ("broken", None), ("truncated", None), ("other-base", None), ("", None)]:
            error = peer.refused("adapters.register", name="own-x", path=path)
            assert error["code"] in ("not_found", "invalid_argument", "permission_denied", "corrupt", "unsupported"), (
                path, error)
            assert len(error["message"]) > 10 and "root:" not in error["message"], (path, error)
        for name in ("", ".x", "a/b", "../x", "x" * 64, "own-\n"):
            assert peer.refused("adapters.register", name=name, path="it")["code"] in ("invalid_argument", "not_found",
                                                                                 "permission_denied"), name
        names = {a["id"] for a in peer.call("models") if a["kind"] == "adapter"}
        assert names == {"kjv"}, names
        return peer.refused("adapters.register", name="own-x", path="other-base")["message"][:90]


def test_e2e_adapter_removed_in_use(server):
    with server.peer("key-alpha") as peer, server.peer("key-alpha") as other:
        other.call("adapters.register", name="own-pl", path="pl")
        alone = peer.generate("NAZWA", model="own-pl", max_tokens=300, **GREEDY)["text"]
        msgid = peer.send("generate", prompt="NAZWA", model="own-pl", max_tokens=300, stream=True, **GREEDY)
        peer.first_token(msgid)
        other.call("adapters.remove", name="own-pl")
        assert other.refused("generate", prompt="a", model="own-pl")["code"] == "not_found"
        # the same name again, with other weights, while the old ones still run
        other.call("adapters.register", name="own-pl", path="it")
        again = other.generate("NAZWA", model="own-pl", max_tokens=30, **GREEDY)["text"]
        assert peer.finish(msgid)["text"] == alone and not alone.startswith(again)
        other.call("adapters.remove", name="own-pl")
    idle(server)


def test_e2e_adapter_damaged_on_disk(server):
    """Bytes of a store file change while the server has it open: nobody gets an answer made of them, not even from the
    prefix cache later, and registering it again mends it."""
    prompt = "NOME\n       kill - termina un processo " * 6
    store = os.path.join(STATE, "adapters", "own-d@alpha.adapter")
    with server.peer("key-alpha") as peer, server.peer("key-gamma") as other:
        peer.call("adapters.register", name="own-d", path="it")
        with open(store, "r+b") as file:
            pages = struct.unpack("<Q", file.read(24)[16:])[0]
            file.seek(pages)
            body = bytearray(file.read())
            for i in range(0, len(body), 5000):
                body[i] ^= 5
            file.seek(pages)
            file.write(body)
        beside = other.send("generate", prompt="(defun ", model="elisp", max_tokens=100, **GREEDY)
        for _ in range(2):
            error = peer.refused("generate", prompt=prompt, model="own-d", max_tokens=20, **GREEDY)
            assert error["code"] == "io_error", error
        assert other.finish(beside)["usage"]["completion_tokens"] == 100
        peer.call("adapters.register", name="own-d", path="it")
        mended = peer.generate(prompt, model="own-d", max_tokens=20, **GREEDY)
        assert mended["usage"]["cached_tokens"] == 0, mended["usage"]
        peer.call("adapters.register", name="own-e", path="it")
        assert peer.generate(prompt, model="own-e", max_tokens=20, **GREEDY)["text"] == mended["text"]
        for name in ("own-d", "own-e"):
            peer.call("adapters.remove", name=name)


def test_e2e_adapter_versions(server):
    """A name is registered again: running and queued requests finish on the old version, the next ones get the new
    one, and neither is served KV of the other. A restart has the new one."""
    prompt = "NAZWA\n       zapis " * 8
    with server.peer("key-alpha") as peer, server.peer("key-alpha") as other:
        assert other.call("adapters.register", name="own-v", path="pl")["report"]["version"] == 1
        first = peer.generate(prompt, model="own-v", max_tokens=300, **GREEDY)["text"]
        running = peer.send("generate", prompt=prompt, model="own-v", max_tokens=300, stream=True, **GREEDY)
        peer.first_token(running)
        assert other.call("adapters.register", name="own-v", path="it")["report"]["version"] == 2
        second = other.generate(prompt, model="own-v", max_tokens=40, **GREEDY)
        assert running not in peer.answers and second["usage"]["cached_tokens"] == 0, second["usage"]
        assert peer.finish(running)["text"] == first and not first.startswith(second["text"])
        code, out, _ = cli(server, "adapter", "show", "own-v")
        assert code == 0 and json.loads(out)["version"] == 2, out
        assert other.refused("adapters.register", name="own-v", path="pl", replace=False)["code"] == "already_exists"
        # what is refused leaves the version as it is
        assert other.refused("adapters.register", name="own-v", path="broken")["code"] == "invalid_argument"
        # the operator's adapter serves all tenants: one of them may neither replace nor remove it
        assert other.refused("adapters.register", name="kjv", path="pl")["code"] == "already_exists"
        assert other.refused("adapters.remove", name="kjv")["code"] == "not_found"
        listed = {a["name"]: a for a in other.call("adapters.list")}
        assert (listed["own-v"]["version"], listed["own-v"]["own"]) == (2, True), listed["own-v"]
        assert (listed["kjv"]["version"], listed["kjv"]["own"], listed["kjv"]["rank_max"]) == (1, False, 4), listed["kjv"]
    state = sorted(name for name in os.listdir(os.path.join(STATE, "adapters")) if "own-v" in name or "kjv" in name)
    assert state == ["kjv.adapter", "own-v@alpha.adapter"], state
    idle(server)
    server.kill()
    server.start()
    with server.peer("key-alpha") as peer:
        listed = {a["name"]: (a["version"], a["rank_max"]) for a in peer.call("adapters.list")}
        assert listed == {"own-v": (2, 8), "kjv": (1, 4)}, listed
        assert peer.generate(prompt, model="own-v", max_tokens=40, **GREEDY)["text"] == second["text"]
        peer.call("adapters.remove", name="own-v")


def test_e2e_adapters_load_unload_pin(server):
    """kjv is the operator's and larger than this tenant may pin; beta may not manage."""
    with server.peer("key-alpha") as peer:
        def state(name="own-p"):
            return next(a for a in peer.call("adapters.list") if a["name"] == name)
        peer.call("adapters.register", name="own-p", path="pl")
        before = peer.call("adapters.stats")
        assert (state()["resident"], state()["pinned"], before["pinned_bytes"]) == (False, False, 0), before
        peer.call("adapters.load", name="own-p")
        until(lambda: state()["resident"])
        peer.call("adapters.unload", name="own-p")
        assert not state()["resident"]
        assert cli(server, "adapter", "pin", "own-p")[0] == 0
        until(lambda: state()["resident"])
        stats = peer.call("adapters.stats")
        assert (stats["pinned"], stats["pinned_bytes"], stats["pinned_bytes_max"]) == (1, state()["file_bytes"], 1000000)
        error = peer.refused("adapters.unload", name="own-p")
        assert error["code"] == "busy" and "unpin" in error["message"], error
        error = peer.refused("adapters.pin", name="kjv")
        assert error["code"] == "resource_exhausted" and "pinned_adapter_bytes" in error["message"], error
        code, out, err = cli(server, "adapter", "stats")
        assert code == 0 and json.loads(out)["pinned"] == 1, err
        # a new version is nobody's promise
        peer.call("adapters.register", name="own-p", path="it")
        assert not state()["pinned"] and peer.call("adapters.stats")["pinned_bytes"] == 0
        peer.call("adapters.pin", name="own-p")
        assert cli(server, "adapter", "unpin", "own-p")[0] == 0 and not state()["pinned"]
        for method in ("adapters.load", "adapters.unload", "adapters.pin", "adapters.unpin"):
            foreign, unknown = (peer.refused(method, name=name) for name in ("ru", "xu"))
            assert str(foreign).replace("ru", "xu") == str(unknown), (foreign, unknown)
        peer.call("adapters.pin", name="own-p")
        peer.call("adapters.remove", name="own-p")
        assert peer.call("adapters.stats")["pinned_bytes"] == 0
    with server.peer("key-beta") as peer:
        assert peer.refused("adapters.pin", name="gcide")["code"] == "permission_denied"
    idle(server)
    return error["message"]


def test_e2e_adapter_upload(server):
    """Files that the server may not read by path come over the connection, and are the same adapter."""
    outside = os.path.join(ADAPTERS, "man-pl-attn-r16")
    with server.peer("key-alpha") as peer:
        peer.call("adapters.register", name="own-path", path="pl")
        assert peer.refused("adapters.register", name="own-up", path=outside)["code"] == "not_found"
        code, out, err = cli(server, "adapter", "add", "own-up", outside, "--upload")
        assert code == 0 and "applied to 32 of 802" in err and json.loads(out)["report"]["version"] == 1, (out, err)
        code, _, err = cli(server, "adapter", "add", "own-up", outside, "--upload")
        assert code == 0 and "already" in err, err
        listed = {a["name"]: a for a in peer.call("adapters.list")}
        for key in ("digest", "source", "applied", "file_bytes", "own"):
            assert listed["own-up"][key] == listed["own-path"][key], key
        texts = [peer.generate("NAZWA", model=name, max_tokens=30, **GREEDY)["text"] for name in ("own-path", "own-up")]
        assert texts[0] == texts[1]
        for name, says in (("broken", "invalid_argument"), ("truncated", "corrupt"), ("other-base", "invalid_argument")):
            code, _, err = cli(server, "adapter", "add", "own-up", os.path.join(ROOT, name), "--upload")
            assert code == 1 and (says in err or "adapter_" in err), (name, err)
        code, _, err = cli(server, "adapter", "add", "own-big", os.path.join(ADAPTERS, "kjv-all-r4"), "--upload")
        assert code == 1 and "weights_bytes" in err, err
        code, _, err = cli(server, "adapter", "add", "own-up", FOLDER.name, "--upload")
        assert code == 1 and "adapter_model.safetensors" in err, err
        code, _, err = cli(server, "adapter", "add", "ru", outside, "--upload")
        assert code == 1 and "permission_denied" in err, err
        until(lambda: os.listdir(os.path.join(STATE, "uploads")) == [])
        assert {a["name"]: a["version"] for a in peer.call("adapters.list")}["own-up"] == 1
        # what a kill leaves, the next start removes
        begun = peer.call("adapters.upload", name="own-half", config_bytes=10, weights_bytes=10, digest="0" * 64)
        peer.call("adapters.upload_chunk", upload=begun["upload"], offset=0, data=b"0123456789ab")
        assert len(os.listdir(os.path.join(STATE, "uploads"))) == 1
        server.kill()
    server.start()
    assert os.listdir(os.path.join(STATE, "uploads")) == []
    with server.peer("key-alpha") as peer:
        for name in ("own-up", "own-path"):
            peer.call("adapters.remove", name=name)


# ---- other clients ----

LUA = """
local function run(kind, address)
  local channel = vim.fn.sockconnect(kind, address, { rpc = true })
  assert(channel > 0, kind)
  assert(vim.rpcrequest(channel, 'auth', { key = 'key-beta' }).tenant == 'beta')
  local answer = vim.rpcrequest(channel, 'generate', { prompt = 'The kernel', max_tokens = 8, temperature = 0 })
  io.stdout:write(kind .. '=' .. vim.fn.json_encode(answer.text) .. '\\n')
  local fine, message = pcall(vim.rpcrequest, channel, 'generate', { prompt = 'a', model = 'kjv' })
  assert(not fine and message:find('not_found', 1, true), message)
  vim.fn.chanclose(channel)
end
local fine, problem = pcall(function()
  run('tcp', os.getenv('ADDRESS'))
  run('pipe', os.getenv('SOCKET'))
end)
if not fine then io.stdout:write(tostring(problem)) vim.cmd('cquit 1') end
vim.cmd('qall!')
"""


def test_e2e_neovim(server):
    nvim = shutil.which("nvim")
    if not nvim:
        return "SKIPPED: nvim is not installed (apt install neovim)"
    with server.peer("key-beta") as peer:
        text = peer.generate("The kernel", max_tokens=8, temperature=0)["text"]
    script = os.path.join(server.folder.name, "e2e.lua")
    with open(script, "w") as file:
        file.write(LUA)
    homes = {"XDG_%s_HOME" % kind: server.folder.name for kind in ("STATE", "DATA", "CONFIG", "CACHE")}
    done = subprocess.run([nvim, "--headless", "-u", "NONE", "-i", "NONE", "-n", "-c", "luafile " + script],
                          env=environment(ADDRESS="%s:%d" % server.tcp, SOCKET=server.unix, **homes),
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, timeout=WAIT, text=True)
    assert done.returncode == 0, done.stdout
    said = [json.loads(line.partition("=")[2]) for line in done.stdout.split("\n") if line.startswith(("tcp=", "pipe="))]
    assert said == [text, text], (said, text)


def test_e2e_c_and_python_clients(server):
    example = os.environ.get("POLDER_CLIENT_EXAMPLE")
    sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(MODEL)), "clients/python"))
    from polder import Client, PolderError
    for address in ("unix:" + server.unix, "%s:%d" % server.tcp):
        with Client(address, key="key-beta") as client:
            stream = client.generate("The kernel", max_tokens=8, temperature=0)
            assert "".join(token.text for token in stream) == stream.answer.text
            try:
                client.complete("a", model="kjv")
                raise AssertionError("not refused")
            except PolderError as error:
                assert error.code == "not_found"
        if not example or not os.path.exists(example):
            continue
        done = subprocess.run([example, address, "key-beta", "The kernel", "gcide"], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, timeout=WAIT)
        assert done.returncode == 0 and b"tokens, first after" in done.stdout and done.stdout.decode("utf-8"), done
        done = subprocess.run([example, address, "wrong", "The"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=WAIT)
        assert done.returncode == 1 and b"unauthenticated" in done.stderr, done
    return "" if example else "the C example was not built"


# ---- the operator ----

def test_e2e_reload(server):
    def reload(text, says):
        before = len(server.log_text())
        server.write_tenants(text)
        server.process.send_signal(signal.SIGHUP)
        return until(lambda: server.log_text()[before:] if says in server.log_text()[before:] else None, 10)
    held = server.peer("key-gamma")
    log = reload(TENANTS + "    nonsense: 1\n", "nonsense")
    assert "tenants.yaml:" in log, log
    held.generate("a", max_tokens=1)
    server.peer("key-beta").close()
    more = TENANTS.replace(key_hash("key-gamma"), key_hash("key-gamma-2")) + TENANT % (
        "epsilon", key_hash("key-epsilon"), '"kjv"', "standard")
    reload(more, "tenants")
    with until(lambda: attempt(server, "key-epsilon"), 10) as peer:
        peer.generate("a", model="kjv", max_tokens=1)
    try:
        held.generate("a", max_tokens=1)
        raise AssertionError("a key that left the file still works")
    except (EOFError, OSError):
        pass
    except RpcError as error:
        assert error.code == "unauthenticated"
    assert not attempt(server, "key-gamma") and attempt(server, "key-gamma-2")
    reload(TENANTS, "tenants")
    assert attempt(server, "key-gamma")


def attempt(server, key):
    try:
        return server.peer(key)
    except RpcError:
        return None


def test_e2e_kill_and_restart(server):
    with server.peer("key-alpha") as peer:
        peer.call("adapters.register", name="own-it", path="it")
        before = peer.generate("NOME\n       kill", model="own-it", max_tokens=30, **GREEDY)["text"]
        msgid = peer.send("generate", prompt="a", max_tokens=1500, stream=True, **GREEDY)
        peer.first_token(msgid)
        server.kill()
    server.start()
    with server.peer("key-alpha") as peer:
        assert {a["name"]: a["own"] for a in peer.call("adapters.list")} == {"kjv": False, "own-it": True}
        assert peer.generate("NOME\n       kill", model="own-it", max_tokens=30, **GREEDY)["text"] == before
        peer.call("adapters.remove", name="own-it")
    with server.peer("key-beta") as peer:
        assert peer.refused("generate", prompt="a", model="own-it")["code"] == "not_found"
    server.kill()
    server.start()
    with server.peer("key-alpha") as peer:
        assert [a["name"] for a in peer.call("adapters.list")] == ["kjv"], "a removed adapter came back"


def test_e2e_terminate_drains(server):
    with server.peer("key-beta") as peer, server.peer("key-alpha") as other:
        msgid = peer.send("generate", prompt="The kernel", stream=True, max_tokens=1500, **GREEDY)
        peer.first_token(msgid)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: refused_now(other), 5)
        result = peer.finish(msgid)
        assert result["finish_reason"] == "length" and result["usage"]["completion_tokens"] == 1500
        assert server.process.wait(WAIT) == 0, server.log_text()[-2000:]
    assert not os.path.exists(server.unix), "the socket stays behind"


def refused_now(peer):
    """True when generate is answered with unavailable, or the connection is gone."""
    try:
        peer.generate("a", max_tokens=1)
        return False
    except RpcError as error:
        assert error.code == "unavailable", error
        return True
    except (EOFError, OSError):
        return True


def prepare():
    os.mkdir(ROOT)
    shutil.copytree(os.path.join(ADAPTERS, "man-it-attn-r8"), os.path.join(ROOT, "it"))
    shutil.copytree(os.path.join(ADAPTERS, "man-pl-attn-r16"), os.path.join(ROOT, "pl"))
    os.symlink(os.path.join(ADAPTERS, "man-it-attn-r8"), os.path.join(ROOT, "link"))
    for name in ("broken", "truncated", "other-base"):
        shutil.copytree(os.path.join(ROOT, "it"), os.path.join(ROOT, name))
    weights = os.path.join(ROOT, "%s/adapter_model.safetensors")
    with open(os.path.join(ROOT, "broken/adapter_config.json"), "w") as file:
        file.write('{"r": ')
    os.truncate(weights % "truncated", os.path.getsize(weights % "truncated") - 1000)
    widen(weights % "other-base")


def widen(path):
    """Every 256 of the shapes becomes 512, as if the base had hidden size 512; the data grows with it."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    at = 0
    for name, tensor in sorted(header.items()):
        if name == "__metadata__":
            continue
        tensor["shape"] = [512 if n == 256 else n for n in tensor["shape"]]
        count = {"F32": 4, "BF16": 2, "F16": 2}[tensor["dtype"]]
        for n in tensor["shape"]:
            count *= n
        tensor["data_offsets"] = [at, at + count]
        at += count
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + bytes(at))


if __name__ == "__main__":
    prepare()
    options = ["--adapter-dir", ROOT, "--max-upload-bytes", 1000000, "--max-num-batched-tokens", 2048, "--slow-reader-timeout", SLOW_SECONDS]
    for name, directory in MODULES.items():
        options += ["--lora-modules", "%s=%s" % (name, os.path.join(ADAPTERS, directory))]
    running = Server(STATE, TENANTS, *options)
    try:
        code = main([value for name, value in list(globals().items()) if name.startswith("test_")], running)
    finally:
        if running.process.poll() is None:
            running.kill()
    if code:
        sys.stderr.write(running.log_text()[-6000:])
    running.folder.cleanup()
    FOLDER.cleanup()
    sys.exit(code)
