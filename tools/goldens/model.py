#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Goldens of tiny random checkpoints: what transformers answers to them.

    python tools/goldens/model.py [--out tests/golden/model] [NAME ...]

Needs torch, transformers 5 and safetensors. Writes, for every entry of SPECS, OUT/NAME/ with config.json, the
safetensors file(s) and golden.bin. The files are written first, by this script, and loaded by transformers as
anybody would load them. Weights are random, rounded to bf16. Seeds are tried in order until every greedy choice
is clear (the best logit leads by more than 2% of the largest), so that the tokens do not hang on rounding, and
the bfloat16 logits are within 8% of the largest, so that no row asked for met another expert by rounding.
The same versions give the same bytes.

golden.bin, little-endian, without padding:

    char magic[8] = "PLDRGOLD"; u32 version = 1; u32 vocab; u32 sequences;
    then for each sequence:
        u32 tokens; u32 rows; u32 greedy;
        i32 token[tokens];
        u32 position[rows];              ascending positions whose logits follow
        f32 logits[rows][vocab];         transformers, float32, eager attention, eager experts
        u16 logits_bf16[rows][vocab];    bits of the same in bfloat16 (weights and activations)
        i32 next[greedy];                float32 greedy continuation of the whole sequence

Sequences: two of 24 and 23 ids with the logits of all positions, the first with 16 greedy tokens; one of 300 ids
(longer than one attention segment of 256) with the logits of its first and of its last five positions.
"""

import argparse
import json
import pathlib
import shutil
import struct
import tempfile

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

# hidden, layers, heads, kv_heads, head_dim, vocab; experts 0: dense Qwen3. config: spelling of transformers 4 or 5.
# form: per_expert, fused ([E, 2I, H]) or transposed ([E, H, 2I]). shards: number of files.
SPECS = {
    "moe_plain": dict(hidden=64, layers=2, heads=4, kv=2, head_dim=16, vocab=199, experts=8, top_k=2, inter=32),
    "moe_odd": dict(hidden=40, layers=3, heads=3, kv=1, head_dim=24, vocab=131, experts=5, top_k=3, inter=24,
                    normalize=False, tied=False, config=4, shards=3),
    "moe_mixed": dict(hidden=72, layers=4, heads=2, kv=1, head_dim=40, vocab=110, experts=5, top_k=5, inter=24,
                      dense_inter=56, mlp_only=[1], theta=1000000.0),
    "moe_top1": dict(hidden=96, layers=2, heads=6, kv=3, head_dim=16, vocab=193, experts=7, top_k=1, inter=24,
                     dense_inter=56, sparse_step=2, tied=False, config=4, normalize=False),
    "moe_fused": dict(hidden=48, layers=2, heads=4, kv=4, head_dim=16, vocab=101, experts=9, top_k=4, inter=24,
                      form="fused"),
    "moe_transposed": dict(hidden=56, layers=2, heads=3, kv=1, head_dim=32, vocab=97, experts=5, top_k=2, inter=28,
                           form="transposed", tied=False),
    "dense_odd": dict(hidden=40, layers=3, heads=5, kv=1, head_dim=16, vocab=150, dense_inter=88, config=4),
    "dense_untied": dict(hidden=56, layers=2, heads=3, kv=3, head_dim=24, vocab=101, dense_inter=72, tied=False,
                         dtype="float32", theta=500000.0),
    "dense_f16": dict(hidden=96, layers=2, heads=6, kv=2, head_dim=20, vocab=130, dense_inter=60, dtype="float16",
                      config=4),
}
DEFAULTS = dict(experts=0, top_k=0, inter=0, dense_inter=64, mlp_only=[], sparse_step=1, normalize=True, tied=True,
                theta=10000.0, config=5, form="per_expert", shards=1, dtype="bfloat16")
GREEDY = 16


def is_moe(spec, layer):
    return spec["experts"] > 0 and layer not in spec["mlp_only"] and (layer + 1) % spec["sparse_step"] == 0


def make_config(spec):
    moe = spec["experts"] > 0
    config = {
        "architectures": ["Qwen3MoeForCausalLM" if moe else "Qwen3ForCausalLM"],
        "model_type": "qwen3_moe" if moe else "qwen3",
        "hidden_size": spec["hidden"], "num_hidden_layers": spec["layers"],
        "num_attention_heads": spec["heads"], "num_key_value_heads": spec["kv"], "head_dim": spec["head_dim"],
        "vocab_size": spec["vocab"], "max_position_embeddings": 512, "intermediate_size": spec["dense_inter"],
        "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": spec["tied"],
        "attention_bias": False, "bos_token_id": None,
        "eos_token_id": 0 if spec["config"] == 4 else [0, 1],
    }
    if moe:
        config |= {"num_experts_per_tok": spec["top_k"], "moe_intermediate_size": spec["inter"],
                   "norm_topk_prob": spec["normalize"], "decoder_sparse_step": spec["sparse_step"],
                   "mlp_only_layers": spec["mlp_only"],
                   "num_experts" if spec["config"] == 4 else "num_local_experts": spec["experts"]}
    if spec["config"] == 4:
        config |= {"rope_theta": spec["theta"], "rope_scaling": None, "torch_dtype": spec["dtype"]}
    else:
        config |= {"rope_parameters": {"rope_theta": spec["theta"], "rope_type": "default"}, "dtype": spec["dtype"]}
    return config


def make_weights(spec, seed):
    """Per-expert form, float32 holding bf16 values."""
    g = torch.Generator().manual_seed(seed)
    hidden, q, kv = spec["hidden"], spec["heads"] * spec["head_dim"], spec["kv"] * spec["head_dim"]
    out = {}

    def matrix(name, rows, cols, gain=1.0):
        out[name] = torch.randn(rows, cols, generator=g) * gain / cols**0.5

    def norm(name, size):
        out[name] = 1 + 0.2 * torch.randn(size, generator=g)

    matrix("model.embed_tokens.weight", spec["vocab"], hidden, 2.0)
    for layer in range(spec["layers"]):
        base = f"model.layers.{layer}."
        norm(base + "input_layernorm.weight", hidden)
        norm(base + "post_attention_layernorm.weight", hidden)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            matrix(base + f"self_attn.{name}_proj.weight", rows, hidden)
        matrix(base + "self_attn.o_proj.weight", hidden, q)
        norm(base + "self_attn.q_norm.weight", spec["head_dim"])
        norm(base + "self_attn.k_norm.weight", spec["head_dim"])
        if is_moe(spec, layer):
            matrix(base + "mlp.gate.weight", spec["experts"], hidden, 6.0)
        for mlp, units in ([(f"mlp.experts.{e}.", spec["inter"]) for e in range(spec["experts"])]
                           if is_moe(spec, layer) else [("mlp.", spec["dense_inter"])]):
            matrix(base + mlp + "gate_proj.weight", units, hidden, 1.5)
            matrix(base + mlp + "up_proj.weight", units, hidden, 1.5)
            matrix(base + mlp + "down_proj.weight", hidden, units)
    norm("model.norm.weight", hidden)
    if not spec["tied"]:
        matrix("lm_head.weight", spec["vocab"], hidden, 2.0)
    # Steps of 2^-12 (2^-10 for norms) of a few bits survive bf16 and float16 alike.
    return {k: (v * 4096).round().div(4096).to(torch.bfloat16).to(torch.float16).to(torch.bfloat16).float()
            for k, v in out.items()}


def reshape_experts(spec, weights):
    out = {k: v for k, v in weights.items() if ".experts." not in k}
    for layer in range(spec["layers"]):
        if not is_moe(spec, layer):
            continue
        base = f"model.layers.{layer}.mlp.experts."
        one = lambda e, which: weights[f"{base}{e}.{which}_proj.weight"]
        gate_up = torch.stack([torch.cat([one(e, "gate"), one(e, "up")]) for e in range(spec["experts"])])
        down = torch.stack([one(e, "down") for e in range(spec["experts"])])
        if spec["form"] == "transposed":
            gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
        out[base + "gate_up_proj"], out[base + "down_proj"] = gate_up.contiguous(), down.contiguous()
    return out


def write_checkpoint(directory, spec, weights):
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(make_config(spec), indent=2) + "\n")
    dtype = getattr(torch, spec["dtype"])
    if spec["form"] != "per_expert":
        weights = reshape_experts(spec, weights)
    weights = {k: v.to(dtype) for k, v in weights.items()}
    if spec["shards"] == 1:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names, index = sorted(weights), {}
    for shard in range(spec["shards"]):
        file = f"model-{shard + 1:05}-of-{spec['shards']:05}.safetensors"
        part = {n: weights[n] for n in names[shard::spec["shards"]]}
        save_file(part, directory / file, metadata={"format": "pt"})
        index |= {n: file for n in part}
    size = sum(v.numel() * v.element_size() for v in weights.values())
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": index}, indent=1) + "\n")


def load(directory, dtype):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager",
                                                experts_implementation="eager").eval()


@torch.no_grad()
def greedy(model, ids):
    """Continuation without a cache, and the smallest lead of a choice over the largest logit."""
    out, lead = [], 1.0
    for _ in range(GREEDY):
        logits = model(torch.tensor([ids + out]), use_cache=False).logits[0, -1]
        top = logits.topk(2).values
        lead = min(lead, float((top[0] - top[1]) / logits.abs().max()))
        out.append(int(logits.argmax()))
    return out, lead


def sequences(spec, seed):
    g = torch.Generator().manual_seed(1000 + seed)
    ids = lambda n: torch.randint(0, spec["vocab"], (n,), generator=g).tolist()
    short, other, long = ids(24), ids(23), ids(300)
    return [(short, range(24)), (other, range(23)), (long, [0, 295, 296, 297, 298, 299])]


@torch.no_grad()
def answers(spec, seed, exact, rounded):
    """(ids, positions, float32 logits, bfloat16 logits) of each sequence, and the largest relative error."""
    out, worst = [], 0.0
    for ids, positions in sequences(spec, seed):
        positions = list(positions)
        logits = exact(torch.tensor([ids]), use_cache=False).logits[0, positions].float()
        coarse = rounded(torch.tensor([ids]), use_cache=False).logits[0, positions]
        assert coarse.dtype == torch.bfloat16 and torch.isfinite(logits).all()
        worst = max(worst, float((logits - coarse.float()).abs().max() / logits.abs().max()))
        out.append((ids, positions, logits.contiguous(), coarse.contiguous()))
    return out, worst


def write_golden(path, spec, answered, continuation):
    with open(path, "wb") as f:
        f.write(b"PLDRGOLD" + struct.pack("<3I", 1, spec["vocab"], len(answered)))
        for number, (ids, positions, logits, coarse) in enumerate(answered):
            follow = continuation if number == 0 else []
            f.write(struct.pack("<3I", len(ids), len(positions), len(follow)))
            f.write(struct.pack(f"<{len(ids)}i", *ids) + struct.pack(f"<{len(positions)}I", *positions))
            f.write(logits.numpy().tobytes() + coarse.view(torch.uint16).numpy().tobytes())
            f.write(struct.pack(f"<{len(follow)}i", *follow))


def make(name, out):
    spec = DEFAULTS | SPECS[name]
    directory = out / name
    if directory.exists():
        shutil.rmtree(directory)
    with tempfile.TemporaryDirectory() as scratch:
        # transformers cannot load the transposed form: the same weights in its own form stand in.
        readable = pathlib.Path(scratch) / "readable"
        for seed in range(500):
            weights = make_weights(spec, seed)
            shutil.rmtree(readable, ignore_errors=True)
            write_checkpoint(readable, spec | ({"form": "fused"} if spec["form"] == "transposed" else {}), weights)
            exact = load(readable, torch.float32)
            continuation, lead = greedy(exact, sequences(spec, seed)[0][0])
            if lead > 0.02:
                answered, worst = answers(spec, seed, exact, load(readable, torch.bfloat16))
                if worst < 0.08:
                    break
        else:
            raise SystemExit(f"{name}: no seed will do")
        write_checkpoint(directory, spec, weights)
        write_golden(directory / "golden.bin", spec, answered, continuation)
    for file in directory.iterdir():
        file.chmod(0o644)
    size = sum(p.stat().st_size for p in directory.iterdir())
    print(f"{name}: seed {seed}, lead {lead:.3f}, {size} bytes, bf16 error {worst:.2e}", flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("tests/golden/model"))
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    for name in arguments.names or SPECS:
        make(name, arguments.out)


if __name__ == "__main__":
    main()
