# SPDX-License-Identifier: Apache-2.0
"""A device that fails under `polder serve`. The binary is the product's objects on the CPU device with faults
(tests/faulty_device.c), which tells the moment at which the engine learns of one. Required: every accepted request,
running, paused or queued, gets exactly one final answer, device_error, within a second; then the connections end and
the process exits with 3 and a sentence. Each test starts a server of its own."""
import os
import re
import sys
import tempfile
import threading
import time

import msgpack

from e2e_lib import FAULTY, MODEL, Peer, Server, WAIT, key_hash, main, run, until

FOLDER = tempfile.TemporaryDirectory(prefix="polder-fault-")
STATE = os.path.join(FOLDER.name, "state")
DEVICE_EXIT = 3
FLUSH_SECONDS = 1.0
TENANT = "  - name: %s\n    keys_blake2b: [%s]\n    priority_class: %s\n"
TENANTS = "tenants:\n" + TENANT % ("alpha", key_hash("key-alpha"), "interactive") + "    manage_adapters: true\n    see_tenants: true\n    adapter_rpm_limit: 0\n" + \
    TENANT % ("gamma", key_hash("key-gamma"), "batch")
STREAM = {"stream": True, "temperature": 0, "ignore_eos": True}
SEQUENCES = 6  # --max-num-seqs


class Listener:
    """Keeps every message of a peer's connection with its time, to the end of the connection."""

    def __init__(self, peer):
        self.peer, self.messages, self.end = peer, [], None
        self.thread = threading.Thread(target=self.listen)
        self.thread.start()

    def listen(self):
        try:
            while True:
                data = self.peer.sock.recv(1 << 16)
                if not data:
                    self.end = "closed"
                    return
                self.peer.unpacker.feed(data)
                for message in self.peer.unpacker:
                    self.messages.append((time.monotonic(), message))
        except Exception as error:
            self.end = repr(error)

    def pieces(self):
        return {message[2][0]["id"] for _, message in list(self.messages) if message[0] == 2 and message[1] == "token"}

    def finals(self, msgid):
        return [(at, message[2], message[3]) for at, message in self.messages if message[0] == 1 and message[1] == msgid]


