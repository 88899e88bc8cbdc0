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
    assert report["applied"] == 800 and report["possible"] == 802 and report["version"] == 1, report
    assert "applied to 800 of 802 matrices, rank 4, %d bytes" % report["bytes"] in said, said
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
        os.makedirs(os.path.join(state, "uploads/0123456789abcdef"))
        os.makedirs(path("elsewhere"))
        os.symlink(path("elsewhere"), os.path.join(state, "uploads/link"))
        for name in ("uploads/0123456789abcdef/adapter_config.json", path("elsewhere/kept")):
            with open(os.path.join(state, name), "wb") as out:
                out.write(bytes(25))
        leftovers["uploads/0123456789abcdef/adapter_config.json"] = 25
        out, _ = done(state, "gc")
        for name, size in leftovers.items():
            assert "removed %s, %d bytes\n" % (name, size) in out and not os.path.exists(os.path.join(state, name)), out
        for name in unknown:
            assert "left alone %s" % name in out, out
        assert all(os.path.exists(os.path.join(state, name)) for name in kept + unknown + [path("elsewhere/kept")])
        assert os.listdir(os.path.join(state, "uploads")) == ["link"]
        assert out.endswith("5 files removed, 1400 bytes; 4 that are no adapters left alone\n"), out
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


def test_adapter_pin_leaves_room_for_a_context():
    """In a pool that holds one context, one token's experts and little more, pinning ends where the next request of the
    whole context would not fit; it runs beside what is pinned."""
    state, refusal = path("pin"), None
    for i in range(12):
        add(state, "a%02d" % i, source("man-pl-attn-r16"))
    tenants = TENANTS + "    pinned_adapter_bytes: 1000000000\n    see_tenants: true\n"
    with Server(state, tenants, "--pool-bytes", "4M", "--max-model-len", "512") as server, server.peer("key-acme") as peer:
        alone = peer.generate("word " * 200, **GREEDY)["text"]
        pinned = 0
        for i in range(12):
            try:
                peer.call("adapters.pin", name="a%02d" % i)
                pinned += 1
            except Exception as error:
                refusal = refusal or error
                assert error.code == "resource_exhausted" and "pool" in error.message, error
        assert 0 < pinned < 12, pinned
        assert peer.generate("word " * 200, **GREEDY)["text"] == alone
        ids = peer.call("tokenize", text="word " * 400)["tokens"][:480]
        assert len(peer.generate(ids, temperature=0, ignore_eos=True, max_tokens=512 - len(ids))["tokens"]) == 512 - len(ids)
        # one with a pinned adapter needs no more than one without: its pages are counted once
        answer = peer.generate(ids, model="a00", temperature=0, ignore_eos=True, max_tokens=512 - len(ids))
        assert len(answer["tokens"]) == 512 - len(ids)
        listed = [a for a in peer.call("adapters.list") if a["pinned"]]
        assert len(listed) == pinned and all(a["resident"] for a in listed), listed
        for a in listed:
            peer.call("adapters.unpin", name=a["name"])
        assert peer.generate("word " * 200, model="a11", **GREEDY)["text"]
    return "%d of 12: %s" % (pinned, refusal.message)


def test_adapter_load_that_never_fits():
    """28 pages in a pool of 32, of which one token's experts need more than four: later is no better. A smaller one comes."""
    state = path("never")
    add(state, "large", source("man-ru-attn-r32"))
    add(state, "small", source("man-it-attn-r8"))
    with Server(state, TENANTS, "--pool-bytes", "1M", "--max-model-len", "16") as server, server.peer("key-acme") as peer:
        error = peer.refused("adapters.load", name="large")
        assert error["code"] == "resource_exhausted" and "28 pages never fit: the pool has 32" in error["message"], error
        assert peer.refused("generate", prompt="a", max_tokens=1, model="large")["code"] == "resource_exhausted"
        peer.call("adapters.load", name="small")
    return error["message"]


