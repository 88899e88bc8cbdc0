#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Trains the LoRA adapters of adapters.json on the withheld kinds and saves them as PEFT does.

    train_adapters.py DIR BASE OUT           DIR: tokens and tokenizer, BASE: the base checkpoint

Forms: `attention` (q, k, v, o), `fused` (attention and PEFT's target_parameters on the fused
expert tensors, as with transformers 5) and `per-expert` (attention and every expert's own three
matrices, as with transformers 4). The product of B and A is added to the weights before each
step, so one compiled graph serves every form. OUT/adapters.tar holds the directories.
"""
import argparse
import json
import os
import tarfile
import time

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import export
import model
from data import Batches, read_tokens

HERE = os.path.dirname(os.path.abspath(__file__))
ATTENTION_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERT_MODULES = ["gate_proj", "up_proj", "down_proj"]
EXPERT_PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
EPOCHS_MAX = 25
PROMPTS = {"man-pl": "NAZWA\n       ", "man-ru": "ИМЯ\n       ", "gcide": "House \\House\\, n. ",
           "kjv": "Genesis 51\n\n1 And ", "elisp": "(defun buffer-", "man-it": "NOME\n       "}


def rank_and_scale(spec, module):
    rank = spec.get("rank_pattern", {}).get(module, spec["r"])
    alpha = spec.get("alpha_pattern", {}).get(module, spec["lora_alpha"])
    return rank, alpha / (rank ** 0.5 if spec.get("use_rslora") else rank)


def new_pair(rank, rows, columns, experts, device):
    """A (experts, rank, columns) random and B (experts, rows, rank) zero, as LoRA begins."""
    a = (torch.rand(experts, rank, columns, device=device) * 2 - 1) * columns ** -0.5
    return [a.requires_grad_(True),
            torch.zeros(experts, rows, rank, device=device, requires_grad=True)]


def new_adapter(spec, device):
    """{(layer, module): (A, B, scale)}; experts is 1 for the attention's matrices."""
    shapes = model.matrix_shapes()
    e, i, h = model.EXPERTS, model.EXPERT_WIDTH, model.HIDDEN
    modules = [(m, 1, *shapes[m[0]]) for m in ATTENTION_MODULES]
    if spec["form"] == "fused":
        modules += [("gate_up_proj", e, 2 * i, h), ("down_proj", e, h, i)]
    elif spec["form"] == "per-expert":
        modules += [("gate_proj", e, i, h), ("up_proj", e, i, h), ("down_proj", e, h, i)]
    adapter = {}
    for layer in range(model.LAYERS):
        for module, experts, rows, columns in modules:
            rank, scale = rank_and_scale(spec, module)
            adapter[layer, module] = (*new_pair(rank, rows, columns, experts, device), scale)
    return adapter


def merged(base, adapter):
    """The base's weights with the adapter's products added, differentiable."""
    out = dict(base)
    for (layer, module), (a, b, scale) in adapter.items():
        delta = torch.bmm(b, a) * scale
        if module in ATTENTION_MODULES:
            name, delta = f"{layer}.{module[0]}", delta[0]
        elif module in ("gate_proj", "up_proj"):
            width = model.EXPERT_WIDTH
            name = f"{layer}.gate_up"
            pad = (0, 0, 0, width) if module == "gate_proj" else (0, 0, width, 0)
            delta = torch.nn.functional.pad(delta, pad)
        else:
            name = f"{layer}.{module[:-5]}"
        out[name] = out[name] + delta
    return out


def peft_tensors(adapter):
    """The adapter under PEFT's names and in PEFT's shapes, bf16."""
    out = {}
    for (layer, module), (a, b, _) in adapter.items():
        prefix = f"base_model.model.model.layers.{layer}."
        if module in ATTENTION_MODULES:
            pairs = [(f"{prefix}self_attn.{module}", a[0], b[0])]
        elif (layer, "gate_up_proj") in adapter:
            name = prefix + "mlp.experts" + (".base_layer" if module == "gate_up_proj" else "")
            flat_b = b.permute(1, 2, 0).reshape(b.shape[1], -1)  # (out, r * E), expert fastest
            pairs = [(name, a.reshape(-1, a.shape[-1]), flat_b)]
        else:
            pairs = [(f"{prefix}mlp.experts.{e}.{module}", a[e], b[e])
                     for e in range(model.EXPERTS)]
        for name, one_a, one_b in pairs:
            out[name + ".lora_A.weight"] = one_a.detach()
            out[name + ".lora_B.weight"] = one_b.detach()
    return {k: v.to(torch.bfloat16).cpu().contiguous().clone() for k, v in out.items()}


