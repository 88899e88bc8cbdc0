# SPDX-License-Identifier: Apache-2.0
"""adapters.upload: what a client may send, in which order, how much, and that nothing of it stays."""
import hashlib
import os
import sys
import time
import unittest

from test_server_lib import Peer, Server, TENANTS, key_hash, until

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "clients", "python"))
import polder  # noqa: E402

MAX = 300000
CONFIG, WEIGHTS = b'{"peft_type": "LORA"}', bytes(range(256)) * 400


def digest_of(config, weights):
    digest = hashlib.blake2b(digest_size=32)
    for data in (config, weights):
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


GOOD = {"config_bytes": len(CONFIG), "weights_bytes": len(WEIGHTS), "digest": digest_of(CONFIG, WEIGHTS)}


class Uploads(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = Server(extra=["--upload-bytes", str(MAX)])
        cls.uploads = os.path.join(cls.server.state, "uploads")

    @classmethod
    def tearDownClass(cls):
        cls.server.stop()

    def there(self):
        return sorted(os.listdir(self.uploads)) if os.path.exists(self.uploads) else []

    def tearDown(self):
        self.assertTrue(until(lambda: self.there() == []), self.there())
        with Peer(self.server) as peer:  # the whole budget is there again
            all_of_it = {"name": "acme-all", "config_bytes": 1, "weights_bytes": MAX - 1, "digest": "0" * 64}
            begun = until(lambda: peer.call("adapters.upload", **all_of_it)[3])  # a connection may just be closing
            self.assertTrue(begun)
            peer.result("adapters.upload_abort", upload=begun["upload"])

    def begin(self, peer, name="acme-tmp", **changes):
        return peer.result("adapters.upload", name=name, **dict(GOOD, **changes))["upload"]

    def send(self, peer, upload, data, size=7000, offset=0):
        for at in range(0, len(data), size):
            piece = data[at:at + size]
            answer = peer.result("adapters.upload_chunk", upload=upload, offset=offset + at, data=piece)
            self.assertEqual(answer, {"received": offset + at + len(piece)})

    def test_upload_becomes_an_adapter(self):
        with Peer(self.server) as peer:
            for version, size in ((1, 7000), (2, 1), (2, 1 << 20)):
                weights = WEIGHTS if size > 1 else WEIGHTS[:200]
                upload = self.begin(peer, "acme-up", weights_bytes=len(weights), digest=digest_of(CONFIG, weights))
                self.send(peer, upload, CONFIG + weights, size)
                self.assertEqual(len(self.there()), 1)
                answer = peer.result("adapters.upload_commit", upload=upload)
                self.assertEqual(answer, {"name": "acme-up", "report": {"applied": 4, "possible": 8, "version": version}})
                self.assertTrue(until(lambda: self.there() == []))
            self.assertIn("acme-up@acme.adapter", os.listdir(self.server.store))
            self.assertEqual(peer.result("generate", prompt="a", model="acme-up", max_tokens=1)["text"], "a")
            upload = self.begin(peer, "acme-up", replace=False)
            self.send(peer, upload, CONFIG + WEIGHTS)
            self.assertEqual(peer.error("adapters.upload_commit", upload=upload)[1][:14], "already_exists")
            peer.result("adapters.remove", name="acme-up")

    def test_files_arrive_as_they_were_sent(self):
        with Peer(self.server) as peer:
            upload = self.begin(peer)
            self.send(peer, upload, CONFIG + WEIGHTS, 10)  # one chunk goes over from the first file to the second
            folder = os.path.join(self.uploads, self.there()[0])
            for name, data in (("adapter_config.json", CONFIG), ("adapter_model.safetensors", WEIGHTS)):
                with open(os.path.join(folder, name), "rb") as file:
                    self.assertEqual(file.read(), data)
            self.assertEqual(os.stat(folder).st_mode & 0o777, 0o700)
            peer.result("adapters.upload_abort", upload=upload)

    def test_refused_at_the_beginning(self):
        with Peer(self.server, key="key-bolt") as peer:
            self.assertEqual(peer.error("adapters.upload", name="bolt-x", **GOOD)[1][:17], "permission_denied")
        with Peer(self.server) as peer:
            for changes in ({"config_bytes": 0}, {"weights_bytes": 0}, {"weights_bytes": MAX + 1}, {"config_bytes": 5 << 20},
                            {"digest": "12"}, {"digest": "g" * 64}, {"digest": None}, {"weights_bytes": -1}, {"x": 1},
                            {"replace": "yes"}, {"config_bytes": "5"}):
                self.assertEqual(peer.error("adapters.upload", name="acme-up", **dict(GOOD, **changes))[0], 1, changes)
            for name in ("../x", "a/b", ".x", "", "x" * 64):
                self.assertEqual(peer.error("adapters.upload", name=name, **GOOD)[0], 1, name)
            for name in ("bolt-x", "demo"):
                self.assertEqual(peer.error("adapters.upload", name=name, **GOOD)[1][:17], "permission_denied", name)
            self.assertTrue(until(lambda: self.there() == []), self.there())  # that of the test before is leaving
            self.begin(peer)
            self.assertEqual(peer.error("adapters.upload", name="acme-up", **GOOD)[1][:5], "busy:")
        with Server() as server, Peer(server) as peer:
            error = peer.error("adapters.upload", name="acme-up", **GOOD)[1]
            self.assertTrue(error.startswith("unsupported: ") and "--max-upload-bytes" in error, error)

    def test_refused_on_the_way(self):
        with Peer(self.server) as peer, Peer(self.server) as other:
            upload = self.begin(peer)
            for wrong in ({"offset": 1, "data": b"a"}, {"offset": 0, "data": "a"}, {"offset": 0, "data": b""}, {"offset": 0},
                          {"data": b"a"}, {"offset": 0, "data": b"a" * 110000}, {"offset": 0, "data": b"a", "file": "x"}):
                self.assertEqual(peer.error("adapters.upload_chunk", upload=upload, **wrong)[0], 1, wrong)
            for method, more in (("adapters.upload_chunk", {"offset": 0, "data": b"a"}), ("adapters.upload_commit", {}),
                                 ("adapters.upload_abort", {})):
                for peer_, id_ in ((other, upload), (peer, upload + 1), (peer, None)):
                    self.assertEqual(peer_.error(method, upload=id_, **more),
                                     [0, "not_found: this connection has no such upload open."])
            error = peer.error("adapters.upload_commit", upload=upload)
            self.assertEqual(error[1], "invalid_argument: %d of %d bytes have not come yet." % (
                len(CONFIG + WEIGHTS), len(CONFIG + WEIGHTS)))
            self.send(peer, upload, CONFIG + WEIGHTS)  # all that was refused has changed nothing
            self.assertEqual(peer.result("adapters.upload_commit", upload=upload)["name"], "acme-tmp")
            self.assertEqual(peer.error("adapters.upload_abort", upload=upload)[1][:9], "not_found")

    def test_chunks_are_sent_one_at_a_time(self):
        """What comes while a chunk is written is told to wait; it never mixes with it."""
        with Peer(self.server) as peer:
            upload = self.begin(peer, name="acme-fast")
            data, at, refused = CONFIG + WEIGHTS, 0, 0
            while at < len(data):
                ids = [peer.request("adapters.upload_chunk", upload=upload, offset=at + i * 9000,
                                    data=data[at + i * 9000:at + i * 9000 + 9000]) for i in range(3)
                       if at + i * 9000 < len(data)]
                for _ in ids:
                    message = peer.read()
                    if message[2] is None:
                        at = max(at, message[3]["received"])
                    else:
                        refused += 1
                        self.assertRegex(message[2][1], "busy|invalid_argument: the next chunk begins at")
            self.assertEqual(peer.result("adapters.upload_commit", upload=upload)["name"], "acme-fast")
            peer.result("adapters.remove", name="acme-fast")

    def test_damaged_on_the_way(self):
        with Peer(self.server) as peer:
            upload = self.begin(peer, name="acme-bad")
            self.send(peer, upload, CONFIG + WEIGHTS[:-1] + b"x")
            self.assertEqual(peer.error("adapters.upload_commit", upload=upload)[1][:8], "corrupt:")
            self.assertTrue(until(lambda: self.there() == []))
            self.assertEqual(peer.error("adapters.upload_commit", upload=upload)[1][:9], "not_found")

    def test_budget_of_all_together(self):
        with Peer(self.server) as peer, Peer(self.server) as other:
            self.begin(peer, config_bytes=1, weights_bytes=MAX - 2)
            error = other.error("adapters.upload", name="acme-2", **GOOD)[1]
            self.assertTrue(error.startswith("resource_exhausted: this tenant has uploads of %d bytes under way, and may have "
                                             "%d " % (MAX - 1, MAX)) and "retry after" in error, error)
            peer.close()
            self.assertTrue(until(lambda: other.call("adapters.upload", name="acme-2", **GOOD)[2] is None))

    def test_one_tenant_has_a_share(self):
        """Of two tenants that may upload, neither can take all places or all bytes, and is told when to come again."""
        more = TENANTS.replace("  - name: cape", "  - name: dune\n    keys_blake2b: [%s]\n    allowed_adapters: [\"dune-*\"]\n"
                               "    manage_adapters: true\n  - name: cape" % key_hash("key-dune"))
        small = dict(GOOD, config_bytes=1, weights_bytes=1)
        with Server(tenants=more, extra=["--upload-bytes", "4000"]) as server:
            peers = [Peer(server) for _ in range(5)]
            for peer in peers:
                peer.result("hello", structured_errors=True)
            error = peers[0].error("adapters.upload", name="acme-big", **dict(GOOD, config_bytes=1, weights_bytes=1000))
            self.assertEqual((error["code"], "retry_after_ms" in error), ("resource_exhausted", False), error)
            for i, peer in enumerate(peers[:4]):
                peer.result("adapters.upload", name="acme-%d" % i, **small)
            error = peers[4].error("adapters.upload", name="acme-4", **small)
            self.assertEqual((error["code"], error["retry_after_ms"]), ("resource_exhausted", 5000), error)
            self.assertIn("this tenant has 4 uploads under way, and may have 4 at a time; retry after", error["message"])
            with Peer(server, key="key-dune") as other:
                other.result("adapters.upload", name="dune-1", **dict(GOOD, config_bytes=1, weights_bytes=999))
            for peer in peers:
                peer.close()

    def test_server_ends_while_the_disk_works(self):
        """Connections go and the server is told twice to leave, before the disk's thread has said that it is done:
        nothing is leaked (ASan) and nothing stays behind."""
        small = dict(GOOD, config_bytes=1, weights_bytes=5000)
        for last in ("begun", "asked", "written"):
            server = Server(extra=["--upload-bytes", str(1 << 20)])
            peers = [Peer(server) for _ in range(8)]
            for i, peer in enumerate(peers):
                if last == "asked":
                    peer.request("adapters.upload", name="acme-%d" % i, **small)
                    continue
                upload = peer.result("adapters.upload", name="acme-%d" % i, **small)["upload"]
                if last == "written":
                    peer.request("adapters.upload_chunk", upload=upload, offset=0, data=b"x" * 5000)
            for peer in peers:
                peer.close()
            state = server.state
            server.stop(keep=True)
            left = [files for _, _, files in os.walk(os.path.join(state, "uploads"))]
            self.assertIn(left, ([], [[]]), last)
            server.folder.cleanup()

    def test_one_that_stands_still_goes(self):
        with Server("upload_timeout_ms=400", extra=["--upload-bytes", str(MAX)]) as server, Peer(server) as peer:
            upload = self.begin(peer)
            for at in range(4):  # longer than the limit, but never still
                time.sleep(0.15)
                peer.result("adapters.upload_chunk", upload=upload, offset=at, data=(CONFIG + WEIGHTS)[at:at + 1])
            self.assertTrue(until(lambda: os.listdir(os.path.join(server.state, "uploads")) == []))
            self.assertEqual(peer.error("adapters.upload_chunk", upload=upload, offset=4, data=b"a"),
                             [0, "not_found: this connection has no such upload open."])
            self.begin(peer)

    def test_goes_with_its_connection(self):
        for end in ("close", "shutdown", "garbage"):
            peer = Peer(self.server)
            upload = self.begin(peer)
            self.send(peer, upload, CONFIG + WEIGHTS[:20000])
            self.assertEqual(len(self.there()), 1)
            if end == "shutdown":
                peer.socket.shutdown(1)
            elif end == "garbage":
                peer.raw(b"\xc1")
            else:
                peer.close()
            self.assertTrue(until(lambda: self.there() == []), end)
            peer.close()
        # also while it is converted
        peer = Peer(self.server)
        upload = self.begin(peer)
        self.send(peer, upload, CONFIG + WEIGHTS)
        peer.request("adapters.upload_commit", upload=upload)
        peer.close()

    def test_other_tenant_on_the_same_connection(self):
        """The upload goes with the tenant that began it; another key of the same tenant changes nothing."""
        with Peer(self.server) as peer:
            upload = self.begin(peer)
            peer.result("auth", key="key-acme-2")
            self.assertEqual(len(self.there()), 1)
            self.send(peer, upload, CONFIG)
            peer.result("auth", key="key-bolt")
            self.assertTrue(until(lambda: self.there() == []))
            peer.result("auth", key="key-acme")
            self.assertEqual(peer.error("adapters.upload_commit", upload=upload)[1][:9], "not_found")
            self.begin(peer)

    def test_python_client(self):
        folder = os.path.join(self.server.folder.name, "peft")
        os.makedirs(folder, exist_ok=True)
        for name, data in (("adapter_config.json", CONFIG), ("adapter_model.safetensors", WEIGHTS)):
            with open(os.path.join(folder, name), "wb") as file:
                file.write(data)
        with polder.Client("%s:%d" % self.server.address, key="key-acme") as client:
            self.assertEqual(client.upload_adapter("acme-py", folder)["name"], "acme-py")
            with self.assertRaises(polder.PolderError):
                client.upload_adapter("bolt-py", folder)
            client.remove_adapter("acme-py")


if __name__ == "__main__":
    unittest.main(verbosity=1)
