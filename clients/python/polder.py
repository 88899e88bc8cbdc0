# SPDX-License-Identifier: Apache-2.0
"""Client for the Polder serving runtime (docs/protocol.md). One file; needs only `msgpack`.

    from polder import Client

    with Client("127.0.0.1:7077", key="...") as client:
        for token in client.generate("Once upon a time", max_tokens=64):
            print(token.text, end="", flush=True)

        answer = client.complete("Once upon a time", model="my-adapter", max_tokens=64)
        print(answer.text, answer.usage["completion_tokens"])

A Client is one connection and belongs to one thread. Several generations may run on it at the same time:
each `generate` returns its own iterator, and reading one puts the others' messages aside for them.
"""
import collections
import hashlib
import os
import socket

import msgpack

__version__ = "0.1.0"
__all__ = ["Client", "Stream", "Token", "Answer", "PolderError", "ConnectionClosed"]


class PolderError(Exception):
    """An error answer. `code` is a word of the protocol ("not_found", "resource_exhausted", ...)."""

    def __init__(self, code, message, type=0, **details):
        super().__init__("%s: %s" % (code, message))
        self.code = code
        self.message = message
        self.is_validation = type == 1
        self.kind = details.get("kind")  # which limit
        self.limit = details.get("limit")
        self.remaining = details.get("remaining")
        self.retry_after = details.get("retry_after_ms", 0) / 1000.0  # seconds; 0: unknown or pointless
        self.billed = details.get("billed", False)


class ConnectionClosed(PolderError):
    """The connection is gone. `code` says why, when the server said it."""


Token = collections.namedtuple("Token", "index token text logprob top")
Answer = collections.namedtuple("Answer", "text finish_reason usage model seed tokens logprobs choices")


def _answer(result):
    return Answer(*(result.get(name) for name in Answer._fields))


def _error(value):
    if isinstance(value, dict):
        return PolderError(**value)
    if isinstance(value, (list, tuple)) and len(value) == 2:
        code, _, message = str(value[1]).partition(": ")
        return PolderError(code, message, type=value[0])
    return PolderError("unknown", str(value))


def _pieces(path, size):
    with open(path, "rb") as file:
        while True:
            piece = file.read(size)
            if not piece:
                return
            yield piece


class Stream:
    """Iterates over tokens; afterwards `answer` holds the whole. Leaving it early cancels the request."""

    def __init__(self, client, msgid):
        self._client = client
        self.id = msgid
        self.answer = None
        self._over = False

    def __iter__(self):
        return self

    def __next__(self):
        if self._over:
            raise StopIteration
        message = self._client._next_for(self.id)
        if message[0] == 2:
            item = message[2][0]
            return Token(item["index"], item["token"], item["text"], item.get("logprob"), item.get("top"))
        self._over = True
        self._client._forget(self.id)
        if message[2] is not None:
            raise _error(message[2])
        self.answer = _answer(message[3])
        raise StopIteration

    def cancel(self):
        """Asks the server to stop; the iterator still ends with an answer ("cancelled")."""
        if not self._over:
            self._client._send([2, "cancel", [{"id": self.id}]])

    def close(self):
        """Cancels, and reads what is left."""
        if not self._over:
            self.cancel()
            try:
                for _ in self:
                    pass
            except PolderError:
                pass

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