class Scene:
    """A faulty server, listeners on it, and what they asked."""

    def __init__(self, kind, after, *options, slow=0):
        self.trigger = os.path.join(FOLDER.name, "trigger")
        for name in (self.trigger, self.trigger + ".at"):
            if os.path.exists(name):
                os.unlink(name)
        env = {"FAULTY_KIND": kind, "FAULTY_AFTER": str(after), "FAULTY_FILE": self.trigger,
               "FAULTY_SLOW": str(slow)}
        self.server = Server(STATE, TENANTS, "--max-num-seqs", SEQUENCES, *options, binary=FAULTY, env=env)
        self.operator = self.server.peer("key-alpha")
        self.listeners, self.asked = [], []

    def ask(self, key, prompts, tcp=False, **params):
        """All prompts in one write on a connection of their own."""
        peer = self.server.peer(key, tcp=tcp)
        first, data = peer.msgid + 1, b""
        for prompt in prompts:
            peer.msgid += 1
            data += msgpack.packb([0, peer.msgid, "generate", [dict(STREAM, prompt=prompt, **params)]])
        listener = Listener(peer)
        self.listeners.append(listener)
        self.asked += [(listener, msgid) for msgid in range(first, peer.msgid + 1)]
        peer.sock.sendall(data)
        return listener, range(first, peer.msgid + 1)

    def engine(self):
        return self.operator.call("stats")["engine"]

    def until_engine(self, what):
        def check():
            stats = self.engine()
            return stats if what(stats) else None
        check.__name__ = "the engine's numbers"
        return until(check)

    def arm(self):
        open(self.trigger, "w").close()

    def wait(self):
        """The process to its end, the listeners to the ends of their connections; the time of the fault."""
        try:
            self.code = self.server.process.wait(WAIT)
            self.exited = time.monotonic()
        finally:
            if self.server.process.poll() is None:
                self.server.kill()
        for listener in self.listeners:
            listener.thread.join(WAIT)
            assert not listener.thread.is_alive(), "a connection stays open"
        self.log = self.server.log_text()
        with open(self.trigger + ".at") as file:
            return float(file.read())

    def close(self):
        if self.server.process.poll() is None:
            sys.stderr.write(self.server.log_text()[-4000:])
            self.server.kill()
        if not self.server.process.stdout.closed:
            self.server.process.stdout.close()
        for listener in self.listeners:
            listener.thread.join(WAIT)
        for peer in [self.operator] + [listener.peer for listener in self.listeners]:
            peer.close()
        self.server.folder.cleanup()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def check_end(scene, codes=("device_error",)):
    """Everybody was told once, in time, and the process said why it left; returns a line about it."""
    fault = scene.wait()
    latest, count = 0.0, {}
    for listener, msgid in scene.asked:
        finals = listener.finals(msgid)
        assert len(finals) == 1, "request %d has %d final answers\n%s" % (msgid, len(finals), scene.log[-3000:])
        at, error, result = finals[0]
        assert result is None and error["code"] in codes, (error, result)
        if error["code"] == "device_error":
            assert error["type"] == 0 and "device" in error["message"], error
        count[error["code"]] = count.get(error["code"], 0) + 1
        latest = max(latest, at - fault)
        after = [m for t, m in listener.messages if t > at and m[0] == 2 and m[1] == "token" and m[2][0]["id"] == msgid]
        assert not after, "tokens after the final answer"
    assert count.get("device_error"), count
    assert latest < FLUSH_SECONDS, "the last answer came %.3f s after the fault" % latest
    for listener in scene.listeners:
        assert listener.end == "closed", listener.end
    assert scene.code == DEVICE_EXIT, "exit code %d\n%s" % (scene.code, scene.log[-3000:])
    last = scene.log.strip().split("\n")[-1]
    assert last.startswith("polder: ") and "device" in last and "start" in last and last.endswith("."), last
    assert not os.path.exists(scene.server.unix), "the socket stays behind"
    return "%s; last after %.0f ms, exit after %.0f ms" % (count, 1e3 * latest, 1e3 * (scene.exited - fault))


def crowd(kind, after):
    """A batch step that is left for interactive ones, which decode; and more than run at once. Interactive requests
    that come just between two batch steps leave none: then once more."""
    for _ in range(8):
        with Scene(kind, after, "--max-num-batched-tokens", 64, "--segment-halves", 1, slow=2000) as scene:
            before = scene.engine()["engine"]["pauses"]
            _, batch = scene.ask("key-gamma", ["%d word " % i * 300 for i in range(3)], max_tokens=600)
            scene.until_engine(lambda s: s["requests"]["running"] == len(batch))
            front, ids = scene.ask("key-alpha", ["static int ext4_", "The kernel", "a"], tcp=True, max_tokens=1900)
            _, queued = scene.ask("key-gamma", ["b%d" % i for i in range(5)], max_tokens=50)
            until(lambda: front.pieces() >= set(ids))  # nobody else has a turn while these go on
            stats = scene.until_engine(lambda s: s["requests"]["total"] >= len(batch) + len(ids) + len(queued))
            pauses, requests = stats["engine"]["pauses"] - before, stats["requests"]
            assert requests["running"] >= SEQUENCES and requests["waiting"] >= 3, stats
            if not pauses:
                scene.server.kill()
                continue
            scene.arm()
            return "%d running, %d waiting, %d pauses; %s" % (requests["running"], requests["waiting"], pauses,
                                                             check_end(scene))
    raise AssertionError("no batch step was left")


def test_fault_refused_at_once():
    return crowd("refuse", 0)


def test_fault_refused_later():
    return crowd("refuse", 7)


def test_fault_segment_at_once():
    return crowd("segment", 0)


def test_fault_segment_later():
    return crowd("segment", 40)