def test_adapter_bytes_of_a_tenant():
    """458752 bytes of pl and 262144 of it: both do not fit a million with a second pl; a new version takes the old one's place."""
    state = path("quota")
    add(state, "operators", source("kjv-all-r4"))  # the operator's does not count
    tenants = TENANTS + "    adapter_bytes: 1000000\n"
    with Server(state, tenants, "--adapter-dir", ADAPTERS) as server, server.peer("key-acme") as peer:
        sizes = {name: peer.call("adapters.register", name=name, path=directory)["report"]["bytes"]
                 for name, directory in (("pl", "man-pl-attn-r16"), ("it", "man-it-attn-r8"))}
        error = peer.refused("adapters.register", name="more", path="man-pl-attn-r16")
        assert error["code"] == "resource_exhausted" and "adapter_bytes" in error["message"], error
        assert str(sum(sizes.values())) in error["message"], (sizes, error)
        assert peer.call("adapters.register", name="it", path="man-pl-attn-r16")["report"]["version"] == 2
        assert peer.refused("adapters.register", name="it", path="kjv-all-r4")["code"] == "resource_exhausted"
        assert {a["name"]: a["version"] for a in peer.call("adapters.list")} == {"operators": 1, "pl": 1, "it": 2}
        peer.call("adapters.remove", name="pl")
        peer.call("adapters.register", name="more", path="man-it-attn-r8")
    assert files(state) == ["it@acme.adapter", "more@acme.adapter", "operators.adapter"]
    return error["message"]


def test_a_tenant_leaves_places_to_others():
    """Where two may register, neither takes more than half of the places; who is alone may take all."""
    two = TENANTS + TENANTS.split("\n", 1)[1].replace("acme", "bolt").replace(key_hash("key-acme"), key_hash("key-bolt"))
    for tenants, may in ((TENANTS, 3), (two, 2)):
        state = path("places-%d" % may)
        with Server(state, tenants, "--adapter-dir", ADAPTERS, "--max-adapters", "3") as server, \
                server.peer("key-acme") as peer:
            for i in range(may):
                peer.call("adapters.register", name="a%d" % i, path="man-it-attn-r8")
            error = peer.refused("adapters.register", name="more", path="man-it-attn-r8")
            assert error["code"] == "resource_exhausted" and ("half of" in error["message"]) == (may == 2), error
            if may == 2:
                peer.call("adapters.register", name="a0", path="man-pl-attn-r16")  # the next version of what it has
                with server.peer("key-bolt") as other:
                    other.call("adapters.register", name="b0", path="man-it-attn-r8")
    return error["message"]


def test_store_files_that_are_no_good():
    """Cut short, with a damaged header, empty: the server starts, serves the others, and says what is wrong to the owner."""
    state = path("no-good")
    for name in ("good", "cut", "header", "empty"):
        add(state, name, source("man-it-attn-r8"), "--owner", "acme")
    add(state, "operators", source("man-it-attn-r8"))
    store = {name: os.path.join(state, "adapters", name) for name in files(state)}
    os.truncate(store["cut@acme.adapter"], os.path.getsize(store["cut@acme.adapter"]) - 1)
    os.truncate(store["empty@acme.adapter"], 0)
    os.truncate(store["operators.adapter"], 100)
    with open(store["header@acme.adapter"], "r+b") as file:
        file.seek(900)
        byte = file.read(1)
        file.seek(900)
        file.write(bytes([byte[0] ^ 1]))
    tenants = TENANTS + "  - name: bolt\n    keys_blake2b: [%s]\n    allowed_adapters: [\"*\"]\n" % key_hash("key-bolt")
    with Server(state, tenants, "--adapter-dir", ADAPTERS) as server:
        with server.peer("key-acme") as peer, server.peer("key-bolt") as other:
            expected = peer.generate("a b c", model="good", **GREEDY)["text"]
            broken = {a["name"]: a["broken"] for a in peer.call("adapters.list") if "broken" in a}
            assert set(broken) == {"cut", "header", "empty", "operators"}, broken
            assert "is damaged" in broken["header"] and "too short" in broken["empty"], broken
            assert "which is not what it says" in broken["cut"], broken
            for name in broken:
                error = peer.refused("generate", prompt="a", model=name)
                assert error["code"] == "corrupt" and "Register it anew" in error["message"], error
            assert {a["name"] for a in other.call("adapters.list")} == {"operators"}
            assert other.refused("generate", prompt="a", model="cut")["code"] == "not_found"
            assert other.refused("generate", prompt="a", model="operators")["code"] == "corrupt"
            assert peer.call("adapters.register", name="cut", path="man-it-attn-r8")["report"]["version"] == 1
            assert peer.generate("a b c", model="cut", **GREEDY)["text"] == expected
            peer.call("adapters.remove", name="empty")
            assert "empty@acme.adapter" not in files(state)
    with Server(state, tenants) as server, server.peer("key-acme") as peer:
        assert {a["name"]: "broken" in a for a in peer.call("adapters.list")} == {
            "good": False, "cut": False, "header": True, "operators": True}
        assert peer.generate("a b c", model="cut", **GREEDY)["text"] == expected
    return broken["cut"]


