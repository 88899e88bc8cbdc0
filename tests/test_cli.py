# SPDX-License-Identifier: Apache-2.0
"""The binary `polder` from outside: every command, its options, its refusals and its exit codes (0 done, 1 failed
with a sentence, 2 wrong usage; 3, a device that fails, is in tests/test_e2e_fault.py)."""
import glob
import os
import pty
import sys
import tempfile

from e2e_lib import ADAPTERS, MODEL, POLDER, environment, key_hash, main, run

COMMANDS = "serve generate chat call stats adapter synth check-config hash-key version help completion".split()
FOLDER = tempfile.TemporaryDirectory(prefix="polder-cli-")
STATE = os.path.join(FOLDER.name, "state")


def path(name, text=None):
    full = os.path.join(FOLDER.name, name)
    if text is not None:
        with open(full, "w") as file:
            file.write(text)
    return full


def usage_error(*words, says, env=None):
    code, out, err = run(*words, env=env)
    assert code == 2 and not out and err.startswith("polder: ") and err.count("\n") == 1, (words, code, out, err)
    for part in [says] if isinstance(says, str) else says:
        assert part in err, (words, part, err)


def failure(*words, says, env=None):
    code, out, err = run(*words, env=env)
    last = err.strip().split("\n")[-1]
    assert code == 1 and last.startswith("polder: "), (words, code, out, err)
    for part in [says] if isinstance(says, str) else says:
        assert part in err, (words, part, err)
    return out


def generate(*words, prompt="static int ext4_", tokens=24, env=None):
    """The answer (text, or ids with --token-ids), and what went to standard error."""
    code, out, err = run("generate", "--model", MODEL, "--state-dir", STATE, "--log-level", "warn", "--max-tokens", tokens,
                         "--prompt", prompt, *words, env=env)
    assert code == 0, (words, code, out, err)
    return out, err


def refused(*words, prompt="a", says):
    return failure("generate", "--model", MODEL, "--state-dir", STATE, "--log-level", "warn", "--prompt", prompt,
                   *words, says=says)


# ---- words and options ----

def test_cli_version_and_help():
    code, out, err = run("version")
    assert code == 0 and out.startswith("polder ") and not err
    assert run("--version") == (code, out, err)
    code, overview, _ = run("help")
    assert code == 0 and run()[1] == overview and run("--help")[1] == overview and run("-h")[1] == overview
    for command in COMMANDS:
        assert "polder %s" % command in overview, command
        if command == "help":
            continue
        code, out, err = run(command, "--help")
        assert code == 0 and not err and "polder %s" % command in out and "--log-level" in out, (command, out, err)
        assert run("help", command)[1] == out
    assert "--pool-bytes" in run("serve", "--help")[1] and "--pool-bytes" not in run("stats", "--help")[1]


def test_cli_wrong_usage():
    usage_error("nonsense", says='"nonsense"')
    usage_error("help", "nonsense", says='"nonsense"')
    usage_error("serve", "--nonsense", "1", says="--nonsense")
    usage_error("stats", "--pool-bytes", "1M", says=["--pool-bytes", "does not belong"])
    usage_error("serve", "--port", says="--port needs a value")
    for option, value in [("port", "http"), ("port", "-1"), ("max-num-seqs", "4294967296"), ("pool-bytes", "1X"),
                          ("pool-bytes", ""), ("max-num-seqs", "1.5"), ("pool-bytes", "-1M"), ("pool-bytes", "1.5"),
                          ("dry-run=maybe", None), ("h2d-gbytes-per-s", "nan"), ("h2d-gbytes-per-s", "fast")]:
        words = ["--" + option] + ([value] if value is not None else [])
        usage_error("serve", *words, says=option.partition("=")[0])
    usage_error("generate", "--temperature", "-1", says="temperature")
    usage_error("generate", "--seed", "18446744073709551616", says="seed")
    usage_error("version", "--log-level", "loud", says=["--log-level", "loud"])
    for words in [("serve", "now"), ("generate", "hello"), ("version", "x"), ("stats", "x"), ("check-config", "x"),
                  ("synth", "x"), ("hash-key", "my-secret"), ("completion", "x"), ("chat", "x")]:
        usage_error(*words, says="takes no word")
    assert "my-secret" not in run("hash-key", "my-secret")[2]
    usage_error("call", says="usage")
    usage_error("adapter", says="usage")
    usage_error("adapter", "add", "one", says="usage")
    usage_error("synth", says="--out")


