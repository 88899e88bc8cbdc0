# SPDX-License-Identifier: Apache-2.0
"""`polder adapter` on a state directory, without a server: what it registers, refuses, lists, verifies and removes."""
import json
import os
import shutil
import subprocess
import sys
import tempfile

from e2e_lib import ADAPTERS, MODEL, POLDER, Server, environment, key_hash, main, run

FOLDER = tempfile.TemporaryDirectory(prefix="polder-cli-adapter-")
TENANTS = "tenants:\n  - name: acme\n    keys_blake2b: [%s]\n    allowed_adapters: [\"*\"]\n    manage_adapters: true\n" % (
    key_hash("key-acme"))
GREEDY = {"temperature": 0, "ignore_eos": True, "max_tokens": 24}


def path(name):
    return os.path.join(FOLDER.name, name)


def source(name):
    return os.path.join(ADAPTERS, name)


def tool(state, *words, model=False, env=None):
    more = ["--model", MODEL] if model else []
    return run("adapter", *words, "--state-dir", state, *more, env=env)


def done(state, *words, model=False):
    code, out, err = tool(state, *words, model=model)
    assert code == 0, (words, out, err)
    return out, err


def refused(state, *words, says, model=False):
    code, out, err = tool(state, *words, model=model)
    last = err.strip().split("\n")[-1]
    assert code == 1 and last.startswith("polder: "), (words, code, out, err)
    for part in [says] if isinstance(says, str) else says:
        assert part in err, (words, part, err)


def add(state, name, directory, *words):
    out, err = done(state, "add", name, directory, *words, model=True)
    return json.loads(out)["report"], err


def listed(state):
    return {(a["name"], a["owner"]): a for a in json.loads(done(state, "list")[0])}


def files(state):
    return sorted(os.listdir(os.path.join(state, "adapters")))


def test_adapter_offline_add_is_what_the_server_serves():
    state, other = path("served"), path("served-other")
    report, said = add(state, "kjv", source("kjv-all-r4"))
    assert report["applied"] == report["possible"] == 800 and report["version"] == 1, report
    assert "applied to 800 of 800 matrices, rank 4, %d bytes" % report["bytes"] in said, said
    add(state, "mine", source("man-it-attn-r8"), "--owner", "acme")
    assert files(state) == ["kjv.adapter", "mine@acme.adapter"]
    with Server(state, TENANTS) as server, server.peer("key-acme") as peer:
        remote = {a["name"]: a for a in peer.call("adapters.list")}
        assert {name: a["own"] for name, a in remote.items()} == {"kjv": False, "mine": True}, remote
        assert remote["kjv"]["digest"] == report["digest"]
        offline = peer.generate("And it came to pass", model="kjv", **GREEDY)["text"]
        # one writer: the tool refuses what a server would not hear of, and still reads
        for words in (["add", "x", source("kjv-all-r4")], ["rm", "kjv"], ["gc"]):
            refused(state, *words, says=[state, "--connect"], model=words[0] == "add")
        assert set(listed(state)) == {("kjv", ""), ("mine", "acme")}
        assert done(state, "verify")[0].endswith("2 verified, 0 bad\n")
    with Server(other, TENANTS, "--lora-modules", "kjv=" + source("kjv-all-r4")) as server, server.peer("key-acme") as peer:
        assert peer.generate("And it came to pass", model="kjv", **GREEDY)["text"] == offline
    return "digest %s..." % report["digest"][:12]


def test_adapter_offline_list_and_show():
    state = path("list")
    assert json.loads(done(state, "list")[0]) == [], "a state directory that is not there has none"
    assert not os.path.exists(state)
    report, _ = add(state, "one", source("gcide-attn-r16"))
    add(state, "two", source("man-it-attn-r8"), "--owner", "acme")
    shown = json.loads(done(state, "show", "one")[0])
    assert shown == listed(state)[("one", "")]
    assert (shown["rank_max"], shown["version"], shown["dtype"], shown["digest"]) == (16, 1, "bfloat16", report["digest"])
    assert shown["file_bytes"] == os.path.getsize(os.path.join(state, "adapters/one.adapter"))
    assert json.loads(done(state, "list", "--owner", "acme")[0])[0]["name"] == "two"
    refused(state, "show", "three", says="three")
    refused(state, "show", "one", "--owner", "acme", says="one")
    code, out, err = run("adapter", "list", "--offline", env={"HOME": FOLDER.name})
    assert code == 0 and json.loads(out) == [], (out, err)