class Client:
    """address: "host:port", "[v6]:port" or "unix:/path". timeout: seconds of every wait, or None."""

    def __init__(self, address, key=None, timeout=60.0):
        self._socket = _connect(address, timeout)
        self._unpacker = msgpack.Unpacker(raw=False, max_buffer_size=256 << 20)
        self._next_id = 0
        self._waiting = {}  # msgid -> messages that came while another one was read
        try:
            self.server = self.call("hello", client="polder.py", version=__version__,
                                    structured_errors=True)
            self.tenant = self.auth(key)["tenant"] if key is not None else None
        except BaseException:
            self.close()
            raise

    # -- methods ------------------------------------------------------------------------------------

    def auth(self, key):
        return self.call("auth", key=key)

    def generate(self, prompt, **options):
        """A Stream of tokens. prompt: str or list of token ids; options: see docs/protocol.md, generate."""
        options.update(prompt=prompt, stream=True)
        return Stream(self, self._request("generate", options))

    def complete(self, prompt, **options):
        """The whole Answer at once; `choices` is a list of dicts when n > 1."""
        options.update(prompt=prompt, stream=False)
        return _answer(self._result(self._request("generate", options)))

    def cancel(self, msgid):
        return self.call("cancel", id=msgid)["found"]

    def tokenize(self, text):
        return self.call("tokenize", text=text)["tokens"]

    def detokenize(self, tokens):
        return self.call("detokenize", tokens=list(tokens))["text"]

    def models(self):
        return self.call("models")

    def adapters(self):
        """All of them, however many."""
        found, more = [], True
        while more:
            page = self.call("adapters.list", limit=1000, after=found[-1]["name"] if found else None)
            found, more = found + page["adapters"], page["more"]
        return found

    def register_adapter(self, name, path):
        return self.call("adapters.register", name=name, path=path)

    add_adapter = register_adapter  # its older name

    def upload_adapter(self, name, directory, **options):
        """Sends the two files of a PEFT directory, which need not be where the server can read it."""
        files = [os.path.join(directory, file) for file in ("adapter_config.json", "adapter_model.safetensors")]
        digest, sizes = hashlib.blake2b(digest_size=32), []
        for file in files:
            sizes.append(os.path.getsize(file))
            digest.update(sizes[-1].to_bytes(8, "little"))
            for piece in _pieces(file, 1 << 20):
                digest.update(piece)
        begun = self.call("adapters.upload", name=name, config_bytes=sizes[0], weights_bytes=sizes[1],
                          digest=digest.hexdigest(), **options)
        received = 0
        for file in files:
            for piece in _pieces(file, begun["chunk_bytes_max"]):
                received = self.call("adapters.upload_chunk", upload=begun["upload"], offset=received, data=piece)["received"]
        return self.call("adapters.upload_commit", upload=begun["upload"])

    def pin_adapter(self, name):
        return self.call("adapters.pin", name=name)

    def unpin_adapter(self, name):
        return self.call("adapters.unpin", name=name)

    def remove_adapter(self, name):
        return self.call("adapters.remove", name=name)

    def stats(self):
        return self.call("stats")

    def ping(self):
        return self.call("ping")

    def call(self, method, **params):
        """Any method by name."""
        return self._result(self._request(method, params))

    def close(self):
        self._socket.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    # -- messages -----------------------------------------------------------------------------------

    def _send(self, message):
        try:
            self._socket.sendall(msgpack.packb(message, use_bin_type=True))
        except OSError as cause:
            # The server may have said why before it closed.
            try:
                while True:
                    self._read()
            except ConnectionClosed as closed:
                raise closed from cause

    def _request(self, method, params):
        msgid = self._next_id
        self._next_id = (self._next_id + 1) & 0xFFFFFFFF
        self._waiting[msgid] = collections.deque()
        self._send([0, msgid, method, [params] if params else []])
        return msgid

    def _forget(self, msgid):
        self._waiting.pop(msgid, None)

    def _result(self, msgid):
        try:
            while True:
                message = self._next_for(msgid)
                if message[0] == 1:
                    break
        finally:
            self._forget(msgid)
        if message[2] is not None:
            raise _error(message[2])
        return message[3]

    def _next_for(self, msgid):
        queue = self._waiting[msgid]
        while not queue:
            self._route(self._read())
        return queue.popleft()

    def _route(self, message):
        if message[0] == 1:
            queue = self._waiting.get(message[1])
        elif message[0] == 2 and message[1] == "token":
            queue = self._waiting.get(message[2][0]["id"])
        else:
            queue = None
        if queue is not None:
            queue.append(message)

    def _read(self):
        while True:
            try:
                message = next(self._unpacker)
                if message[0] == 2 and message[1] == "error":
                    raise ConnectionClosed(**message[2][0])
                return message
            except StopIteration:
                pass
            try:
                data = self._socket.recv(65536)
            except socket.timeout:
                raise
            except OSError as cause:
                raise ConnectionClosed("connection", str(cause)) from cause
            if not data:
                raise ConnectionClosed("connection", "the server closed the connection")
            self._unpacker.feed(data)


def _connect(address, timeout):
    if address.startswith("unix:"):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(timeout)
        sock.connect(address[5:])
        return sock
    host, _, port = address.rpartition(":")
    sock = socket.create_connection((host.strip("[]") or "127.0.0.1", int(port)), timeout)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock
