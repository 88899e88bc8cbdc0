# SPDX-License-Identifier: Apache-2.0
"""kill -9 at every file operation of a registration, offline and in a server: the state directory is the old or the
new one, whole, and what is left over goes with `polder adapter gc` or the next start. The binary is the product on
files that kill it (tests/dying_files.c)."""
import hashlib
import json
import os
import shutil
import sys
import tempfile

from e2e_lib import ADAPTERS, MODEL, ROOT, RpcError, Server, key_hash, main, run

DYING = os.path.abspath(os.environ.get("POLDER_DYING", os.path.join(ROOT, "build/tests/polder_dying")))
FOLDER = tempfile.TemporaryDirectory(prefix="polder-kill-")
# "old" below: what was registered before; "new": what is registered when nothing dies.
OLD, NEW = (os.path.join(ADAPTERS, name) for name in ("man-it-attn-r8", "man-pl-attn-r16"))
OPERATIONS_MAX = 500
TENANTS = "tenants:\n  - name: acme\n    keys_blake2b: [%s]\n    allowed_adapters: [\"*\"]\n    manage_adapters: true\n" % (
    key_hash("key-acme"))


def path(name):
    return os.path.join(FOLDER.name, name)


def tool(state, *words, binary=None):
    more = {"binary": binary, "env": {"DYING_FILE": path("n")}} if binary else {}
    return run("adapter", *words, "--state-dir", state, *(["--model", MODEL] if words[0] == "add" else []), **more)


def write(name, text):
    with open(path(name), "w") as file:
        file.write(text)


def registered(state):
    """name -> (version, digest); every one of them whole."""
    code, out, err = tool(state, "list")
    assert code == 0, err
    listed = json.loads(out)
    assert not any("damaged" in a for a in listed), listed
    code, out, err = tool(state, "verify")
    assert code == 0 and out.endswith("%d verified, 0 bad\n" % len(listed)), (out, err)
    return {a["name"]: (a["version"], a["digest"]) for a in listed}


def tidy(state):
    code, out, err = tool(state, "gc")
    if not os.path.exists(os.path.join(state, "adapters")):
        return 0  # it died before there was anything
    assert code == 0 and "left alone" not in out, (out, err)
    names = os.listdir(os.path.join(state, "adapters"))
    assert all(name.endswith(".adapter") for name in names), names
    return out.count("removed ")


def at_every_operation(begin, words):
    """Runs the tool on copies of `begin` with a death at operation 1, 2, ... until it lives to its end. Returns what was
    seen: operations by name, states, leftovers."""
    died, states, leftovers = [], [], 0
    old = registered(begin) if os.path.exists(begin) else {}
    for n in range(1, OPERATIONS_MAX):
        state = path("state")
        shutil.rmtree(state, ignore_errors=True)
        if os.path.exists(begin):
            shutil.copytree(begin, state)
        write("n", str(n))
        code, out, err = tool(state, *words, binary=DYING)
        now = registered(state)
        states.append(now)
        if code == 0:
            break
        assert code == -9 and "dies at %d: " % n in err, (n, code, out, err)
        died.append(err.split("dies at %d: " % n)[1].split()[0])
        leftovers += tidy(state)
        assert registered(state) == now, "gc changed what is registered"
        # the interrupted work can simply be done again
        code, _, err = tool(state, *words)
        assert code == 0 or (words[0] == "rm" and now != old), (n, err)
        again = registered(state)
    else:
        raise AssertionError("it never came to its end")
    new = states[-1]
    assert new != old and again == new, (old, new, again)
    assert all(state in (old, new) for state in states), states
    turn = states.index(new)
    assert states[:turn] == [old] * turn and states[turn:] == [new] * (len(states) - turn), "old, then new, and no way back"
    return died, turn, leftovers


def said(died, turn, leftovers):
    return "%d deaths, new from operation %d on; %d files left over; %s" % (
        len(died), turn, leftovers, ", ".join("%d %s" % (died.count(name), name) for name in sorted(set(died))))


def test_kill_add():
    died, turn, leftovers = at_every_operation(path("nothing"), ["add", "one", NEW])
    assert {"mkdir", "open", "flock", "mkostemps", "pwrite", "fsync", "rename"} <= set(died), died
    assert died[turn - 1] == "rename" and leftovers, (died, turn, leftovers)
    return said(died, turn, leftovers)


def test_kill_add_again():
    begin = path("begin-again")
    assert tool(begin, "add", "one", OLD)[0] == tool(begin, "add", "two", OLD)[0] == 0
    died, turn, leftovers = at_every_operation(begin, ["add", "one", NEW])
    assert died[turn - 1] == "rename" and died[turn:] and leftovers, (died, turn, leftovers)
    return said(died, turn, leftovers)


def test_kill_rm():
    begin = path("begin-rm")
    assert tool(begin, "add", "one", OLD)[0] == tool(begin, "add", "two", OLD)[0] == 0
    died, turn, leftovers = at_every_operation(begin, ["rm", "one"])
    assert died[turn - 1] == "unlink" and "fsync" in died[turn:], (died, turn)
    return said(died, turn, leftovers)