def test_adapter_offline_versions():
    state = path("versions")
    first, _ = add(state, "one", source("man-it-attn-r8"))
    again, said = add(state, "one", source("man-it-attn-r8"))
    assert again == first and "already" in said, (again, said)
    second, _ = add(state, "one", source("man-pl-attn-r16"))
    third, _ = add(state, "one", source("man-it-attn-r8"))
    assert (second["version"], third["version"]) == (2, 3) and third["digest"] == first["digest"] != second["digest"]
    assert files(state) == ["one.adapter"]
    f32 = json.loads(done(state, "add", "one", source("man-it-attn-r8"), "--dtype", "float32", model=True)[0])["report"]
    assert f32["version"] == 4 and f32["digest"] != first["digest"]
    # a name has one owner, whose it stays
    refused(state, "add", "one", source("man-it-attn-r8"), "--owner", "acme", model=True, says=["operator", "remove it"])
    add(state, "two", source("man-it-attn-r8"), "--owner", "acme")
    assert add(state, "two", source("man-pl-attn-r16"))[0]["version"] == 2
    refused(state, "add", "two", source("man-it-attn-r8"), "--owner", "bolt", model=True, says="tenant acme")
    assert files(state) == ["one.adapter", "two@acme.adapter"]


def test_adapter_offline_verify():
    state = path("verify")
    for name, directory in [("a", "man-it-attn-r8"), ("b", "man-pl-attn-r16"), ("c", "gcide-attn-r16")]:
        add(state, name, source(directory))
    assert done(state, "verify")[0].count("good") == 3
    assert done(state, "verify", model=True)[0].endswith("3 verified, 0 bad\n")
    for at, says in [(5, "not an adapter store"), (700, "header of"), (-5, "pages of")]:
        file = os.path.join(state, "adapters/b.adapter")
        shutil.copy(file, path("kept"))
        with open(file, "r+b") as out:
            out.seek(at, os.SEEK_END if at < 0 else os.SEEK_SET)
            byte = out.read(1)[0] ^ 1
            out.seek(at, os.SEEK_END if at < 0 else os.SEEK_SET)
            out.write(bytes([byte]))
        for model in (False, True):
            code, out, _ = tool(state, "verify", model=model)
            assert code == 1 and out.endswith("3 verified, 1 bad\n"), out
            lines = dict(line.split(": ", 1) for line in out.split("\n")[:3])
            assert says in lines["b"] and lines["a"].startswith("good") and lines["c"].startswith("good"), lines
        assert tool(state, "verify", "a", "c")[0] == 0 and tool(state, "verify", "b")[0] == 1
        if at != -5:
            assert "damaged" in json.loads(done(state, "show", "b")[0])
        shutil.copy(path("kept"), file)
    os.truncate(os.path.join(state, "adapters/b.adapter"), 40000)
    assert "40000 bytes" in tool(state, "verify", "b")[1]
    assert add(state, "b", source("man-pl-attn-r16"))[0]["version"] == 1, "what cannot be read has no version"
    code, out, err = tool(state, "verify", "a", "nobody")
    assert code == 1 and "nobody" in err and "a: good" in out
    code, _, _ = run("synth", "--out", path("base"), "--shape", "tiny", "--model", MODEL, "--set", "vocab=8192")
    code, out, err = run("adapter", "verify", "--state-dir", state, "--model", path("base"))
    assert code == 1 and out.count("another base model") == 3, (out, err)
    code, out, err = run("adapter", "verify", "--state-dir", state, "--model", MODEL, "--page-bytes", "64K")
    assert code == 1 and out.count("convert the adapter again") == 3, (out, err)


