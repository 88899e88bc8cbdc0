# SPDX-License-Identifier: Apache-2.0
"""docs/protocol.md says what really happens: every session in it is played against the server, byte by byte.

A session is a block fenced by ```session. Lines that begin with ">" are what the client sends, with "<" what the
server sends; hexadecimal bytes, then two spaces and an explanation; indented lines go on. ".." is a byte that differs
from run to run (times). The whole text of a block must be what this test writes for the same bytes.

  test_server_doc.py             checks the document
  test_server_doc.py --rewrite   plays the blocks and writes them anew; "send <JSON>" is a new message to send
"""
import json
import os
import re
import sys

import msgpack
from test_server_lib import Peer, Server, TENANTS

DOCUMENT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "docs", "protocol.md")
BLOCK = re.compile(r"```session\n(.*?)```\n", re.S)
HEX = re.compile(r"^([<> ]) ((?:(?:[0-9a-f]{2}|\.\.) ?)+)(?:  |$)")
VARYING = {"queue_ms", "ttft_ms", "total_ms"}
TYPES = {0: "request", 1: "response", 2: "notification"}
COLUMN = 52


class Annotator:
    """Walks one message and writes a line per value."""

    def __init__(self, data):
        self.data, self.at, self.lines = data, 0, []

    def take(self, count):
        piece = self.data[self.at:self.at + count]
        self.at += count
        return piece

    def line(self, piece, what, depth, vary=False):
        shown = [".." if vary and i else "%02x" % byte for i, byte in enumerate(piece)]
        for start in range(0, max(len(shown), 1), 16):
            text = " ".join(shown[start:start + 16])
            note = "  " * depth + what if start == 0 else ""
            self.lines.append(("%-*s  %s" % (COLUMN, text, note)).rstrip())

    def count(self, first, fix, mask, sizes):
        if fix is not None and (first & ~mask & 0xFF) == fix:
            return first & mask, b""
        field = self.take(sizes[first])
        return int.from_bytes(field, "big"), field

    def value(self, depth=0, role=None, key=None):
        first = self.data[self.at]
        head = self.take(1)
        if first <= 0x7F or first >= 0xE0:
            number = first if first <= 0x7F else first - 256
            self.line(head, TYPES[number] if role == "type" else (role or "") + (" " if role else "")
                      + str(number), depth)
            return number
        if first & 0xE0 == 0xA0 or first in (0xD9, 0xDA, 0xDB):
            length, field = self.count(first, 0xA0, 0x1F, {0xD9: 1, 0xDA: 2, 0xDB: 4})
            body = self.take(length)
            text = json.dumps(body.decode(), ensure_ascii=False)
            self.line(head + field + body, text + (":" if role == "key" else ""), depth)
            return body.decode()
        if first & 0xF0 == 0x90 or first in (0xDC, 0xDD):
            length, field = self.count(first, 0x90, 0x0F, {0xDC: 2, 0xDD: 4})
            self.line(head + field, "array of %d" % length, depth)
            roles = ["type", "msgid", "method", "parameters"] if depth == 0 and length == 4 else \
                ["type", "method", "parameters"] if depth == 0 else []
            kind = None
            for i in range(length):
                role_i = roles[i] if i < len(roles) and roles[i] in ("type", "msgid") else None
                got = self.value(depth + 1, role_i)
                kind = got if i == 0 else kind
            return None
        if first & 0xF0 == 0x80 or first in (0xDE, 0xDF):
            length, field = self.count(first, 0x80, 0x0F, {0xDE: 2, 0xDF: 4})
            self.line(head + field, "map of %d" % length, depth)
            for _ in range(length):
                name = self.value(depth + 1, "key")
                self.value(depth + 2, None, name)
            return None
        return self.scalar(first, head, depth, role, key)

    def scalar(self, first, head, depth, role, key):
        words = {0xC0: "nil", 0xC2: "false", 0xC3: "true"}
        if first in words:
            self.line(head, words[first], depth)
            return None
        sizes = {0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
        body = self.take(sizes[first])
        if first in (0xCA, 0xCB):
            number = msgpack.unpackb(head + body)
            vary = key in VARYING
            self.line(head + body, "milliseconds, float 64" if vary else "%g, float %d" % (number, 8 * len(body)),
                      depth, vary)
        else:
            number = int.from_bytes(body, "big", signed=first >= 0xD0)
            self.line(head + body, (role + " " if role else "") + str(number), depth)
        return None


def annotate(arrow, data):
    annotator = Annotator(data)
    annotator.value()
    assert annotator.at == len(data)
    return "\n".join([arrow + " " + annotator.lines[0]] + ["  " + line for line in annotator.lines[1:]])


def messages_of(block):
    """The client's messages in a block, as bytes."""
    messages, sending = [], False
    for line in block.splitlines():
        if line.startswith("send "):
            messages.append(msgpack.packb(json.loads(line[5:])))
            sending = False
            continue
        match = HEX.match(line)
        if not match:
            continue
        arrow, text = match.groups()
        if arrow == ">":
            messages.append(b"")
        if arrow != " ":
            sending = arrow == ">"
        if sending:
            messages[-1] += bytes.fromhex(text.replace(" ", ""))
    return messages


def is_request(data):
    try:
        return msgpack.unpackb(data)[0] == 0
    except Exception:  # noqa: BLE001
        return True


def read_one(peer):
    """The bytes of the next message, or None at the end."""
    while True:
        start = peer.unpacker_bytes
        unpacker = msgpack.Unpacker(raw=False)
        unpacker.feed(start)
        try:
            unpacker.skip()
            used = unpacker.tell()
            peer.unpacker_bytes = start[used:]
            return start[:used]
        except msgpack.OutOfData:
            data = peer.socket.recv(65536)
            if not data:
                return None
            peer.unpacker_bytes += data


def play(server, block):
    """Plays one block on a fresh connection (authenticated, unless it begins with hello or auth itself)."""
    messages = messages_of(block)
    out = []
    opens = b"hello" in messages[0] or b"auth" in messages[0]
    with Peer(server, key=None if opens else "key-acme") as peer:
        peer.unpacker_bytes = b""
        for data in messages:
            peer.raw(data)
            try:
                out.append(annotate(">", data))
            except (IndexError, AssertionError):
                out.append("> " + " ".join("%02x" % byte for byte in data))
            while is_request(data):
                answer = read_one(peer)
                if answer is None:
                    out.append("the server closes the connection")
                    break
                out.append(annotate("<", answer))
                if msgpack.unpackb(answer)[0] == 1:
                    break
    return "\n".join(out) + "\n"


def check_example(server, document):
    """The client that the document prints works as printed."""
    names, texts = {}, []
    exec(re.search(r"```python\n(.*?)```", document, re.S).group(1), names)
    client = names["Polder"](*server.address, key="key-acme")
    result = client.call("generate", texts.append, prompt="zwölf", max_tokens=6, stream=True)
    assert result["text"] == "".join(texts) == "zwölf", (result, texts)
    client.socket.close()


def main():
    with open(DOCUMENT) as file:
        document = file.read()
    blocks = BLOCK.findall(document)
    assert len(blocks) >= 8, "the document has lost its sessions"
    rewrite = "--rewrite" in sys.argv
    wrong = 0
    with Server(delay_us=20000, tenants=TENANTS) as server:
        for number, block in enumerate(blocks):
            played = play(server, block)
            if rewrite:
                document = document.replace("```session\n" + block + "```", "```session\n" + played + "```")
            elif played != block:
                wrong += 1
                print("session %d of docs/protocol.md differs; the server says:\n%s" % (number + 1, played))
        check_example(server, document)
    if rewrite:
        with open(DOCUMENT, "w") as file:
            file.write(document)
    print("%d sessions, %d differ" % (len(blocks), wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
