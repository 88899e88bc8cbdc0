# SPDX-License-Identifier: Apache-2.0
"""Clients that break the protocol, flood, dawdle or vanish: each gets a clear end, the others notice nothing."""
import random
import socket
import struct
import threading
import time
import unittest

import msgpack
from test_server_lib import Peer, Server, engine_stats, sanitized, until


def request(msgid, method, params):
    return msgpack.packb([0, msgid, method, params])


class Hostile(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = Server()
        cls.witness = Peer(cls.server)  # lives through everything

    @classmethod
    def tearDownClass(cls):
        assert cls.witness.result("generate", prompt="abc", max_tokens=6)["text"] == "abcabc"
        assert cls.witness.result("stats")["tenant"]["parallel"] == 0
        cls.witness.close()
        cls.server.stop()

    def refused(self, data, reason, key="key-acme"):
        """The bytes end the connection, with one error notification that says why."""
        with Peer(self.server, key=key) as peer:
            peer.raw(data)
            words = peer.last_words()
            self.assertEqual(len(words), 1, words)
            self.assertEqual(words[0][:2], [2, "error"])
            self.assertEqual(words[0][2][0]["code"], "invalid_argument")
            self.assertIn(reason, words[0][2][0]["message"])

    def test_claims_of_many_items(self):
        before = self.server.rss_kib()
        for key in (None, "key-acme"):
            for head in (b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdc\xff\xff", b"\xde\xff\xff"):
                self.refused(head, "array of 3 or 4", key)
            envelope = b"\x94\x00\x01" + b"\xa4ping"
            for head in (b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdd\x10\x00\x00\x00",
                         b"\xdf\x80\x00\x00\x00"):
                self.refused(envelope + head, "more items are announced", key)
                self.refused(envelope + b"\x91" + head, "more items are announced", key)
            for head in (b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"):
                self.refused(envelope + head, "too long", key)
        self.refused(b"\x94\x00\x01" + b"\xa4ping" + b"\xdd\x00\x00\xf0\x00", "too many items")
        if not sanitized():
            self.assertLess(self.server.rss_kib() - before, 2000)

    def test_depth_bombs(self):
        for filler in (b"\x91", b"\x81\xa1a", b"\xdc\x00\x01", b"\xdd\x00\x00\x00\x01"):
            self.refused(b"\x94\x00\x01\xa4ping" + filler * 200 + b"\xc0", "deeper than 16")
        with Peer(self.server) as peer:  # 15 levels below the root are allowed, and then a parameter error
            peer.raw(b"\x94\x00\x01\xa4ping" + b"\x91" * 15 + b"\xc0")
            self.assertEqual(peer.response(1)[2][0], 1)

    def test_no_messages(self):
        for data, reason in ((b"\x93", None), (b"\x00", "array"), (b"\xc0", "array"), (b"\x80", "array"),
                             (b"\xa3abc", "array"), (b"\xc1", "c1"), (b"\x90", "array"),
                             (b"\x92\x00\x01", "array"), (b"\x95\x00", "array"), (b"\x94\x03", "type"),
                             (b"\x94\xff", "type"), (b"\x94\xa1a", "type"), (b"\x94\x90", "type"),
                             (b"\x94\xcb" + b"\x00" * 8, "type"), (b"\x93\x00", "4 values"),
                             (b"\x94\x02", "3"), (b"\x94\x00\x01\xd4\x00\x00\x90", "ext"),
                             (b"\x94\x00\x01\xc1", "c1"), (b"\x94\x00\x01\xa2\xc3\x28\x90", "UTF-8"),
                             (b"\x94\x00\x01\xa3\xed\xa0\x80\x90", "UTF-8"),
                             (b"\x94\x00\x01\xa2\xc0\x80\x90", "UTF-8"),
                             (b"\x94\x00\x01\xa1a\x91\x82\xa1b\x01\xa1b\x02", "twice"),
                             (b"\x94\x00\x01\xa1a\x91\x81\x05\x01", "must be a str"),
                             (b"\x94\x00\xff\xa4ping\x90", "msgid"), (b"\x94\x00\xa1a\xa4ping\x90", "msgid"),
                             (b"\x94\x00\xcf" + b"\xff" * 8 + b"\xa4ping\x90", "msgid"),
                             (b"\x94\x01\x01\xc0\xc0", "no responses"),
                             (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", "array")):
            if reason:
                self.refused(data, reason)
        for method in (b"\xc0", b"\x05", b"\x90", b"\xc4\x04ping", b"\xa0", b"\xa5ping\x00"):
            with Peer(self.server) as peer:
                peer.raw(b"\x94\x00\x07" + method + b"\x90")
                self.assertEqual(peer.response(7)[2], [0, "not_found: there is no such method."])

    def test_random_bytes(self):
        rng = random.Random(7)
        seeds = [request(1, "ping", []), request(2, "generate", [{"prompt": "abc", "max_tokens": 3}]),
                 request(3, "tokenize", [{"text": "a" * 50}]), msgpack.packb([2, "cancel", [{"id": 1}]])]
        for round_ in range(300):
            data = bytearray(rng.choice(seeds) * 3)
            for _ in range(rng.randrange(1, 6)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            if round_ % 3 == 0:
                data = bytearray(rng.randbytes(rng.randrange(1, 300)))
            with Peer(self.server, key="key-acme" if round_ % 2 else None) as peer:
                try:
                    peer.raw(bytes(data))
                    if round_ % 5 == 0:
                        peer.socket.shutdown(socket.SHUT_WR)
                        peer.last_words()
                except (BrokenPipeError, ConnectionResetError):
                    pass
        self.assertTrue(until(lambda: engine_stats(self.witness)["running"] == 0))

    def test_one_byte_at_a_time(self):
        with Peer(self.server) as peer:
            data = request(5, "generate", [{"prompt": "zwölf", "max_tokens": 6}]) + request(6, "ping", [])
            for i in range(len(data)):
                peer.raw(data[i:i + 1])
            answers = {}
            for _ in range(2):
                message = peer.read()
                answers[message[1]] = message[3]
            self.assertEqual(answers[5]["text"], "zwölf")
            self.assertEqual(answers[6], "pong")

    def test_pipelined(self):
        with Peer(self.server) as peer:
            peer.raw(b"".join(request(i, "ping", []) for i in range(20000)))
            self.assertEqual([peer.read()[1] for _ in range(20000)], list(range(20000)))

    def test_duplicate_msgid(self):
        with Peer(self.server) as peer:
            cancels = engine_stats(self.witness)["cancels"]
            peer.raw(request(9, "generate", [{"prompt": "a", "max_tokens": 2000}]))
            peer.raw(request(9, "ping", []))
            words = peer.last_words()
            self.assertEqual(len(words), 1, words)
            self.assertIn("msgid is in use", words[0][2][0]["message"])
        self.assertTrue(until(lambda: engine_stats(self.witness)["cancels"] == cancels + 1))
        with Peer(self.server) as peer:  # again, one after the other, is fine
            for _ in range(3):
                peer.raw(request(9, "generate", [{"prompt": "a", "max_tokens": 2}]))
                self.assertEqual(peer.read()[3]["text"], "aa")

    def test_strangers_get_small_frames(self):
        self.refused(request(1, "auth", [{"key": "x" * 5000}]), "too long", key=None)
        self.refused(request(1, "hello", [[1] * 100]), "too many items", key=None)

    def test_frame_limit(self):
        self.refused(b"\x94\x00\x01\xa8tokenize\x91\x81\xa4text\xdb" + struct.pack(">I", 1 << 20), "too long")
        with Peer(self.server) as peer:
            self.assertIn("at most 36864", peer.error("tokenize", text="a" * 1000000)[1])
            self.assertEqual(peer.result("tokenize", text="a" * 36864)["count"], 36864)

    def test_reset_in_mid_stream(self):
        for _ in range(20):
            peer = Peer(self.server)
            peer.request("generate", prompt="abc", max_tokens=2000, stream=True)
            peer.read()
            peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            peer.close()
        self.assertTrue(until(lambda: engine_stats(self.witness)["running"] == 0))

    def test_half_close_counts_as_gone(self):
        with Peer(self.server) as peer:
            peer.request("generate", prompt="abc", max_tokens=2000)
            self.assertTrue(until(lambda: engine_stats(self.witness)["running"] == 1))
            peer.socket.shutdown(socket.SHUT_WR)
            self.assertEqual(peer.last_words(), [])
        self.assertTrue(until(lambda: engine_stats(self.witness)["running"] == 0))

    def test_log_cannot_be_forged(self):
        with Peer(self.server, key=None) as peer:
            peer.error("auth", key="x\n2026-01-01 error forged")
        self.assertNotIn("\n2026-01-01 error forged", self.server.log_text())


class Timeouts(unittest.TestCase):
    def test_slow_frames_and_silence(self):
        limits = ("auth_timeout_ms=300", "frame_timeout_ms=500", "idle_timeout_ms=900")
        with Server(*limits) as server:
            silent, half, idle = Peer(server, key=None), Peer(server), Peer(server)
            half.raw(b"\x94\x00\x01\xa8generate")
            busy = Peer(server)
            msgid = busy.request("generate", prompt="abc", max_tokens=2000)  # 0.4 s and more
            dripping, stop = Peer(server), threading.Event()

            def drip():  # a byte now and then does not extend the time of a message
                try:
                    dripping.raw(b"\x94\x00\x01\xa4")
                    while not stop.wait(0.05):
                        dripping.raw(b"p")
                        stop.wait(0.3)
                except OSError:
                    pass

            thread = threading.Thread(target=drip)
            thread.start()
            reasons = []
            for peer in (silent, half, dripping, idle):
                began = time.monotonic()
                words = peer.last_words()
                reasons.append((words[0][2][0]["code"], words[0][2][0]["message"][:12]))
                self.assertLess(time.monotonic() - began, 5)
            stop.set()
            thread.join()
            self.assertEqual(reasons, [("deadline_exceeded", "no valid aut"), ("deadline_exceeded", "the message "),
                                       ("deadline_exceeded", "the message "),
                                       ("deadline_exceeded", "the connecti")])
            self.assertEqual(busy.response(msgid)[3]["finish_reason"], "length")
            self.assertEqual(busy.result("ping"), "pong")

    def test_slowloris_does_not_lock_out(self):
        with Server("unauthenticated_max=16", "connections_max=40") as server:
            crowd = [Peer(server, key=None) for _ in range(30)]
            for peer in crowd:
                peer.raw(b"\x94")
            with Peer(server) as good:
                self.assertEqual(good.result("ping"), "pong")
                stats = good.result("stats")["server"]
                self.assertLessEqual(stats["unauthenticated"], 16)
            for peer in crowd:
                peer.close()


class Slow(unittest.TestCase):
    def test_slow_reader_is_held_then_dropped(self):
        limits = ("output_high_bytes=20000", "slow_reader_timeout_ms=1500")
        with Server(*limits, delay_us=0) as server:
            watcher, slow = Peer(server), Peer(server, unix=True)
            for i in range(40):
                slow.request("generate", prompt=[299] * 4, max_tokens=2000, stream=True)
            self.assertTrue(until(lambda: engine_stats(watcher)["pauses"] > 0))
            began = time.monotonic()
            for _ in range(20):  # the others do not notice
                watcher.result("generate", prompt="abc", max_tokens=30)
            self.assertLess(time.monotonic() - began, 1.0)
            self.assertLess(watcher.result("stats")["server"]["buffered_bytes"], 24 << 20)
            self.assertTrue(until(lambda: watcher.result("stats")["server"]["dropped_slow"] == 1))
            self.assertTrue(until(lambda: engine_stats(watcher)["running"] == 0))
            self.assertLess(watcher.result("stats")["server"]["buffered_bytes"], 100000)

    def test_slow_reader_that_wakes_up_loses_nothing(self):
        with Server("output_high_bytes=20000", delay_us=0) as server:
            watcher, slow = Peer(server), Peer(server, unix=True)
            ids = [slow.request("generate", prompt="abc", max_tokens=1500, stream=True) for _ in range(20)]
            self.assertTrue(until(lambda: engine_stats(watcher)["pauses"] > 0))
            time.sleep(0.2)
            texts = {msgid: "" for msgid in ids}
            ended = 0
            while ended < len(ids):
                message = slow.read()
                if message[0] == 2:
                    texts[message[2][0]["id"]] += message[2][0]["text"]
                else:
                    self.assertEqual(message[3]["text"], texts[message[1]])
                    ended += 1
            self.assertEqual(set(texts.values()), {"abc" * 500})
            self.assertGreater(engine_stats(watcher)["resumes"], 0)

    def test_too_much_waiting_output_closes_at_once(self):
        with Server("output_max_bytes=50000", delay_us=0) as server:
            watcher, greedy = Peer(server), Peer(server)
            greedy.request("tokenize", text="\u00e9" * 18000)  # an answer of 72 KB
            self.assertEqual(greedy.last_words(), [])
            self.assertEqual(watcher.result("stats")["server"]["dropped_slow"], 1)
            self.assertLess(watcher.result("stats")["server"]["buffered_bytes"], 100000)
            self.assertEqual(watcher.result("ping"), "pong")


class Many(unittest.TestCase):
    def test_connections_up_to_the_limit(self):
        with Server("connections_max=300", "unauthenticated_max=300", "connections_per_tenant=300") as server:
            first = Peer(server)
            others = [Peer(server) for _ in range(299)]
            with Peer(server, key=None) as extra:
                try:
                    extra.raw(request(1, "ping", []))
                    self.assertIsNone(extra.read())
                except (BrokenPipeError, ConnectionResetError):
                    pass
            for peer in others:
                peer.request("generate", prompt="abc", max_tokens=3)
            for peer in others:
                self.assertEqual(peer.read()[3]["text"], "abc")
            for peer in others:
                peer.close()
            self.assertTrue(until(lambda: first.result("stats")["server"]["connections"] == 1))
            with Peer(server) as again:
                self.assertEqual(again.result("ping"), "pong")

    def test_connections_of_one_tenant(self):
        with Server("connections_per_tenant=5") as server:
            peers = [Peer(server) for _ in range(5)]
            with Peer(server, key=None) as sixth:
                self.assertEqual(sixth.error("auth", key="key-acme"),
                                 [0, "resource_exhausted: this tenant has 5 connections already."])
                self.assertEqual(sixth.result("auth", key="key-bolt")["tenant"], "bolt")
            self.assertEqual(peers[0].result("auth", key="key-acme-2")["tenant"], "acme")
            peers.pop().close()
            self.assertTrue(until(lambda: peers[0].result("stats")["tenant"]["connections"] == 4))
            Peer(server).close()
            for peer in peers:
                peer.close()

    def test_no_descriptors_left(self):
        import resource
        with Server() as server:
            peer = Peer(server)
            used = server.descriptors()
            resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (used + 3, used + 3))
            extra = []
            for _ in range(8):
                sock = socket.socket()
                sock.settimeout(5)
                sock.connect(server.address)
                extra.append(sock)
            self.assertEqual(peer.result("generate", prompt="a", max_tokens=3)["text"], "aaa")
            self.assertTrue(until(lambda: "accepting a connection failed" in server.log_text()))
            for sock in extra:
                sock.close()
            with Peer(server) as late:
                self.assertEqual(late.result("ping"), "pong")

    def test_10000_requests_leave_nothing(self):
        """RSS and descriptors stay flat: half of the requests end well, the rest in every other way."""
        with Server(delay_us=0) as server, Peer(server) as steady:
            def round_of(count):
                peers = [Peer(server) for _ in range(10)]
                for peer in peers:
                    for i in range(count // 20):
                        peer.request("generate", prompt="abc" * 20, max_tokens=20, stream=i % 2 == 0)
                        kind = i % 5
                        if kind == 0:
                            peer.request("generate", prompt="a", n=99)
                        elif kind == 1:
                            peer.request("generate", prompt="a", model="nope", max_tokens=4)
                        elif kind == 2:
                            peer.send([2, "cancel", [{"id": peer.next_id}]])
                            peer.request("ping")
                        elif kind == 3:
                            peer.request("tokenize", text="hello " * 50)
                        else:
                            peer.request("generate", prompt="a", max_tokens=2, n=2, logprobs=3)
                    peer.request("ping")
                for peer in peers:
                    seen = 0
                    while seen < peer.next_id - 101:  # one was auth
                        seen += peer.read()[0] == 1
                    peer.close()

            for _ in range(5):  # touches every table, and shows the allocator its peak
                round_of(1000)
            self.assertTrue(until(lambda: engine_stats(steady)["running"] == 0))
            descriptors = server.descriptors()
            for _ in range(3):  # a leak shows every time, a new peak of the allocator does not
                before = server.rss_kib()
                for _ in range(10):
                    round_of(1000)
                self.assertTrue(until(lambda: steady.result("stats")["server"]["connections"] == 1))
                grown = server.rss_kib() - before
                print("RSS before %d KiB, grown by %d KiB over 10,000 requests" % (before, grown))
                if grown < 512:
                    break
            if not sanitized():  # a sanitizer keeps freed memory on purpose
                self.assertLess(grown, 512)
            self.assertEqual(server.descriptors(), descriptors)
            stats = steady.result("stats")
            self.assertEqual(stats["tenant"]["parallel"], 0)
            self.assertLess(stats["server"]["buffered_bytes"], 20000)


if __name__ == "__main__":
    unittest.main(verbosity=1)
