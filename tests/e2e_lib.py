# SPDX-License-Identifier: Apache-2.0
"""Shared by tests/test_cli.py and tests/test_e2e*.py: the real binary on the demo model, and a plain-socket peer
that knows nothing but the three message shapes. Needs Debian's python3-msgpack."""
import hashlib
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback

try:
    import msgpack
except ImportError:
    print("SKIP: python3-msgpack is not installed (apt install python3-msgpack)")
    sys.exit(77)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
POLDER = os.path.abspath(os.environ.get("POLDER", os.path.join(ROOT, "build/runtime/cli/polder")))
FAULTY = os.path.abspath(os.environ.get("POLDER_FAULTY", os.path.join(ROOT, "build/tests/polder_faulty")))
MODEL = os.path.join(ROOT, "models/demo")
ADAPTERS = os.path.join(MODEL, "adapters")
WAIT = float(os.environ.get("POLDER_TEST_WAIT", "60"))


def key_hash(key):
    return hashlib.blake2b(key.encode(), digest_size=32).hexdigest()


def environment(**more):
    """Ours without POLDER_* (the tests' own settings among them)."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("POLDER")}
    clean.update(more)
    return clean


def run(*words, stdin=b"", env=None, timeout=WAIT, binary=POLDER):
    """The binary; returns (exit code, stdout, stderr) as text."""
    done = subprocess.run([binary, *map(str, words)], input=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env=environment(**(env or {})), timeout=timeout)
    return done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")


def until(what, seconds=WAIT, pause=0.02):
    """Calls `what` until it says something true, which is returned."""
    end = time.monotonic() + seconds
    while True:
        value = what()
        if value:
            return value
        assert time.monotonic() < end, "waited %.0f s in vain for %s" % (seconds, getattr(what, "__name__", what))
        time.sleep(pause)


class RpcError(Exception):
    def __init__(self, value):
        super().__init__(repr(value))
        self.value = value if isinstance(value, dict) else {"text": value[1]}
        self.code = self.value.get("code")
        self.message = self.value.get("message", "")


class Peer:
    """One connection. `start` sends a generate and returns its msgid; `finish` reads until its response."""

    def __init__(self, address, key=None, receive_buffer=0, wait=WAIT):
        self.sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET, socket.SOCK_STREAM)
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.settimeout(wait)
        self.sock.connect(address)
        self.unpacker = msgpack.Unpacker(raw=False, max_buffer_size=64 << 20)  # strict UTF-8
        self.msgid = 0
        self.pieces = {}   # msgid -> the token notifications
        self.answers = {}  # msgid -> (error, result)
        self.last_error = None
        self.call("hello", structured_errors=True)
        if key:
            self.call("auth", key=key)

    def send(self, method, **params):
        self.msgid += 1
        self.sock.sendall(msgpack.packb([0, self.msgid, method, [params]], use_bin_type=True))
        return self.msgid

    def read(self):
        """One message, put where it belongs."""
        while True:
            for message in self.unpacker:
                if message[0] == 1:
                    self.answers[message[1]] = (message[2], message[3])
                elif message[1] == "token":
                    self.pieces.setdefault(message[2][0]["id"], []).append(message[2][0])
                elif message[1] == "error":
                    self.last_error = message[2][0]
                return message
            data = self.sock.recv(1 << 16)
            if not data:
                raise EOFError("the server closed the connection: %r" % (self.last_error,))
            self.unpacker.feed(data)

    def finish(self, msgid):
        while msgid not in self.answers:
            self.read()
        error, result = self.answers.pop(msgid)
        if error is not None:
            raise RpcError(error)
        return result

    def first_token(self, msgid):
        while not self.pieces.get(msgid):
            assert msgid not in self.answers, self.answers
            self.read()

    def call(self, method, **params):
        return self.finish(self.send(method, **params))

    def generate(self, prompt, **params):
        return self.call("generate", prompt=prompt, **params)

    def refused(self, method, **params):
        """The structured error of a call that must fail."""
        try:
            result = self.call(method, **params)
        except RpcError as error:
            return error.value
        raise AssertionError("%s %r was not refused: %r" % (method, params, result))

    def close(self):
        self.sock.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Server:
    """polder serve on a Unix socket and a TCP port of its choice. `state` may be shared between servers that
    do not run at the same time: the expert store is built once."""

    def __init__(self, state, tenants, *options, binary=POLDER, env=None):
        self.env = env or {}
        self.folder = tempfile.TemporaryDirectory(prefix="polder-e2e-")
        self.unix = os.path.join(self.folder.name, "socket")
        self.tenants = os.path.join(self.folder.name, "tenants.yaml")
        self.log = os.path.join(self.folder.name, "log")
        self.write_tenants(tenants)
        self.command = [binary, "serve", "--model", MODEL, "--state-dir", state, "--tenants", self.tenants, "--port",
                        "0", "--uds", self.unix, *map(str, options)]
        self.start()

    def start(self):
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=log,
                                            env=environment(**self.env))
        ready, _, _ = select.select([self.process.stdout], [], [], WAIT)
        line = self.process.stdout.readline().decode() if ready else ""
        assert "ready on" in line, "the server did not start: %r\n%s" % (line, self.log_text())
        address = next(word.strip(",") for word in line.split() if word.startswith("127.0.0.1:"))
        self.tcp = ("127.0.0.1", int(address.rsplit(":", 1)[1]))

    def write_tenants(self, text):
        with open(self.tenants, "w") as file:
            file.write(text)

    def log_text(self):
        with open(self.log, errors="replace") as file:
            return file.read()

    def peer(self, key, tcp=False, **options):
        return Peer(self.tcp if tcp else self.unix, key, **options)

    def rss_kib(self):
        with open("/proc/%d/status" % self.process.pid) as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))

    def stop(self, code=0):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        ended = self.process.wait(WAIT)
        self.process.stdout.close()
        assert ended == code, "exit code %d\n%s" % (ended, self.log_text())

    def kill(self):
        self.process.kill()
        self.process.wait(WAIT)
        self.process.stdout.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        if kind is not None:
            sys.stderr.write(self.log_text()[-4000:])
            if self.process.poll() is None:
                self.kill()
        else:
            self.stop()
        self.folder.cleanup()


def main(tests, *arguments):
    """Runs functions in order, or those named on the command line; prints their times; exit 1 if one fails."""
    wanted, failed = sys.argv[1:], []
    for test in tests:
        if wanted and test.__name__ not in wanted:
            continue
        begin = time.monotonic()
        try:
            said = test(*arguments)
            print("ok    %-52s %6.2f s  %s" % (test.__name__, time.monotonic() - begin, said or ""), flush=True)
        except Exception:
            failed.append(test.__name__)
            print("FAIL  %s after %.2f s" % (test.__name__, time.monotonic() - begin), flush=True)
            traceback.print_exc()
    print("%d failed %s" % (len(failed), failed), flush=True)
    return 1 if failed else 0