def test_kill_gc():
    begin = path("begin-gc")
    assert tool(begin, "add", "one", OLD)[0] == 0
    for name in ("one.adapter.abcdef.part", "one-0123456789abcdef.adapter.new"):
        shutil.copy(os.path.join(begin, "adapters/one.adapter"), os.path.join(begin, "adapters", name))
    old = registered(begin)
    for n in range(1, OPERATIONS_MAX):
        state = path("state")
        shutil.rmtree(state, ignore_errors=True)
        shutil.copytree(begin, state)
        write("n", str(n))
        code, _, err = tool(state, "gc", binary=DYING)
        assert registered(state) == old and code in (0, -9), err
        tidy(state)
        if code == 0:
            return "%d deaths" % (n - 1)
    raise AssertionError("it never came to its end")


# ---- the same in a server ----

def server_at_every_operation(begin, act):
    """The server dies while it answers; the next one on the same state directory has the old or the new."""
    state, states, died = path("server-state"), [], []

    def listed(server):
        with server.peer("key-acme") as peer:
            return {a["name"]: (a["version"], a["digest"]) for a in peer.call("adapters.list")}
    for n in range(1, OPERATIONS_MAX):
        shutil.rmtree(state, ignore_errors=True)
        shutil.copytree(begin, state)
        armed = path("armed")
        if os.path.exists(armed):
            os.remove(armed)
        options = ["--adapter-dir", ADAPTERS, "--max-upload-bytes", "1M"]
        server = Server(state, TENANTS, *options, binary=DYING, env={"DYING_FILE": armed})
        old = listed(server)
        answered = False
        with server.peer("key-acme") as peer:
            write("armed.part", str(n))
            os.rename(path("armed.part"), armed)
            try:
                act(peer)
                answered = True
            except (EOFError, OSError):
                pass
            except RpcError as error:
                raise AssertionError(error)
        server.kill()
        died += [line.split(": ")[1] for line in server.log_text().split("\n") if line.startswith("dies at")]
        server.folder.cleanup()
        with Server(state, TENANTS, *options) as again:
            states.append(listed(again))
            left = [name for name in os.listdir(os.path.join(state, "adapters")) if not name.endswith(".adapter")]
            assert not left, left
            uploads = os.path.join(state, "uploads")
            assert not os.path.exists(uploads) or os.listdir(uploads) == [], os.listdir(uploads)
        assert registered(state) == states[-1]
        if answered:
            break
    new = states[-1]
    assert new != old and all(state in (old, new) for state in states), states
    turn = states.index(new)
    assert states[turn:] == [new] * (len(states) - turn)
    return died, turn, 0


def add_by_path(peer):
    peer.call("adapters.register", name="one", path="man-it-attn-r8")


def add_by_upload(peer):
    files = []
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        with open(os.path.join(OLD, name), "rb") as file:
            files.append(file.read())
    digest = hashlib.blake2b(b"".join(len(data).to_bytes(8, "little") + data for data in files), digest_size=32)
    begun = peer.call("adapters.upload", name="one", config_bytes=len(files[0]), weights_bytes=len(files[1]),
                      digest=digest.hexdigest())
    data, at = b"".join(files), 0
    while at < len(data):
        at = peer.call("adapters.upload_chunk", upload=begun["upload"], offset=at, data=data[at:at + 100000])["received"]
    peer.call("adapters.upload_commit", upload=begun["upload"])


def test_kill_server_upload():
    begin = path("server-begin-upload")
    with Server(begin, TENANTS):
        pass
    died, turn, leftovers = server_at_every_operation(begin, add_by_upload)
    assert {"mkdir", "write", "mkostemps", "pwrite", "fsync", "rename", "unlinkat"} <= set(died), died
    return said(died, turn, leftovers)


def test_kill_server_add():
    begin = path("server-begin")
    with Server(begin, TENANTS):
        pass
    died, turn, leftovers = server_at_every_operation(begin, add_by_path)
    assert {"mkostemps", "pwrite", "fsync", "rename"} <= set(died), died
    return said(died, turn, leftovers)


def test_kill_server_add_again():
    begin = path("server-begin-again")
    with Server(begin, TENANTS, "--adapter-dir", ADAPTERS) as server, server.peer("key-acme") as peer:
        peer.call("adapters.register", name="one", path="man-pl-attn-r16")
    died, turn, leftovers = server_at_every_operation(begin, add_by_path)
    assert {"mkostemps", "pwrite", "fsync", "rename"} <= set(died), died
    return said(died, turn, leftovers)


def test_kill_server_remove():
    begin = path("server-begin-rm")
    with Server(begin, TENANTS, "--adapter-dir", ADAPTERS) as server, server.peer("key-acme") as peer:
        peer.call("adapters.register", name="one", path="man-it-attn-r8")
    died, turn, leftovers = server_at_every_operation(begin, lambda peer: peer.call("adapters.remove", name="one"))
    assert "unlink" in died, died
    return said(died, turn, leftovers)


if __name__ == "__main__":
    code = main([value for name, value in list(globals().items()) if name.startswith("test_")])
    FOLDER.cleanup()
    sys.exit(code)