def test_adapter_offline_rm_and_gc():
    state = path("rm")
    refused(state, "gc", says="rm")
    assert not os.path.exists(state)
    add(state, "one", source("man-it-attn-r8"))
    add(state, "two", source("man-it-attn-r8"), "--owner", "acme")
    refused(state, "rm", "nobody", says="nobody")
    refused(state, "rm", "two", "--owner", "bolt", says="two")
    assert "tenant acme" in done(state, "rm", "two")[0]
    refused(state, "rm", "two", says="two")
    living = subprocess.Popen(["sleep", "100"])
    try:
        leftovers = {"adapters/one.adapter.aB3xYz.part": 1000, "adapters/x-0123456789abcdef.adapter.new": 70,
                     "adapters/x-99999999.adapter.new": 5, "experts-00-bf16-32k.store.99999999.tmp": 300}
        kept = ["adapters/x-%d.adapter.new" % living.pid, "adapters/x-%d.adapter.new.aB3xYz.part" % living.pid,
                "experts-00-bf16-32k.store.%d.tmp" % living.pid, "experts-00-bf16-32k.store"]
        unknown = ["adapters/README", "adapters/.one.adapter", "adapters/one@.adapter"]
        for name in list(leftovers) + kept + unknown:
            with open(os.path.join(state, name), "wb") as out:
                out.write(bytes(leftovers.get(name, 1)))
        os.mkdir(os.path.join(state, "adapters/folder.part"))
        out, _ = done(state, "gc")
        for name, size in leftovers.items():
            assert "removed %s, %d bytes\n" % (name, size) in out and not os.path.exists(os.path.join(state, name)), out
        for name in unknown:
            assert "left alone %s" % name in out, out
        assert all(os.path.exists(os.path.join(state, name)) for name in kept + unknown)
        assert out.endswith("4 files removed, 1375 bytes; 4 that are no adapters left alone\n"), out
    finally:
        living.kill()
        living.wait()
    assert done(state, "gc")[0].endswith("3 files removed, 3 bytes; 4 that are no adapters left alone\n")
    assert "good" in done(state, "verify", "one")[0]


def test_adapter_offline_refusals():
    state = path("refusals")
    for name in ("", ".x", "a/b", "../x", "x" * 64, "a@b", "a b"):
        refused(state, "add", name, source("man-it-attn-r8"), model=True, says="not an adapter name")
    refused(state, "add", "x", source("man-it-attn-r8"), "--owner", "../x", model=True, says="--owner")
    refused(state, "add", "x", path("nowhere"), model=True, says="nowhere")
    refused(state, "add", "x", source("man-it-attn-r8"), says="--model")
    broken = path("broken")
    shutil.copytree(source("man-it-attn-r8"), broken)
    os.truncate(os.path.join(broken, "adapter_model.safetensors"), 5000)
    refused(state, "add", "x", broken, model=True, says="adapter_model.safetensors")
    os.remove(os.path.join(broken, "adapter_model.safetensors"))
    os.symlink(os.path.join(source("man-it-attn-r8"), "adapter_model.safetensors"),
               os.path.join(broken, "adapter_model.safetensors"))
    refused(state, "add", "x", broken, model=True, says="adapter_model.safetensors")
    assert files(state) == []
    for words in (["verify"], ["gc"]):
        code, _, err = run("adapter", *words)
        assert code == 2 and "--state-dir" in err, err
    for words in (["add", "x"], ["rm"], ["show"], ["list", "x"], ["nonsense"], ["gc", "x"]):
        code, _, err = tool(state, *words)
        assert code == 2 and "usage" in err, (words, err)
    # --connect goes to the server, whatever a shared configuration names
    code, _, err = run("adapter", "list", "--connect", "unix:" + path("no-socket"), "--state-dir", state)
    assert code == 1 and "no-socket" in err, err


if __name__ == "__main__":
    code = main([value for name, value in list(globals().items()) if name.startswith("test_")])
    FOLDER.cleanup()
    sys.exit(code)