def test_pins_of_several_tenants():
    """Each has a claim of its own on the operator's adapter: unpinning takes nothing from the other, and neither reads
    of the other's claim or use; the operator's own tenant does."""
    state = path("claims")
    add(state, "shared", source("man-it-attn-r8"))
    quota = "    pinned_adapter_bytes: 1000000\n"
    tenants = TENANTS + quota + TENANTS.replace("tenants:\n", "").replace("acme", "bolt").replace(
        key_hash("key-acme"), key_hash("key-bolt")) + quota + TENANTS.replace("tenants:\n", "").replace(
        "acme", "watch").replace(key_hash("key-acme"), key_hash("key-watch")) + "    see_tenants: true\n"
    with Server(state, tenants) as server, server.peer("key-acme") as one, server.peer("key-bolt") as two, \
            server.peer("key-watch") as watch:
        def listed(peer):
            return peer.call("adapters.list")[0]

        def pinned(peer):
            stats = peer.call("adapters.stats")
            return listed(peer)["pinned"], stats["pinned"], stats["pinned_bytes"] > 0
        both, neither = (True, 1, True), (False, 0, False)
        one.call("adapters.pin", name="shared")
        assert (pinned(one), pinned(two), pinned(watch)) == (both, neither, (True, 1, False))
        two.call("adapters.pin", name="shared")
        one.call("adapters.unpin", name="shared")
        one.call("adapters.unpin", name="shared")  # no claim is left to take back
        assert (pinned(one), pinned(two), pinned(watch)) == (neither, both, (True, 1, False))
        assert one.refused("adapters.unload", name="shared")["code"] == "busy"
        two.call("adapters.unpin", name="shared")
        assert (pinned(one), pinned(two), pinned(watch)) == (neither, neither, neither)
        # what others use of it is theirs
        before, asked = listed(one), watch.call("adapters.stats")
        two.generate("a b c", model="shared", **GREEDY)
        assert listed(one) == before, (listed(one), before)
        assert set(before) == {"name", "own", "pinned", "pages", "file_bytes", "rank_min", "rank_max", "bytes", "applied",
                               "possible", "layout", "version", "digest", "source"}, before
        sums = one.call("adapters.stats")
        assert not any(sums[key] for key in ("resident", "users", "device_bytes", "host_bytes", "hits", "misses", "loads",
                                             "load_us")), sums
        used = watch.call("adapters.stats")
        assert used["hits"] + used["misses"] == asked["hits"] + asked["misses"] + 1 and used["device_bytes"] > 0, used
        assert (listed(watch)["resident"], listed(watch)["device_bytes"]) == (True, used["device_bytes"])
        # the CLI shows what there is to see
        code, out, err = run("adapter", "list", "--connect", "unix:" + server.unix, env={"POLDER_API_KEY": "key-acme"})
        assert code == 0 and json.loads(out) == [before], (out, err)


# ---- manifests ----

def manifest(name, entries):
    """entries: (name, directory) or (name, directory, owner)."""
    lines = ["adapters:"]
    for entry in entries:
        lines += ["  - name: " + entry[0], "    path: " + entry[1]] + ["    owner: " + owner for owner in entry[2:]]
    with open(path(name), "w") as file:
        file.write("\n".join(lines) + "\n")
    return path(name)


