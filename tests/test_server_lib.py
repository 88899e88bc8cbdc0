# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests/test_server_*.py: the server program over the fake engine, and a plain-socket peer that
knows nothing but the three message shapes (so that the client library is not tested against itself)."""
import hashlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time

try:
    import msgpack
except ImportError:
    print("SKIP: python3-msgpack is not installed (apt install python3-msgpack)")
    sys.exit(77)

PROGRAM = os.environ.get("POLDER_TEST_SERVER", "test_server_main")
CONTEXT = 2048  # of the fake engine
WAIT = float(os.environ.get("POLDER_TEST_WAIT", "30"))


def sanitized():
    with open(PROGRAM, "rb") as file:
        data = file.read()
    return b"__asan_init" in data or b"__tsan_init" in data


def key_hash(key):
    return hashlib.blake2b(key.encode(), digest_size=32).hexdigest()


TENANTS = """tenants:
  - name: acme
    keys_blake2b: [%s, %s]
    allowed_adapters: ["acme-*", "shared"]
    manage_adapters: true
    see_tenants: true
    adapter_rpm_limit: 0
    pinned_adapter_bytes: 1000
    max_parallel_requests: 2000
    max_queue: 2000
  - name: bolt
    keys_blake2b: [%s]
    allowed_adapters: ["bolt-*"]
    priority_class: interactive
    rpm_limit: 20
    max_parallel_requests: 4
    max_tokens: 100
    max_context_tokens: 400
  - name: cape
    keys_blake2b: [%s]
    priority_class: batch
""" % (key_hash("key-acme"), key_hash("key-acme-2"), key_hash("key-bolt"), key_hash("key-cape"))


class Server:
    """test_server_main as a process; `address` is (host, port), `unix` a socket path."""

    def __init__(self, *limits, delay_us=200, tenants=TENANTS, extra=()):
        self.folder = tempfile.TemporaryDirectory(prefix="polder-test-")
        self.unix = os.path.join(self.folder.name, "polder.sock")
        self.tenants = os.path.join(self.folder.name, "tenants.yaml")
        self.adapters = os.path.join(self.folder.name, "adapters")
        self.state = os.path.join(self.folder.name, "state")
        self.store = os.path.join(self.state, "adapters")
        os.mkdir(self.adapters)
        os.makedirs(self.store)
        self.write_tenants(tenants)
        command = [PROGRAM, "--listen", "127.0.0.1:0", "--listen", "unix:" + self.unix, "--tenants",
                   self.tenants, "--adapters", self.adapters, "--state", self.state, "--delay-us",
                   str(delay_us)]
        for limit in limits:
            command += ["--limit", limit]
        self.log = open(os.path.join(self.folder.name, "log"), "w+")
        self.process = subprocess.Popen(command + list(extra), stdout=subprocess.PIPE, stderr=self.log,
                                        text=True)
        line = self.process.stdout.readline().split()
        if not line or line[0] != "ready":
            self.process.wait()
            raise RuntimeError("the server did not start: " + self.log_text())
        host, port = line[1].rsplit(":", 1)
        self.address = (host, int(port))

    def write_tenants(self, text):
        with open(self.tenants, "w") as file:
            file.write(text)

    def log_text(self):
        self.log.flush()
        with open(self.log.name) as file:
            return file.read()

    def rss_kib(self):
        with open("/proc/%d/status" % self.process.pid) as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))

    def descriptors(self):
        return len(os.listdir("/proc/%d/fd" % self.process.pid))

    def signal(self, number):
        self.process.send_signal(number)

    def has_left(self):
        """Two signals that come together are one."""
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
        return self.process.returncode is not None

    def stop(self, keep=False):
        """Ends the server; it must leave with 0 and without complaints of a sanitizer. keep: its folder stays."""
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
        until(self.has_left)
        code = self.process.wait(0)
        text = self.log_text()
        self.process.stdout.close()
        self.log.close()
        if not keep:
            self.folder.cleanup()
        assert code == 0, "exit code %d\n%s" % (code, text)
        assert "Sanitizer" not in text and "runtime error" not in text, text

    def __enter__(self):
        return self

    def __exit__(self, kind, value, trace):
        if kind is not None:
            sys.stderr.write(self.log_text())
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()
            self.log.close()
            self.folder.cleanup()
        else:
            self.stop()


class Peer:
    """A plain socket."""

    def __init__(self, server, key="key-acme", unix=False, receive_buffer=None):
        if unix:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.settimeout(WAIT)
            self.socket.connect(server.unix)
        else:
            self.socket = socket.socket()
            if receive_buffer:
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            self.socket.settimeout(WAIT)
            self.socket.connect(server.address)
        self.unpacker = msgpack.Unpacker(raw=False, max_buffer_size=1 << 30)
        self.next_id = 100
        self.notes = []
        if key:
            assert self.call("auth", key=key)[2] is None

    def raw(self, data):
        self.socket.sendall(data)

    def send(self, message):
        self.raw(msgpack.packb(message))

    def request(self, method, **params):
        self.next_id += 1
        self.send([0, self.next_id, method, [params] if params else []])
        return self.next_id

    def read(self):
        """The next message; None when the server closed."""
        while True:
            for message in self.unpacker:
                return message
            try:
                data = self.socket.recv(1 << 16)
            except ConnectionResetError:
                return None
            if not data:
                return None
            self.unpacker.feed(data)

    def response(self, msgid):
        """The response to msgid; notifications on the way are collected in `notes`."""
        while True:
            message = self.read()
            assert message is not None, "closed while waiting for an answer"
            if message[0] == 2:
                self.notes.append(message)
                continue
            assert message[1] == msgid, message
            return message

    def call(self, method, **params):
        return self.response(self.request(method, **params))

    def result(self, method, **params):
        message = self.call(method, **params)
        assert message[2] is None, message
        return message[3]

    def error(self, method, **params):
        message = self.call(method, **params)
        assert message[2] is not None and message[3] is None, message
        return message[2]

    def last_words(self):
        """What the server says before it closes: the messages, and it must close."""
        words = []
        while True:
            message = self.read()
            if message is None:
                return words
            words.append(message)

    def close(self):
        self.socket.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


def engine_stats(peer):
    return peer.result("stats")["engine"]


def until(condition, seconds=WAIT):
    """Waits for condition() to be true; its last value."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value or time.monotonic() > end:
            return value
        time.sleep(0.01)