def test_cli_option_precedence():
    config = path("options.yaml", "# one file for several commands\nmax_tokens: 3\nmodel: %s\nport: 1\n" % MODEL)
    words = ["generate", "--config", config, "--state-dir", STATE, "--prompt", "int ", "--token-ids", "--log-level", "warn"]

    def count(*more, env=None):
        code, out, err = run(*words, *more, env=env)
        assert code == 0, err
        return len(out.split())
    assert count() == 3
    assert count(env={"POLDER_MAX_TOKENS": "5"}) == 5
    assert count("--max-tokens", "7", env={"POLDER_MAX_TOKENS": "5"}) == 7
    assert count("--max_tokens=8") == 8
    code, out, _ = run(*[w for w in words if w not in ("--config", config)], env={"POLDER_CONFIG": config})
    assert code == 0 and len(out.split()) == 3
    usage_error("generate", says=["POLDER_MAX_TOKENS", "many"], env={"POLDER_MAX_TOKENS": "many"})


def test_cli_config_files():
    cases = [("unknown.yaml", "model: x\n\nmax_tokenz: 3\n", ":3", "max_tokenz"),
             ("value.yaml", "model: x\nport: 80\nmax-num-seqs: lots\n", ":3", "max-num-seqs"),
             ("map.yaml", "port:\n  a: 1\n", ":", "port"), ("list.yaml", "- port\n", ":1", "map"),
             ("twice.yaml", "port: 1\nport: 2\n", ":2", "port"), ("item.yaml", "lora_modules:\n  - [a]\n", ":2", "lora_modules"),
             ("broken.yaml", "port: [1\n", ":", "broken.yaml"), ("anchor.yaml", "port: &a 1\n", ":1", "anchor")]
    for name, text, line, word in cases:
        usage_error("serve", "--config", path(name, text), says=[name + line, word])
    usage_error("serve", "--config", path("none.yaml"), says="none.yaml")