def test_adapter_manifest_hundreds_resumable():
    state, directories = path("many"), ["man-it-attn-r8", "man-pl-attn-r16", "gcide-attn-r16"]
    for directory in directories:
        shutil.copytree(source(directory), path("src/" + directory))
    file = manifest("many.yaml", [("a-%03d" % i, "src/" + directories[i % 3]) for i in range(300)])
    words = [POLDER, "adapter", "add", "--manifest", file, "--state-dir", state, "--model", MODEL]
    half = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment())
    for _ in range(150):
        half.stderr.readline()
    half.kill()
    half.wait()
    half.stderr.close()
    before = len([name for name in files(state) if name.endswith(".adapter")])
    assert 150 <= before < 300, before
    out, err = done(state, "add", "--manifest", file, model=True)
    registered = 300 - before
    assert out == "300 listed: %d registered, %d unchanged, 0 failed, 0 not tried\n" % (registered, before), out
    lines = err.strip().split("\n")
    assert len(lines) == 300 and lines[0] == "[1/300] a-000: registered with this content already, version 1", lines[0]
    assert lines[299].startswith("[300/300] a-299: applied to 32 of 802 matrices, rank 16, "), lines[299]
    out, _ = done(state, "add", "--manifest", file, model=True)
    assert "0 registered, 300 unchanged" in out
    done(state, "gc")
    assert len(files(state)) == 300 and done(state, "verify")[0].endswith("300 verified, 0 bad\n")
    # one source changes: its adapters alone get a new version
    shutil.rmtree(path("src/gcide-attn-r16"))
    shutil.copytree(source("gcide-fused-r4"), path("src/gcide-attn-r16"))
    assert "100 registered, 200 unchanged" in done(state, "add", "--manifest", file, model=True)[0]
    assert sorted({(a["version"], a["rank_max"]) for a in listed(state).values()}) == [(1, 8), (1, 16), (2, 4)]
    return "killed after %d" % before


def test_adapter_manifest_failures_at_the_end():
    state = path("some")
    good, broken = source("man-it-attn-r8"), path("some-broken")
    shutil.copytree(good, broken)
    os.truncate(os.path.join(broken, "adapter_model.safetensors"), 5000)
    add(state, "taken", good, "--owner", "bolt")
    file = manifest("some.yaml", [("one", good), ("two", broken), ("three", path("nowhere")), ("taken", good, "acme"),
                                  ("four", good, "acme")])
    code, out, err = tool(state, "add", "--manifest", file, model=True)
    assert code == 1 and out.startswith("5 listed: 2 registered, 0 unchanged, 3 failed, 0 not tried\n"), (out, err)
    failures = out.strip().split("\n")[1:]
    assert [line.split(":")[1].strip() for line in failures] == ["two (line 4)", "three (line 6)", "taken (line 8)"], out
    assert "adapter_model.safetensors" in failures[0] and "nowhere" in failures[1] and "tenant bolt" in failures[2], out
    assert files(state) == ["four@acme.adapter", "one.adapter", "taken@bolt.adapter"]


def test_adapter_manifest_refused_whole():
    state = path("refused")
    good = source("man-it-attn-r8")
    cases = [("adapters:\n  - name: a\n    path: %s\n  - name: a\n    path: %s\n" % (good, good), [":4:", "line 2"]),
             ("adapters:\n  - name: a\n    path: %s\n  - name: ../b\n    path: x\n" % good, [":4:", "../b"]),
             ("adapters:\n  - name: a\n    path: %s\n  - name: b\n" % good, [":4:", "name and path"]),
             ("adapters:\n  - name: a\n    path: %s\n    rank: 3\n" % good, [":4:", "rank"]),
             ("adapters:\n  - name: a\n    path: %s\n    owner: a/b\n" % good, ["a/b"]),
             ("adapters: a\n", [":1:", "adapters"]), ("other: []\n", ["other"]), ("", ["adapters:"]), ("- a\n", [":1:"])]
    for text, says in cases:
        with open(path("bad.yaml"), "w") as file:
            file.write(text)
        refused(state, "add", "--manifest", path("bad.yaml"), model=True, says=["bad.yaml"] + says)
    assert files(state) == []
    refused(state, "add", "--manifest", path("nowhere.yaml"), model=True, says="nowhere.yaml")
    for words in (["add", "x", good], ["add", "x"], ["list"]):
        code, _, err = tool(state, *words, "--manifest", path("many.yaml"), model=True)
        assert code == 2 and "usage" in err, (words, err)


if __name__ == "__main__":
    code = main([value for name, value in list(globals().items()) if name.startswith("test_")])
    FOLDER.cleanup()
    sys.exit(code)