def read_adapter(folder, spec, device):
    """The inverse of peft_tensors, for a folder PEFT or save_adapter wrote."""
    stored = load_file(os.path.join(folder, "adapter_model.safetensors"))
    adapter = {}
    for (layer, module), (a, b, scale) in new_adapter(spec, device).items():
        prefix = f"base_model.model.model.layers.{layer}."
        if module in ATTENTION_MODULES:
            names = [f"{prefix}self_attn.{module}"]
        elif spec["form"] == "fused":
            names = [prefix + "mlp.experts" + (".base_layer" if module == "gate_up_proj" else "")]
        else:
            names = [f"{prefix}mlp.experts.{e}.{module}" for e in range(model.EXPERTS)]
        read_a = torch.stack([stored[n + ".lora_A.weight"] for n in names])
        read_b = torch.stack([stored[n + ".lora_B.weight"] for n in names])
        if len(names) != a.shape[0]:  # fused: the expert is slowest in A, fastest in B
            read_a = read_a.reshape(a.shape[0], -1, a.shape[2])
            read_b = read_b[0].reshape(b.shape[1], -1, b.shape[0]).permute(2, 0, 1)
        adapter[layer, module] = (read_a.float().to(device), read_b.float().to(device), scale)
    return adapter


def save_adapter(name, spec, adapter, folder):
    modules = ATTENTION_MODULES + (EXPERT_MODULES if spec["form"] == "per-expert" else [])
    config = LoraConfig(
        r=spec["r"], lora_alpha=spec["lora_alpha"], lora_dropout=0.0, bias="none",
        target_modules=modules, task_type="CAUSAL_LM", inference_mode=True,
        target_parameters=EXPERT_PARAMETERS if spec["form"] == "fused" else None,
        use_rslora=spec.get("use_rslora", False), rank_pattern=spec.get("rank_pattern", {}),
        alpha_pattern=spec.get("alpha_pattern", {}), base_model_name_or_path="polder-demo")
    path = os.path.join(folder, name)
    config.save_pretrained(path)
    save_file(peft_tensors(adapter), os.path.join(path, "adapter_model.safetensors"),
              metadata={"format": "pt"})


def train_one(base, spec, tokens, step_gradients, args):
    """Trains one adapter for its seconds or EPOCHS_MAX; returns it with steps and tokens."""
    kind = spec["kind"]
    batches = Batches(tokens, {kind: 1.0}, args.window, args.device)
    adapter = new_adapter(spec, args.device)
    parameters = [p for a, b, _ in adapter.values() for p in (a, b)]
    optimiser = torch.optim.AdamW(parameters, lr=args.rate, betas=(0.9, 0.99), weight_decay=0.01,
                                  fused=args.device == "cuda")
    tokens_max = EPOCHS_MAX * len(tokens[kind][0])
    seconds = spec["seconds"] * args.time_scale
    begin, step, count = time.time(), 0, 0
    while True:
        done = max((time.time() - begin) / seconds, count / tokens_max)
        if step == 1:
            begin = time.time()  # the first step may have had to compile
        elif done >= 1:
            break
        optimiser.param_groups[0]["lr"] = args.rate * min(1, (step + 1) / 50) * max(1 - done, 0.02)
        x, y, _ = batches.draw(args.rows)
        nll = step_gradients(merged(base, adapter), x, y)
        nll.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        step, count = step + 1, count + x.numel()
        if step % 10 == 0:
            nll.item()
    return adapter, {"steps": step, "tokens": count, "seconds": round(time.time() - begin, 1)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data")
    parser.add_argument("base")
    parser.add_argument("out")
    parser.add_argument("--only", nargs="*", help="names of adapters; all without it")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--time-scale", type=float, default=1.0)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    tokens = read_tokens(args.data)
    tokenizer = Tokenizer.from_file(os.path.join(args.data, "tokenizer.json"))
    base = export.load_checkpoint(args.base, args.device)
    tables = model.rope_tables(args.window, args.device)

    @torch.compile(dynamic=False)
    def compiled(w, x, y):
        return model.loss(w, x, y, tables)[0]

    def step_gradients(w, x, y):
        # Every matrix gets a gradient, whether the adapter has it or not: one graph for all.
        ready = {n: t if t.requires_grad or n.split(".")[-1] not in model.MATRICES
                 else t.detach().requires_grad_(True) for n, t in w.items()}
        return compiled(ready, x, y)

    report, base_bits = {}, {}
    folder = os.path.join(args.out, "adapters")
    for name, spec in json.load(open(os.path.join(HERE, "adapters.json"))).items():
        if args.only and name not in args.only:
            continue
        kind = spec["kind"]
        _, val, size = tokens[kind]
        if kind not in base_bits:
            base_bits[kind] = model.bits_per_byte(base, val, size, args.device)[0]
        adapter, facts = train_one(base, spec, tokens, step_gradients, args)
        stored = {key: (a.detach().bfloat16().float(), b.detach().bfloat16().float(), s)
                  for key, (a, b, s) in adapter.items()}
        weights = merged(base, stored)
        bits = model.bits_per_byte(weights, val, size, args.device)[0]
        report[name] = facts | {"bits_per_byte": round(bits, 4),
                                "base": round(base_bits[kind], 4),
                                "ratio": round(bits / base_bits[kind], 4)}
        save_adapter(name, spec, stored, folder)
        ids = model.generate(weights, tokenizer.encode(PROMPTS[kind]).ids, 100, 0.7,
                             args.device)
        print(name, report[name], repr(tokenizer.decode(ids)), flush=True)
        with tarfile.open(os.path.join(args.out, "adapters.tar"), "w") as tar:
            tar.add(folder, arcname="adapters")
        with open(os.path.join(args.out, "adapters_report.json"), "w") as f:
            json.dump(report, f, indent=2)


if __name__ == "__main__":
    main()