def test_fault_first_segment():
    """What the server reads when the engine is already lost is refused, and counts as not accepted."""
    said = []
    for kind in ("refuse", "segment"):
        with Scene(kind, 0) as scene:
            scene.arm()
            scene.ask("key-alpha", ["prompt %d" % i for i in range(12)], max_tokens=20)
            said.append(check_end(scene, codes=("device_error", "unavailable")))
    return " | ".join(said)


def test_fault_in_prefill():
    """No token has been sampled yet."""
    said = []
    for after in (1, 3, 9):
        with Scene("segment", after, "--max-num-batched-tokens", 32, "--segment-halves", 1) as scene:
            scene.arm()
            listener, _ = scene.ask("key-gamma", ["%d word " % i * 350 for i in range(3)], max_tokens=20)
            said.append(check_end(scene))
            assert not listener.pieces(), "it was to fail before the first token"
    return " | ".join(said)


def test_fault_while_draining():
    """SIGTERM does not make a lost device a success."""
    with Scene("segment", 20) as scene:
        listener, ids = scene.ask("key-alpha", ["The kernel", "a"], max_tokens=1900)
        until(lambda: listener.pieces() >= set(ids))
        scene.server.process.terminate()
        until(lambda: "draining" in scene.server.log_text())
        scene.arm()
        return check_end(scene)


def test_fault_nan_is_one_row():
    """One answer ends with numeric; its neighbours in the step, and whoever comes later, get what they get alone."""
    prompts = ["static int ext4_", "The kernel", "a", "int main"]
    with Scene("nan", 0, slow=2000) as scene:
        listener, ids = scene.ask("key-alpha", prompts, max_tokens=200)
        until(lambda: listener.pieces() >= set(ids))
        scene.arm()
        until(lambda: all(listener.finals(msgid) for msgid in ids))
        finals = [listener.finals(msgid) for msgid in ids]
        assert all(len(final) == 1 for final in finals), finals
        errors = [error for ((_, error, _),) in finals if error]
        assert len(errors) == 1 and errors[0]["code"] == "numeric" and "not a number" in errors[0]["message"], errors
        for ((_, error, result),), prompt in zip(finals, prompts):
            alone = scene.operator.generate(prompt, temperature=0, ignore_eos=True, max_tokens=200)
            assert error or result["text"] == alone["text"], (prompt, result, alone)
        scene.server.process.terminate()
        assert scene.server.process.wait(WAIT) == 0, scene.server.log_text()
        listener.thread.join(WAIT)
        return errors[0]["message"]


def test_fault_generate():
    """Without a server: the same exit code."""
    trigger = os.path.join(FOLDER.name, "trigger")
    open(trigger, "w").close()
    env = {"FAULTY_KIND": "segment", "FAULTY_AFTER": "5", "FAULTY_FILE": trigger}
    code, _, err = run("generate", "--model", MODEL, "--state-dir", STATE, "--prompt", "a", "--max-tokens", 50,
                       "--ignore-eos", binary=FAULTY, env=env)
    assert code == DEVICE_EXIT and err.strip().split("\n")[-1].startswith("polder: "), (code, err)
    return err.strip().split("\n")[-1]


def test_fault_memory_at_start():
    """The sentence has what was asked for and what was free."""
    said = []
    for memory, words in [(8 << 20, ()), (48 << 20, ("--pool-bytes", "4G")), (48 << 20, ())]:
        code, out, err = run("serve", "--model", MODEL, "--state-dir", STATE, "--port", "0", *words, binary=FAULTY,
                             env={"FAULTY_MEMORY": str(memory)})
        last = err.strip().split("\n")[-1]
        assert code == 1 and "ready" not in out and last.startswith("polder: "), (code, out, err)
        assert re.search(r"[0-9]+ MiB was asked for and the device has [0-9]+ MiB free", last), last
        said.append(last)
    return " | ".join(said)


if __name__ == "__main__":
    code = main([value for name, value in list(globals().items()) if name.startswith("test_")])
    FOLDER.cleanup()
    sys.exit(code)