def test_cli_completion():
    code, out, _ = run("completion")
    assert code == 0 and all(command in out for command in COMMANDS) and "--max-num-seqs" in out
    import subprocess
    script = out + '\nCOMP_WORDS=(polder serve --max-num-s); COMP_CWORD=2; _polder; echo "${COMPREPLY[@]}"'
    said = subprocess.run(["bash", "-c", script], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert said.strip() == "--max-num-seqs", said


def test_cli_check_config():
    good = path("tenants.yaml", "tenants:\n  - name: a\n    keys_blake2b: [%s]\n" % key_hash("k"))
    code, out, err = run("check-config", "--tenants", good, "--model", MODEL)
    assert code == 0 and "1 tenants" in out and "8 layers" in out, (out, err)
    bad = path("bad-tenants.yaml", "tenants:\n  - name: a\n    keys_blake2b: [%s]\n    rpm_limits: 3\n" % key_hash("k"))
    failure("check-config", "--tenants", bad, says=["bad-tenants.yaml:4", "rpm_limits"])
    failure("check-config", "--tenants", path("short.yaml", "tenants:\n  - name: a\n    keys_blake2b: [abc]\n"),
            says="short.yaml:3")
    failure("check-config", "--tenants", path("none.yaml"), says="none.yaml")
    failure("check-config", "--model", FOLDER.name, says="config.json")
    config = path("serve.yaml", "tenants: %s\nmodel: %s\n" % (good, MODEL))
    assert run("check-config", "--config", config)[0] == 0


def test_cli_hash_key():
    for given in (b"my-secret-key", b"my-secret-key\n", b"my-secret-key\r\n"):
        import subprocess
        done = subprocess.run([POLDER, "hash-key"], input=given, stdout=subprocess.PIPE, env=environment())
        assert done.returncode == 0 and done.stdout.decode() == key_hash("my-secret-key") + "\n"
    for given in (b"", b"\n", b"x" * 2000):
        code, out, err = run("hash-key", stdin=given)
        assert code == 1 and not out and "standard input" in err


# ---- models ----

def test_cli_synth():
    bare, whole = path("synth-bare"), path("synth-whole")
    code, out, err = run("synth", "--out", bare, "--shape", "tiny", "--seed", "5")
    assert code == 0 and bare in out, err
    failure("generate", "--model", bare, "--state-dir", path("state-bare"), "--prompt", "a", says="tokenizer.json")
    code, _, err = run("synth", "--out", whole, "--shape", "tiny", "--model", MODEL, "--set", "vocab=8192")
    if code:  # the shape's word for the vocabulary
        code, _, err = run("synth", "--out", whole, "--shape", "tiny", "--model", MODEL, "--set", "vocab_size=8192")
    assert code == 0, err
    code, out, err = run("generate", "--model", whole, "--state-dir", path("state-whole"), "--prompt", "abc", "--max-tokens",
                         "4", "--token-ids", "--ignore-eos", "--log-level", "warn")
    assert code == 0 and len(out.split()) == 4, (code, out, err)
    failure("synth", "--out", path("synth-no"), "--shape", "huge", says="huge")
    failure("synth", "--out", path("synth-no"), "--set", "nonsense=1", says="nonsense")


def test_cli_dry_run():
    code, out, err = run("serve", "--dry-run", "--model", MODEL)
    assert code == 0 and out.endswith("fits\n") and "all experts" in out and "KV" in out, (out, err)
    code, out, err = run("serve", "--dry-run", "--model", MODEL, "--pool-bytes", "12M")
    assert code == 0 and "offloaded" in out, (code, out, err)
    failure("serve", "--dry-run", "--model", MODEL, "--pool-bytes", "64K", says="pool")
    failure("serve", "--dry-run", "--model", MODEL, "--pool-bytes", "60000G", says="this machine has")
    failure("serve", "--dry-run", "--model", MODEL, "--max-model-len", "1000000", says="max-model-len")
    failure("serve", "--dry-run", "--model", path("nowhere"), says="nowhere")
    failure("serve", "--dry-run", says="--model")


# ---- a GPU that is not there (with one: printed, not tested) ----

def no_gpu():
    """What the refusal says in this build: one without CUDA names the way to build with it; else the reason."""
    if os.environ.get("POLDER_HAS_CUDA", "0") == "0":
        return ["cuda:0", "no CUDA backend", "make cuda", "--device cpu"]
    return None if glob.glob("/dev/nvidia[0-9]*") else ["no usable GPU", "--device cpu"]


def test_cli_gpu_missing():
    says = no_gpu()
    if not says:
        return "SKIPPED: there is a GPU"
    for command in (["serve", "--port", "0"], ["generate", "--prompt", "a"]):
        out = failure(*command, "--model", MODEL, "--state-dir", STATE, "--device", "cuda:0", says=says)
        assert "ready" not in out, out
    return run("serve", "--port", "0", "--model", MODEL, "--state-dir", STATE, "--device", "cuda:0")[2].strip().split("\n")[-1]


def test_cli_device_names():
    for name in ("abacus", "cuda:x", "cuda:-1", "cuda0", "cuda:"):
        refused("--device", name, says=[name, "cuda:0"])
        failure("serve", "--dry-run", "--model", MODEL, "--device", name, says=[name, "cuda:0"])


def test_cli_dry_run_without_the_gpu():
    says = no_gpu()
    if not says:
        return "SKIPPED: there is a GPU"
    code, out, err = run("serve", "--dry-run", "--model", MODEL, "--device", "cuda:0")
    assert code == 0 and not err and "all experts" in out and out.endswith("fits cuda:0 was not checked\n"), (code, out, err)
    line = next(line for line in out.split("\n") if line.startswith("cuda:0"))
    assert "memory not checked: " in line and all(part in line for part in says), line
    failure("serve", "--dry-run", "--model", MODEL, "--device", "cuda:0", "--host-bytes", "60000G", says="host memory")
    return line


# ---- generate ----

def test_cli_generate_repeats():
    first, err = generate()
    assert first == generate()[0] and "24 generated" in err, err
    warm = [generate("--temperature", "1", "--seed", seed)[0] for seed in ("1", "1", "2", "18446744073709551615")]
    assert warm[0] == warm[1] != warm[2] and warm[3] not in warm[:3]
    assert first == generate("--prompt-file", path("prompt", "static int ext4_"))[0]
    assert first == generate("--threads", "1", "--max-num-batched-tokens", "16")[0]
    ids = generate("--token-ids")[0].split()
    assert len(ids) == 24 and all(0 <= int(i) < 8192 for i in ids)
    whole = first[:-1]
    stop = whole[5:9]
    assert generate("--stop", stop)[0] == whole[:whole.index(stop)] + "\n"
    assert generate("--stop", "@@never@@", "--stop", stop)[0] == whole[:whole.index(stop)] + "\n"


def test_cli_generate_adapters():
    base = generate(prompt="And it came to pass", tokens=40)[0]
    module = ("--lora-modules", "kjv=" + os.path.join(ADAPTERS, "kjv-all-r4"))
    assert base == generate(*module, prompt="And it came to pass", tokens=40)[0], "not asked for, yet applied"
    kjv = generate(*module, "--adapter", "kjv", prompt="And it came to pass", tokens=40)[0]
    assert kjv != base
    for name in sorted(os.listdir(ADAPTERS)):
        generate("--lora-modules", "x=" + os.path.join(ADAPTERS, name), "--adapter", "x", tokens=4)
    refused("--adapter", "nobody", says="nobody")
    refused("--adapter", "n" * 200, says="adapter")
    refused("--lora-modules", "kjv", says=["--lora-modules", "NAME=DIR"])
    refused("--lora-modules", "a=" + path("nowhere"), says="nowhere")
    refused(*module, "--max-lora-rank", "2", says="rank")
    return "kjv: " + kjv.strip()[:60].replace("\n", " ")


def test_cli_generate_paths():
    """Other arithmetic is allowed other bits; the memory is not."""
    wide = generate(tokens=40)[0]
    assert generate("--pool-bytes", "12M", "--host-bytes", "4M", "--max-model-len", "256", tokens=40)[0] == wide
    assert generate("--page-bytes", "64K", tokens=40)[0] == wide
    assert generate("--no-prefix-caching", "--segment-halves", "1", tokens=40)[0] == wide
    texts = {name: generate(*words, tokens=12)[0] for name, words in
             {"bf16": (), "f32": ("--dtype", "float32"), "portable": ("--instruction-set", "portable"),
              "avx2": ("--instruction-set", "avx2")}.items()}
    same = sum(text == texts["f32"] for text in texts.values())
    refused("--dtype", "float16", says=["--dtype", "float16"])
    refused("--instruction-set", "sse9", says="sse9")
    refused("--device", "abacus", says="abacus")
    return "%d of 4 paths agree on 12 greedy tokens" % same


def test_cli_generate_refusals():
    failure("generate", "--prompt", "a", says="--model")
    failure("generate", "--model", MODEL, "--state-dir", STATE, says="--prompt")
    refused("--max-model-len", "64", prompt="word " * 200, says="context")
    refused("--prompt-file", path("nowhere"), says="nowhere")
    refused("--stop", "", says="stop")
    refused(*["--stop=x"] * 9, says="stop")
    refused(prompt="", says="prompt")
    refused("--max-tokens", "0", says="--max-tokens")
    refused("--temperature", "1000000000", says="temperature")
    refused("--top-p", "7", says="top-p")
    refused("--max-model-len", "1000000", says="max-model-len")
    refused("--pool-bytes", "64K", says="pool")


def test_cli_trace_plan():
    _, err = generate("--trace-plan", tokens=3)
    quiet = generate(tokens=3)[1]
    plans = [line for line in err.split("\n") if line and line not in quiet]
    assert len(plans) >= 3, err
    return plans[0][:70]


def test_cli_progress_only_on_a_terminal():
    state = path("state-terminal")
    words = [POLDER, "generate", "--model", MODEL, "--state-dir", state, "--prompt", "a", "--max-tokens", "1"]
    shown = bytearray()

    def read(descriptor):
        data = os.read(descriptor, 4096)
        shown.extend(data)
        return data
    saved = os.dup(1)  # pty.spawn copies to standard output
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    try:
        code = os.waitstatus_to_exitcode(pty.spawn(words, read, lambda _: b""))
    finally:
        os.dup2(saved, 1)
    assert code == 0 and b"loading [" in shown and b"100 %" in shown, bytes(shown)
    code, _, err = run(*words[1:])
    assert code == 0 and "loading [" not in err and "\r" not in err, err


# ---- talking to nobody (a real server: tests/test_e2e.py) ----

def test_cli_remote_without_server():
    nowhere = "unix:" + path("no-socket")
    for words in [("stats",), ("call", "ping"), ("adapter", "list"), ("adapter", "show", "x"), ("adapter", "rm", "x"),
                  ("adapter", "add", "x", ADAPTERS), ("chat",)]:
        failure(*words, "--connect", nowhere, says="no-socket")
    failure("stats", "--connect", "127.0.0.1:1", says="127.0.0.1:1")
    failure("stats", "--connect", nowhere, "--api-key-file", path("no-key"), says="no-key")
    failure("adapter", "add", "x", path("nowhere"), "--connect", nowhere, says="nowhere")
    failure("serve", "--model", MODEL, "--state-dir", STATE, "--tenants", path("none.yaml"), says="none.yaml")
    failure("serve", "--model", MODEL, "--state-dir", STATE, "--port", "70000", says="70000")
    failure("serve", "--model", MODEL, "--state-dir", STATE, "--no-tcp", says="--uds")
    failure("serve", "--model", MODEL, "--state-dir", STATE, "--port", "0", "--adapter-dir", path("nowhere"),
            says="--adapter-dir")


if __name__ == "__main__":
    code = main([value for name, value in list(globals().items()) if name.startswith("test_")])
    FOLDER.cleanup()
    sys.exit(code)
