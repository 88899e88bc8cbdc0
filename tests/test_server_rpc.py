# SPDX-License-Identifier: Apache-2.0
"""The methods, over TCP and a Unix socket, by a plain socket and by clients/python."""
import os
import random
import signal
import sys
import threading
import time
import unittest

from test_server_lib import CONTEXT, Peer, Server, TENANTS, engine_stats, key_hash, sanitized, until

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "clients", "python"))
import polder  # noqa: E402


class Methods(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = Server()

    @classmethod
    def tearDownClass(cls):
        cls.server.stop()

    def test_deny_by_default(self):
        with Peer(self.server, key=None) as peer:
            for method in ("generate", "models", "stats", "adapters.list", "tokenize", "nonsense"):
                self.assertEqual(peer.error(method), [0, "unauthenticated: call auth with a key first."])
            self.assertEqual(peer.result("ping"), "pong")
            self.assertFalse(peer.result("hello")["authenticated"])
            self.assertEqual(peer.error("auth", key="wrong"), [0, "unauthenticated: the key is wrong."])
            self.assertEqual(peer.result("auth", key="key-bolt"), {"tenant": "bolt", "model": "demo"})
            self.assertEqual(peer.result("stats")["tenant"]["name"], "bolt")
            self.assertTrue(peer.result("hello")["authenticated"])

    def test_three_wrong_keys_close(self):
        with Peer(self.server, key=None) as peer:
            for _ in range(3):
                peer.error("auth", key="wrong")
            self.assertEqual(peer.last_words(), [])

    def test_generate_streams_then_answers(self):
        for unix in (False, True):
            with Peer(self.server, unix=unix) as peer:
                result = peer.result("generate", prompt="zwölf ", max_tokens=21, stream=True, logprobs=2,
                                     seed=7)
                self.assertEqual(result["text"], "zwölf zwölf zwölf ")
                self.assertEqual(result["finish_reason"], "length")
                self.assertEqual(result["seed"], 7)
                self.assertEqual(result["usage"]["prompt_tokens"], 7)
                self.assertEqual(result["usage"]["completion_tokens"], 21)
                self.assertNotIn("tokens", result)
                notes = [note[2][0] for note in peer.notes]
                self.assertEqual({note["id"] for note in notes}, {peer.next_id})
                self.assertEqual("".join(note["text"] for note in notes), result["text"])
                self.assertEqual([note["token"] for note in notes], list("zwölf ".encode()) * 3)
                self.assertTrue(all(note["logprob"] == -0.5 and len(note["top"]) == 2 for note in notes))

    def test_generate_whole(self):
        with Peer(self.server) as peer:
            result = peer.result("generate", prompt=[65, 66, 67], max_tokens=4)
            self.assertEqual((result["text"], result["tokens"]), ("ABCA", [65, 66, 67, 65]))
            self.assertEqual(peer.notes, [])
            self.assertNotIn("logprobs", result)
            result = peer.result("generate", prompt="ab", max_tokens=3, n=3, logprobs=True, seed=2**64 - 1)
            self.assertEqual([choice["text"] for choice in result["choices"]], ["aba"] * 3)
            self.assertEqual([choice["index"] for choice in result["choices"]], [0, 1, 2])
            self.assertEqual(result["choices"][2]["logprobs"][0], {"token": 97, "logprob": -0.5})
            self.assertEqual(result["usage"]["completion_tokens"], 9)
            self.assertEqual(result["usage"]["prompt_tokens"], 2)

    def test_stops(self):
        with Peer(self.server) as peer:
            result = peer.result("generate", prompt="hello world", stop=["o w"], max_tokens=50, stream=True)
            self.assertEqual(result["finish_reason"], "stop")
            result = peer.result("generate", prompt="hello", stop="nowhere", max_tokens=3, stream=True)
            self.assertEqual((result["text"], result["finish_reason"]), ("hel", "length"))
            notes = [note[2][0] for note in peer.notes if note[2][0]["id"] == peer.next_id]
            self.assertEqual("".join(note["text"] for note in notes), "hel")
            self.assertIsNone(notes[-1]["token"])  # held back, became final at the end
            result = peer.result("generate", prompt="abc", stop_token_ids=[99], max_tokens=50)
            self.assertEqual((result["text"], result["finish_reason"]), ("ab", "stop"))
            self.assertEqual(peer.result("generate", prompt=[97, 256], max_tokens=9)["text"], "a")
            self.assertEqual(peer.result("generate", prompt=[97, 256], max_tokens=4,
                                         ignore_eos=True)["text"], "aa")

    def test_nil_is_default(self):
        with Peer(self.server) as peer:
            fields = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stop_token_ids", "n",
                      "logprobs", "stream", "ignore_eos", "deadline_ms", "priority_class", "model")
            result = peer.result("generate", prompt="a", **{name: None for name in fields})
            self.assertEqual(result["usage"]["completion_tokens"], 256)
            self.assertEqual(result["model"], "demo")

    def test_parameters_are_checked(self):
        bad = [("temperature", float("nan")), ("temperature", float("inf")), ("temperature", -0.1),
               ("temperature", 1e308), ("temperature", "1"), ("top_p", 0), ("top_p", 1.5), ("top_p", None),
               ("top_k", -1), ("top_k", 301), ("top_k", 1.0), ("seed", -1), ("seed", 0.5),
               ("max_tokens", 0), ("max_tokens", -5), ("max_tokens", CONTEXT + 1), ("max_tokens", 2**63),
               ("max_tokens", True), ("n", 0), ("n", 9), ("logprobs", 9), ("logprobs", -1),
               ("stop", ""), ("stop", [""]), ("stop", ["x"] * 9), ("stop", [5]), ("stop", "x" * 129),
               ("stop_token_ids", [300]), ("stop_token_ids", [-1]), ("stop_token_ids", list(range(9))),
               ("stop_token_ids", 5), ("stream", 1), ("ignore_eos", "yes"), ("deadline_ms", 0),
               ("deadline_ms", 10**9), ("priority_class", "urgent"), ("model", ""), ("model", 5),
               ("model", "a\0b"), ("model", "x" * 200), ("temprature", 1), ("prompt", ""), ("prompt", []),
               ("prompt", [300]), ("prompt", [-1]), ("prompt", [1.0]), ("prompt", ["a"]), ("prompt", None),
               ("prompt", 5), ("prompt", b"bytes"), ("prompt", [2**64 - 1]), ("prompt", {"a": 1}),
               ("prompt", "x" * 40000), ("prompt", [1] * 3000)]
        with Peer(self.server) as peer:
            before = engine_stats(peer)["requests"]
            for name, value in bad:
                if (name, value) == ("top_p", None):
                    continue
                error = peer.error("generate", **{"prompt": "a", "max_tokens": 1, name: value})
                self.assertEqual(error[0], 1, (name, value, error))
                self.assertTrue(error[1].startswith("invalid_argument: "), error)
                self.assertIn(name, error[1])
            self.assertEqual(engine_stats(peer)["requests"], before)
            self.assertEqual(peer.result("generate", prompt="a", max_tokens=1)["text"], "a")

    def test_unknown_field_is_named(self):
        with Peer(self.server) as peer:
            self.assertIn('unknown field "temprature"; known: model, prompt,',
                          peer.error("generate", prompt="a", temprature=1)[1])
            self.assertIn('unknown field "ключ', peer.error("hello", **{"ключ" * 20: 1})[1])
            for params in ([1], ["x"], [{}, {}], [[1]], {}, None, "x", 5):
                peer.next_id += 1
                peer.send([0, peer.next_id, "generate", params])
                self.assertEqual(peer.response(peer.next_id)[2][0], 1, params)
            for params in ([], [None], [{}], [[]]):
                peer.next_id += 1
                peer.send([0, peer.next_id, "models", params])
                self.assertIsNone(peer.response(peer.next_id)[2])

    def test_context_is_said_with_numbers(self):
        with Peer(self.server) as peer:
            self.assertEqual(peer.error("generate", prompt="a" * CONTEXT)[1],
                             "invalid_argument: the prompt has 2048 tokens; the context of 2048 tokens must "
                             "hold it and at least one more.")
            self.assertEqual(peer.error("generate", prompt="a" * 2000, max_tokens=49)[1],
                             "invalid_argument: the prompt has 2000 tokens and max_tokens is 49; together "
                             "they exceed the context of 2048 tokens.")
            result = peer.result("generate", prompt="a" * (CONTEXT - 1))
            self.assertEqual(result["usage"]["completion_tokens"], 1)

    def test_adapters_of_others_do_not_exist(self):
        with Peer(self.server) as peer:
            self.assertEqual(peer.result("generate", prompt="a", model="acme-one", max_tokens=1)["model"],
                             "acme-one")
            answers = []
            for name in ("bolt-one", "bolt-two", "ghost", "../one"):
                peer.next_id = 500  # the same msgid every time, to compare bytes
                peer.send([0, 501, "generate", [{"prompt": "a", "model": name}]])
                data = peer.socket.recv(4096)
                peer.unpacker = type(peer.unpacker)(raw=False)
                answers.append(data.replace(name.encode(), b"NAME"))
            sizes = {len(answer) - len("NAME") for answer in answers}
            self.assertEqual(len({answer[8:] for answer in answers[:2]}), 1)
            self.assertLessEqual(len(sizes), 2)
            self.assertEqual([m["id"] for m in peer.result("models")], ["demo", "acme-one", "shared"])
            names = [m["name"] for m in peer.result("adapters.list")]
            self.assertEqual(names, ["acme-one", "shared"])
        with Peer(self.server, key="key-cape") as peer:
            self.assertEqual(peer.error("generate", prompt="a", model="shared"),
                             [0, 'not_found: there is no model "shared".'])
            self.assertEqual([m["id"] for m in peer.result("models")], ["demo"])

    def test_tokenize_and_back(self):
        with Peer(self.server) as peer:
            text = "Grüße, 世界 🌍"
            tokens = peer.result("tokenize", text=text)
            self.assertEqual(tokens["count"], len(tokens["tokens"]))
            self.assertEqual(peer.result("detokenize", tokens=tokens["tokens"])["text"], text)
            self.assertEqual(peer.result("tokenize", text=""), {"count": 0, "tokens": []})
            self.assertEqual(peer.result("detokenize", tokens=[])["text"], "")
            self.assertEqual(peer.result("detokenize", tokens=[0xC3])["text"], "\ufffd")
            rng = random.Random(3)
            for _ in range(200):
                raw = bytes(rng.choice(b"a\x80\xbf\xc2\xe0\xa0\xed\xf0\x90\xf4\x8f\xff") for _ in range(12))
                self.assertEqual(peer.result("detokenize", tokens=list(raw))["text"],
                                 raw.decode("utf-8", "replace"))
            for params in ({}, {"text": 5}, {"text": None}, {"text": "a", "x": 1}):
                self.assertEqual(peer.error("tokenize", **params)[0], 1)
            for params in ({}, {"tokens": 5}, {"tokens": [300]}, {"tokens": [-1]}, {"tokens": ["a"]}):
                self.assertEqual(peer.error("detokenize", **params)[0], 1)

    def test_cancel(self):
        with Peer(self.server) as peer:
            self.assertEqual(peer.result("cancel", id=4711), {"found": False})
            self.assertEqual(peer.error("cancel")[0], 1)
            self.assertEqual(peer.error("cancel", id=-1)[0], 1)
            msgid = peer.request("generate", prompt="abc", max_tokens=2000, stream=True)
            self.assertEqual(peer.read()[1], "token")
            peer.send([2, "cancel", [{"id": msgid}]])
            result = peer.response(msgid)[3]
            self.assertEqual(result["finish_reason"], "cancelled")
            self.assertLess(len(result["text"]), 2000)
            msgid = peer.request("generate", prompt="abc", max_tokens=2000, n=2)
            other = peer.request("cancel", id=msgid)
            self.assertEqual(peer.response(other)[3], {"found": True})
            result = peer.response(msgid)[3]
            self.assertEqual([c["finish_reason"] for c in result["choices"]], ["cancelled"] * 2)
            peer.send([2, "cancel", [{"id": 1}]])
            peer.send([2, "cancel", ["rubbish"]])
            peer.send([2, "no_such_thing", []])
            self.assertEqual(peer.result("ping"), "pong")

    def test_deadline(self):
        with Peer(self.server) as peer:
            error = peer.error("generate", prompt="abc", max_tokens=2000, deadline_ms=30)
            self.assertTrue(error[1].startswith("deadline_exceeded: "), error)

    def test_disconnect_cancels(self):
        with Peer(self.server) as watcher:
            before = engine_stats(watcher)["cancels"]
            peer = Peer(self.server)
            for _ in range(5):
                peer.request("generate", prompt="abc", max_tokens=2000, stream=True)
            self.assertTrue(until(lambda: engine_stats(watcher)["running"] == 5))
            peer.close()
            self.assertTrue(until(lambda: engine_stats(watcher)["running"] == 0))
            self.assertEqual(engine_stats(watcher)["cancels"], before + 5)
            self.assertEqual(watcher.result("stats")["tenant"]["parallel"], 0)

    def test_structured_errors(self):
        with Peer(self.server, key="key-bolt") as peer:
            peer.result("hello", structured_errors=True)
            self.assertEqual(peer.error("generate", prompt="a", n=0),
                             {"type": 1, "code": "invalid_argument",
                              "message": "n must be an integer from 1 to 8."})
            self.assertEqual(peer.error("generate", prompt="a", max_tokens=101),
                             {"type": 0, "code": "resource_exhausted",
                              "message": "max_tokens is 100, 100 remaining.", "kind": "max_tokens",
                              "limit": 100, "remaining": 100, "retry_after_ms": 0, "billed": False})

    def test_manage_adapters(self):
        good = os.path.join(self.server.adapters, "good")
        os.makedirs(os.path.join(good, "deeper"))
        open(os.path.join(good, "adapter_config.json"), "w").close()
        os.mkdir(os.path.join(self.server.adapters, "empty"))
        os.symlink("/etc", os.path.join(self.server.adapters, "link"))
        with Peer(self.server, key="key-bolt") as peer:
            self.assertEqual(peer.error("adapters.register", name="bolt-x", path="good"),
                             [0, "permission_denied: this tenant may not manage adapters."])
            self.assertTrue(peer.error("adapters.remove", name="bolt-one")[1].startswith("permission"))
        with Peer(self.server) as peer:
            self.assertEqual(peer.result("adapters.register", name="acme-x", path="good"),
                             {"name": "acme-x", "report": {"applied": 4, "possible": 8, "version": 1}})
            self.assertEqual(os.listdir(self.server.store), ["acme-x@acme.adapter"])
            self.assertEqual(peer.error("adapters.register", name="acme-x", path=good, replace=False)[1][:14],
                             "already_exists")
            self.assertEqual(peer.result("adapters.register", name="acme-x", path=good)["report"]["version"], 2)
            self.assertEqual(peer.error("adapters.register", name="acme-x", path=good, replace=1)[0], 1)
            ids = [peer.request("adapters.register", name="acme-x", path="good") for _ in range(2)]
            answers = {message[1]: message for message in (peer.read(), peer.read())}
            self.assertIsNone(answers[ids[0]][2])
            second = answers[ids[1]][2]  # the first may have been done
            self.assertTrue(second is None or second[1].startswith("busy: "), second)
            self.assertEqual(peer.error("adapters.register", name="acme-y", path="empty"),
                             [0, "corrupt: there is no adapter_config.json."])
            self.assertEqual(len(os.listdir(self.server.store)), 1)
            self.assertEqual(peer.error("adapters.register", name="bolt-x", path="good")[1][:17],
                             "permission_denied")
            for path in ("/etc", "../..", "good/..", "good/../good", "./good", "link", "good//deeper",
                         "missing", "/", self.server.adapters + "/../adapters/good"):
                error = peer.error("adapters.register", name="acme-y", path=path)
                self.assertEqual(error[1][:9], "not_found", path)
            for name in ("../x", "a/b", ".x", "", "x" * 64, "a b"):
                self.assertEqual(peer.error("adapters.register", name=name, path="good")[0], 1, name)
            self.assertIn({"name": "acme-x", "own": True}, peer.result("adapters.list"))
            self.assertEqual(peer.result("generate", prompt="a", model="acme-x", max_tokens=1)["text"], "a")
            self.assertEqual(peer.result("adapters.remove", name="acme-x"), {"name": "acme-x"})
            for name in ("acme-x", "bolt-one"):
                self.assertEqual(peer.error("adapters.remove", name=name)[1],
                                 'not_found: there is no model "%s".' % name)

    def test_what_the_disk_did_not_do(self):
        """The engine has done it and the client hears how far the disk came: the file's place is one step, the
        directory's sync another."""
        with Server() as server, Peer(server) as peer:
            os.mkdir(os.path.join(server.adapters, "good"))
            open(os.path.join(server.adapters, "good", "adapter_config.json"), "w").close()
            fails = os.path.join(server.store, "sync-fails")
            open(fails, "w").close()
            self.assertEqual(peer.error("adapters.register", name="acme-x", path="good")[1],
                             "io_error: It serves and its file is in its place, but may be lost if the power fails: "
                             "syncing the registry's directory failed: Input/output error.")
            self.assertEqual(sorted(os.listdir(server.store)), ["acme-x@acme.adapter", "sync-fails"])
            self.assertEqual(peer.result("generate", prompt="a", model="acme-x", max_tokens=1)["text"], "a")
            self.assertEqual(peer.error("adapters.remove", name="acme-x")[1],
                             "io_error: It is gone and so is its file, but may be back if the power fails: "
                             "syncing the registry's directory failed: Input/output error.")
            self.assertEqual(os.listdir(server.store), ["sync-fails"])
            os.unlink(fails)
            os.mkdir(os.path.join(server.store, "acme-x@acme.adapter"))  # no file goes there
            self.assertEqual(peer.error("adapters.register", name="acme-x", path="good")[1][:57],
                             "io_error: It serves until the next restart, but was not k")
            self.assertTrue(until(lambda: os.listdir(server.store) == ["acme-x@acme.adapter"]))
            self.assertEqual(peer.error("adapters.remove", name="acme-x")[1][:60],
                             "io_error: It is gone until the next restart, but its file is")
            log = server.log_text()
            for said in ("is registered, unless the power fails now", "is removed, unless the power fails now",
                         "will be gone after a restart", "will be back after a restart"):
                self.assertIn("adapter acme-x " + said, log)

    def test_register_has_an_older_name(self):
        with Peer(self.server) as peer:
            wrong = [peer.error(method, name="acme-x") for method in ("adapters.register", "adapters.add")]
            self.assertEqual(wrong[0], wrong[1])
            hello = peer.result("hello")["capabilities"]
            for name in ("models", "adapters.list", "adapters.stats", "adapters.register", "adapters.add", "adapters.remove",
                         "adapters.load", "adapters.unload", "adapters.pin", "adapters.unpin", "stats", "cancel"):
                self.assertIn(name, hello)
            self.assertNotIn("adapters.upload", hello)  # this server takes none
            self.assertEqual(len(hello), len(set(hello)))
        with Server(extra=["--upload-bytes", "1000"]) as server, Peer(server) as peer:
            self.assertIn("adapters.upload", peer.result("hello")["capabilities"])

    def test_lists_come_in_pages(self):
        """The stand-in engine gives two at a time, so every list here takes several questions to it."""
        with Server() as server, Peer(server) as peer:
            os.mkdir(os.path.join(server.adapters, "good"))
            open(os.path.join(server.adapters, "good", "adapter_config.json"), "w").close()
            names = ["acme-%d" % i for i in range(7)]
            for name in names:
                peer.result("adapters.register", name=name, path="good")
            names = sorted(names + ["acme-one", "shared"])
            self.assertEqual([a["name"] for a in peer.result("adapters.list")], names)
            self.assertEqual([m["id"] for m in peer.result("models")], ["demo"] + names)
            self.assertEqual(peer.result("adapters.stats")["registered"], len(names))
            for limit in (1, 2, 3, 4, 8, 9, 10, 1000):
                walked, after, pages = [], None, 0
                while True:
                    answer = peer.result("adapters.list", after=after, limit=limit)
                    walked += [a["name"] for a in answer["adapters"]]
                    pages += 1
                    if not answer["more"]:
                        break
                    self.assertEqual(len(answer["adapters"]), limit)
                    after = walked[-1]
                self.assertEqual((walked, pages), (names, -(-len(names) // limit)))
            answer = peer.result("models", limit=2)
            self.assertEqual([m["id"] for m in answer["models"]], ["demo"] + names[:2])
            answer = peer.result("models", after=names[-2])
            self.assertEqual(([m["id"] for m in answer["models"]], answer["more"]), ([names[-1]], False))
            for wrong in ({"limit": 0}, {"limit": 1001}, {"limit": "5"}, {"after": 5}, {"x": 1}):
                self.assertEqual(peer.error("adapters.list", **wrong)[0], 1, wrong)

    def test_what_another_tenant_has_is_not_seen(self):
        """However wide its patterns: of adapters its own and the operator's, of tenants itself."""
        more = TENANTS.replace("  - name: cape", "  - name: dune\n    keys_blake2b: [%s]\n    allowed_adapters: [\"*\"]\n"
                               "    manage_adapters: true\n  - name: cape" % key_hash("key-dune"))
        with Server(tenants=more) as server, Peer(server) as acme, Peer(server, key="key-dune") as dune:
            os.mkdir(os.path.join(server.adapters, "good"))
            open(os.path.join(server.adapters, "good", "adapter_config.json"), "w").close()
            acme.result("adapters.register", name="acme-secret", path="good")
            dune.result("adapters.register", name="own", path="good")
            listed = dune.result("adapters.list")
            self.assertEqual({a["name"]: a["own"] for a in listed},
                             {"acme-one": False, "bolt-one": False, "shared": False, "own": True})
            self.assertNotIn("acme-secret", [m["id"] for m in dune.result("models")])
            self.assertEqual(dune.result("adapters.stats")["registered"], 4)
            self.assertEqual(set(dune.result("stats")), {"tenant", "server", "engine"})
            self.assertNotIn("acme", str(dune.result("stats")))
            self.assertIn("dune", [t["name"] for t in acme.result("stats")["tenants"]])  # see_tenants
            self.assertEqual(dune.error("adapters.remove", name="acme-secret"),
                             [0, 'not_found: there is no model "acme-secret".'])

    def test_use_by_others_is_not_seen(self):
        """Of the operator's adapters everybody reads what they are; how they are used only who sees all tenants."""
        described = {"name", "own", "pages", "file_bytes", "rank_min", "rank_max", "bytes", "applied", "possible",
                     "layout", "version", "digest", "source", "pinned"}
        use = {"resident", "users", "device_bytes", "host_bytes", "hits", "misses", "loads", "load_us", "load_us_max",
               "part_pages", "part_misses", "someday"}
        more = TENANTS.replace("  - name: cape", "  - name: dune\n    keys_blake2b: [%s]\n    allowed_adapters: [\"*\"]\n"
                               "    manage_adapters: true\n  - name: cape" % key_hash("key-dune"))
        with Server(tenants=more, extra=["--numbers"]) as server, Peer(server) as acme, Peer(server, key="key-dune") as dune:
            os.mkdir(os.path.join(server.adapters, "good"))
            open(os.path.join(server.adapters, "good", "adapter_config.json"), "w").close()
            dune.result("adapters.register", name="own", path="good")
            listed = {a["name"]: a for a in dune.result("adapters.list")}
            self.assertEqual({name: (set(a), a["pinned"]) for name, a in listed.items()},
                             {"acme-one": (described, False), "bolt-one": (described, False),
                              "shared": (described, False), "own": (described | use, True)})
            page = dune.result("adapters.list", limit=1)["adapters"]
            self.assertEqual(page, [listed["acme-one"]])
            stats = dune.result("adapters.stats")  # four, of which it uses one
            self.assertEqual([stats[key] for key in ("registered", "own", "resident", "pinned", "users", "device_bytes",
                                                     "host_bytes", "hits", "misses", "loads", "load_us", "file_bytes",
                                                     "pinned_bytes")],
                             [4, 1, 1, 1, 3, 1000, 1000, 5, 6, 7, 8, 4000, 1000])
            listed = acme.result("adapters.list")  # see_tenants; whose claim it is nobody reads
            self.assertEqual([(a["name"], set(a), a["pinned"]) for a in listed],
                             [(name, described | use, True) for name in ("acme-one", "shared")])
            stats = acme.result("adapters.stats")
            self.assertEqual([stats[key] for key in ("registered", "own", "resident", "pinned", "users", "hits", "pinned_bytes")],
                             [2, 0, 2, 2, 6, 10, 0])
        with Server(tenants=TENANTS.replace("see_tenants: true", "see_tenants: false"), extra=["--numbers"]) as server, \
                Peer(server) as acme:
            self.assertEqual([set(a) for a in acme.result("adapters.list")], [described, described])
            self.assertEqual(acme.result("adapters.stats")["users"], 0)

    def test_one_tenant_has_a_share_of_conversions(self):
        more = TENANTS.replace("  - name: cape", "  - name: dune\n    keys_blake2b: [%s]\n    allowed_adapters: [\"dune-*\"]\n"
                               "    manage_adapters: true\n  - name: cape" % key_hash("key-dune"))
        with Server(tenants=more) as server, Peer(server) as acme, Peer(server, key="key-dune") as dune:
            os.mkdir(os.path.join(server.adapters, "slow"))
            for name in ("adapter_config.json", "slow"):
                open(os.path.join(server.adapters, "slow", name), "w").close()
            acme.result("hello", structured_errors=True)
            ids = [acme.request("adapters.register", name="acme-%d" % i, path="slow") for i in range(3)]
            refused = acme.read()  # the third, at once; the others are answered when they are done
            self.assertEqual((refused[1], refused[2]["code"], refused[2]["retry_after_ms"]), (ids[2], "busy", 1000))
            self.assertIn("2 adapters of this tenant are being registered, and it may have 2 at a time", refused[2]["message"])
            dune.result("adapters.register", name="dune-1", path="slow")
            self.assertEqual({acme.read()[1], acme.read()[1]}, set(ids[:2]))
        with Server() as server, Peer(server) as acme:  # alone it may have all places
            os.mkdir(os.path.join(server.adapters, "slow"))
            for name in ("adapter_config.json", "slow"):
                open(os.path.join(server.adapters, "slow", name), "w").close()
            ids = [acme.request("adapters.register", name="acme-%d" % i, path="slow") for i in range(4)]
            self.assertEqual([acme.read()[2] for _ in ids], [None] * 4)

    def test_changes_have_a_rate(self):
        slow = TENANTS.replace("adapter_rpm_limit: 0", "adapter_rpm_limit: 5")
        with Server(tenants=slow) as server, Peer(server) as peer:
            peer.result("hello", structured_errors=True)
            for method in ("load", "unload", "pin", "unpin", "load"):
                peer.result("adapters." + method, name="acme-one")
            for method, more in (("unload", {}), ("remove", {}), ("register", {"path": "good"})):
                error = peer.error("adapters." + method, name="acme-one", **more)
                self.assertEqual((error["code"], error["kind"], error["limit"], error["remaining"]),
                                 ("resource_exhausted", "adapter_rpm_limit", 5, 0))
                self.assertTrue(0 < error["retry_after_ms"] <= 61000, error)
            self.assertEqual(peer.result("generate", prompt="a", max_tokens=1)["text"], "a")
            self.assertEqual(len(peer.result("adapters.list")), 2)

    def test_broken_at_start(self):
        """Its owner is told why; to others it does not exist; it can be registered anew and removed."""
        with Server(extra=["--broken", "acme-bad@acme", "--broken", "acme-worse@acme", "--broken", "bolt-bad@bolt",
                           "--broken", "shared-not@"]) as server:
            os.mkdir(os.path.join(server.adapters, "good"))
            open(os.path.join(server.adapters, "good", "adapter_config.json"), "w").close()
            for name in ("acme-bad@acme", "acme-worse@acme", "bolt-bad@bolt"):
                open(os.path.join(server.store, name + ".adapter"), "w").close()
            with Peer(server) as peer:
                why = "the store file is too short."
                self.assertEqual([(a["name"], a.get("broken"), a["own"]) for a in peer.result("adapters.list")],
                                 [("acme-bad", why, True), ("acme-one", None, False), ("acme-worse", why, True),
                                  ("shared", None, False)])
                page = peer.result("adapters.list", limit=1)
                self.assertEqual(([a["name"] for a in page["adapters"]], page["more"]), (["acme-bad"], True))
                page = peer.result("adapters.list", limit=2, after="acme-bad")
                self.assertEqual(([a["name"] for a in page["adapters"]], page["more"]), (["acme-one", "acme-worse"], True))
                self.assertEqual(peer.error("generate", prompt="a", model="acme-bad")[1],
                                 'corrupt: the stored adapter "acme-bad" cannot be served: %s Register it anew.' % why)
                self.assertEqual(peer.error("generate", prompt="a", model="bolt-bad")[1],
                                 'not_found: there is no model "bolt-bad".')
                self.assertEqual(peer.error("adapters.remove", name="bolt-bad")[1][:9], "not_found")
                peer.result("adapters.register", name="acme-bad", path="good")
                self.assertEqual(peer.result("generate", prompt="a", model="acme-bad", max_tokens=1)["text"], "a")
                peer.result("adapters.remove", name="acme-worse")
                self.assertEqual([a["name"] for a in peer.result("adapters.list")], ["acme-bad", "acme-one", "shared"])
                self.assertEqual(peer.error("adapters.remove", name="acme-worse")[1][:9], "not_found")
                self.assertEqual(sorted(os.listdir(server.store)), ["acme-bad@acme.adapter", "bolt-bad@bolt.adapter"])

    def test_adapters_on_the_device(self):
        methods = ["adapters.load", "adapters.unload", "adapters.pin", "adapters.unpin"]
        with Peer(self.server, key="key-bolt") as peer:
            for method in methods:
                self.assertEqual(peer.error(method, name="bolt-one"),
                                 [0, "permission_denied: this tenant may not manage adapters."])
            stats = peer.result("adapters.stats")
            self.assertEqual((stats["registered"], stats["pinned_bytes_max"]), (1, 0))
        with Peer(self.server) as peer:
            for method in methods:
                self.assertEqual(peer.result(method, name="acme-one"), {"name": "acme-one"})
                for name in ("acme-none", "bolt-one"):  # another tenant's is not told from none
                    self.assertEqual(peer.error(method, name=name),
                                     [0, 'not_found: there is no model "%s".' % name])
                for wrong in ({}, {"name": ""}, {"name": 5}, {"name": "acme-one", "x": 1}):
                    self.assertEqual(peer.error(method, **wrong)[0], 1, wrong)
            stats = peer.result("adapters.stats")
            self.assertEqual(stats["pinned_bytes_max"], 1000)
            self.assertEqual(set(stats), {"registered", "own", "resident", "pinned", "pinned_bytes", "pinned_bytes_max",
                                          "users", "device_bytes", "host_bytes", "file_bytes", "hits", "misses", "loads", "load_us"})
            self.assertEqual(peer.error("adapters.stats", x=1)[0], 1)

    def test_python_client(self):
        for address in ("%s:%d" % self.server.address, "unix:" + self.server.unix):
            with polder.Client(address, key="key-acme") as client:
                self.assertEqual(client.tenant, "acme")
                stream = client.generate("abc", max_tokens=6)
                self.assertEqual("".join(token.text for token in stream), "abcabc")
                self.assertEqual(stream.answer.text, "abcabc")
                one, two = client.generate("1", max_tokens=40), client.generate("2", max_tokens=20)
                self.assertEqual("".join(token.text for token in two), "2" * 20)
                self.assertEqual("".join(token.text for token in one), "1" * 40)
                with client.generate("long", max_tokens=2000) as stream:
                    self.assertEqual(next(stream).text, "l")
                self.assertEqual(stream.answer.finish_reason, "cancelled")
                self.assertEqual(len(client.complete("a", n=4, max_tokens=2).choices), 4)
                self.assertEqual(client.detokenize(client.tokenize("häh")), "häh")
                self.assertEqual(client.ping(), "pong")
                with self.assertRaises(polder.PolderError) as caught:
                    client.complete("a", model="nope")
                self.assertEqual(caught.exception.code, "not_found")
        with self.assertRaises(polder.PolderError) as caught:
            polder.Client("%s:%d" % self.server.address, key="wrong")
        self.assertEqual(caught.exception.code, "unauthenticated")


class Limits(unittest.TestCase):
    def test_tenant_limits(self):
        with Server(delay_us=2000) as server, Peer(server, key="key-bolt") as peer:
            peer.result("hello", structured_errors=True)
            running = [peer.request("generate", prompt="a", max_tokens=100) for _ in range(4)]
            error = peer.error("generate", prompt="a", max_tokens=10)
            self.assertEqual((error["code"], error["kind"], error["limit"]),
                             ("resource_exhausted", "max_parallel_requests", 4))
            for _ in running:
                self.assertIn(peer.read()[1], running)
            for _ in range(16):
                peer.result("generate", prompt="a", max_tokens=1)
            error = peer.error("generate", prompt="a", max_tokens=1)
            self.assertEqual((error["kind"], error["remaining"], error["billed"]), ("rpm_limit", 0, False))
            self.assertTrue(30000 < error["retry_after_ms"] <= 61000, error)
            self.assertEqual(peer.error("generate", prompt="a" * 350, max_tokens=60)["kind"],
                             "max_context_tokens")
            stats = peer.result("stats")
            self.assertEqual(set(stats), {"tenant"})
            self.assertEqual((stats["tenant"]["requests"], stats["tenant"]["refused"]), (20, 3))
            self.assertEqual(stats["tenant"]["completion_tokens"], 416)

    def test_requests_per_connection(self):
        with Server("requests_per_connection=3", delay_us=5000) as server, Peer(server) as peer:
            running = [peer.request("generate", prompt="a", max_tokens=20) for _ in range(3)]
            self.assertEqual(peer.error("generate", prompt="a")[1],
                             "resource_exhausted: this connection has 3 unfinished requests already.")
            self.assertEqual(peer.result("ping"), "pong")
            self.assertEqual(sorted(peer.read()[1] for _ in running), running)

    def test_open_access(self):
        import subprocess
        import test_server_lib as lib
        for listen, code in (("0.0.0.0:0", 1), ("example.org:1", 1), ("127.0.0.1:99999", 1), ("x", 1)):
            run = subprocess.run([lib.PROGRAM, "--open", "--listen", listen], capture_output=True, timeout=20)
            self.assertEqual(run.returncode, code, listen)

    def test_buffers_are_bounded(self):
        with Server("buffer_bytes=200000", delay_us=0) as server, Peer(server) as peer:
            before = server.rss_kib()
            prompt = [299] * 8  # 43 spaces each
            running = [peer.request("generate", prompt=prompt, max_tokens=2000) for _ in range(10)]
            answers = [peer.read() for _ in running]
            codes = {answer[2][1].split(":")[0] for answer in answers if answer[2]}
            self.assertEqual(codes, {"resource_exhausted"})
            if not sanitized():
                self.assertLess(server.rss_kib() - before, 4000)
            self.assertEqual(peer.result("generate", prompt="a", max_tokens=2)["text"], "aa")


class Signals(unittest.TestCase):
    def test_sigterm_drains(self):
        with Server(delay_us=3000) as server:
            peer, other = Peer(server), Peer(server)
            msgid = peer.request("generate", prompt="abc", max_tokens=200, stream=True)
            self.assertEqual(peer.read()[1], "token")
            server.signal(signal.SIGTERM)
            self.assertTrue(until(lambda: other.call("hello")[2] is not None))
            self.assertEqual(other.error("generate", prompt="a"),
                             [0, "unavailable: the server is shutting down."])
            with Peer(server, key=None) as late:
                self.assertEqual(late.error("hello"), [0, "unavailable: the server is shutting down."])
            self.assertEqual(peer.response(msgid)[3]["usage"]["completion_tokens"], 200)
            self.assertEqual(server.process.wait(10), 0)
            self.assertFalse(os.path.exists(server.unix))

    def test_drain_has_an_end(self):
        with Server("shutdown_timeout_ms=200", delay_us=5000) as server:
            peer = Peer(server)
            msgid = peer.request("generate", prompt="abc", max_tokens=2000)
            self.assertTrue(until(lambda: True))
            server.signal(signal.SIGTERM)
            answer = peer.response(msgid)
            self.assertEqual(answer[2][1].split(":")[0], "unavailable")
            self.assertEqual(server.process.wait(10), 0)

    def test_second_signal_leaves_now(self):
        with Server(delay_us=5000) as server:
            peer = Peer(server)
            peer.request("generate", prompt="abc", max_tokens=2000)
            server.signal(signal.SIGINT)
            self.assertTrue(until(lambda: peer.call("hello")[2] is not None))
            server.signal(signal.SIGINT)
            self.assertEqual(server.process.wait(10), 0)

    def test_signals_while_it_ends(self):
        """However many come, and whenever: it ends by itself, with 0."""
        for pause in (0, 0.0005, 0.002):
            with Server() as server, Peer(server) as peer:
                peer.result("ping")
                while server.process.poll() is None:
                    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                        server.signal(number)
                    time.sleep(pause)

    def test_ends_while_adapters_are_converted(self):
        """Who waits is told; of what nobody has registered no file stays."""
        for gone in (False, True):
            server = Server()
            os.mkdir(os.path.join(server.adapters, "slow"))
            for name in ("adapter_config.json", "slow"):
                open(os.path.join(server.adapters, "slow", name), "w").close()
            peer = Peer(server)
            ids = [peer.request("adapters.register", name="acme-%d" % i, path="slow") for i in range(2)]
            peer.result("ping")  # both have been read
            if gone:
                peer.close()
            server.signal(signal.SIGTERM)
            if not gone:
                self.assertTrue(until(lambda: "draining" in server.log_text()))
                server.signal(signal.SIGTERM)
                for _ in ids:
                    answer = peer.read()
                    self.assertIn(answer[1], ids)
                    self.assertRegex(answer[2][1], "^unavailable: ")
                peer.close()
            server.stop(keep=True)
            left = os.listdir(server.store)  # whose client is gone may have been registered all the same
            self.assertEqual([name for name in left if ".new" in name or not gone], [])
            server.folder.cleanup()

    def test_reload(self):
        with Server() as server:
            acme, second, bolt = Peer(server), Peer(server, key="key-acme-2"), Peer(server, key="key-bolt")
            server.write_tenants(TENANTS + "  - name: bolt\n")
            server.signal(signal.SIGHUP)
            self.assertTrue(until(lambda: "there twice" in server.log_text()))
            self.assertEqual(bolt.result("ping"), "pong")
            text = TENANTS.replace(", " + key_hash("key-acme-2"), "")
            text = text.replace("name: bolt", "name: dune").replace(key_hash("key-bolt"), key_hash("key-dune"))
            server.write_tenants(text)
            server.signal(signal.SIGHUP)
            for gone in (second, bolt):
                self.assertEqual(gone.last_words()[0][2][0]["code"], "unauthenticated")
            names = [t["name"] for t in acme.result("stats")["tenants"]]
            self.assertEqual(names, ["acme", "bolt", "cape", "dune"])  # numbers stand
            with Peer(server, key="key-dune") as dune:
                self.assertEqual(dune.result("generate", prompt="a", max_tokens=1)["text"], "a")
            with Peer(server, key=None) as peer:
                self.assertEqual(peer.error("auth", key="key-bolt")[1][:15], "unauthenticated")

    def test_socket_file_in_use(self):
        import subprocess
        import test_server_lib as lib
        with Server() as server:
            run = subprocess.run([lib.PROGRAM, "--open", "--listen", "unix:" + server.unix],
                                 capture_output=True, timeout=20)
            self.assertEqual(run.returncode, 1)
            self.assertIn(b"is in use", run.stderr)
            with Peer(server, unix=True) as peer:
                self.assertEqual(peer.result("ping"), "pong")


class Together(unittest.TestCase):
    def test_many_threads(self):
        def work(server, key, failures):
            try:
                with polder.Client("unix:" + server.unix, key=key) as client:
                    for i in range(10):
                        prompt = "%s-%d " % (key, i)
                        text = client.complete(prompt, max_tokens=3 * len(prompt)).text
                        if text != prompt * 3:
                            failures.append(text)
            except Exception as error:  # noqa: BLE001
                failures.append(error)

        with Server() as server:
            failures = []
            threads = [threading.Thread(target=work, args=(server, key, failures))
                       for key in ("key-acme", "key-acme-2", "key-cape") for _ in range(10)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            self.assertEqual(failures, [])


if __name__ == "__main__":
    unittest.main(verbosity=1)
