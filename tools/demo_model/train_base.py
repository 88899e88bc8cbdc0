#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Trains the base model on the kinds that are not withheld.

    train_base.py DIR OUT --seconds 485      reads DIR/tokens.npz(.xz) and DIR/tokenizer.json,
                                             writes the checkpoint and base_report.json to OUT
Matrices are trained with Muon, everything else with AdamW; the rate is held, then lowered
linearly over the last part of the time.
"""
import argparse
import json
import os
import time

import torch
from tokenizers import Tokenizer

import export
import model
from data import BASE_SHARE, Batches, read_tokens

WARMUP_STEPS, HOLD_UNTIL = 200, 0.45
BALANCE_WEIGHT = 0.01
COMPILE_STEPS = 10
PROMPTS = ["NAME\n       mount - ", "static int ext4_", "BEZEICHNUNG\n       socket - ",
           "NOM\n       ls - ", "The scheduler in the kernel", "import os\n\n\ndef ",
           "НАЗВА\n       ", "Debian is "]


@torch.compile(dynamic=False)
def orthogonalise(g):
    """Newton-Schulz iteration of Muon (Jordan 2024) on a stack of matrices, rows <= columns."""
    x = g.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


class Muon:
    """Muon over stacks of equally shaped matrices, the update scaled to AdamW's usual size."""

    def __init__(self, parameters, decay=0.1, momentum=0.95):
        self.parameters, self.decay, self.momentum = parameters, decay, momentum
        self.buffers = [torch.zeros_like(p) for p in parameters]

    def groups(self):
        """Lists of indices of parameters whose matrices can be orthogonalised together."""
        found = {}
        for i, p in enumerate(self.parameters):
            found.setdefault(tuple(p.shape), []).append(i)
        return found

    @torch.no_grad()
    def step(self, rate):
        grads = [p.grad for p in self.parameters]
        torch._foreach_lerp_(self.buffers, grads, 1 - self.momentum)
        updates = torch._foreach_lerp(grads, self.buffers, self.momentum)
        for shape, members in self.groups().items():
            stack = torch.stack([updates[i] for i in members])
            matrices = stack.view(-1, *split_shape(shape))
            wide = matrices.shape[-2] <= matrices.shape[-1]
            x = orthogonalise(matrices if wide else matrices.mT.contiguous())
            x = (x if wide else x.mT).float() * (0.2 * max(matrices.shape[-2:]) ** 0.5)
            x = x.reshape(stack.shape)
            targets = [self.parameters[i] for i in members]
            torch._foreach_mul_(targets, 1 - rate * self.decay)
            torch._foreach_add_(targets, list(x.unbind(0)), alpha=-rate)
        for p in self.parameters:
            p.grad = None


def split_shape(shape):
    """The shape of one matrix: the gate and up parts of a fused tensor are two matrices."""
    if len(shape) == 3 and shape[1] == 2 * model.EXPERT_WIDTH:
        return (model.EXPERT_WIDTH, shape[2])
    return shape[-2:]


def schedule(step, fraction):
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    cool = min(1.0, (1 - fraction) / (1 - HOLD_UNTIL))
    return warm * max(cool, 0.01)


def train(weights, batches, args):
    """Trains in place for args.seconds; returns steps, tokens and the seconds used."""
    muon_names = [n for n in weights if n.split(".")[-1] in model.MATRICES]
    others = [n for n in weights if n not in muon_names]
    for w in weights.values():
        w.requires_grad_(True)
    muon = Muon([weights[n] for n in muon_names])
    adam = torch.optim.AdamW([weights[n] for n in others], lr=args.rate, betas=(0.9, 0.95),
                             weight_decay=0.0, fused=args.device == "cuda")
    tables = model.rope_tables(args.window, args.device)

    @torch.compile(dynamic=False)
    def objective(w, x, y, kinds):
        nll, p, use = model.loss(w, x, y, tables)
        balance, information = model.router_losses(p, use, kinds)
        total = nll + BALANCE_WEIGHT * balance - args.information_weight * information
        return total, nll.detach(), balance.detach(), information.detach()

    begin, step = time.time(), 0
    while True:
        fraction = (time.time() - begin) / args.seconds
        if step < COMPILE_STEPS:
            fraction = 0.0  # the clock starts when compiling is over
        elif fraction >= 1:
            break
        scale = schedule(step, fraction)
        total, nll, balance, information = objective(weights, *batches.draw(args.rows))
        total.backward()
        muon.step(args.rate * scale)
        adam.param_groups[0]["lr"] = args.rate * scale
        adam.step()
        adam.zero_grad(set_to_none=True)
        step += 1
        if step == COMPILE_STEPS:
            nll.item()
            print("compiled after %.0f s" % (time.time() - begin), flush=True)
            begin, first = time.time(), step
        if step % 20 == 0:
            value = nll.item()  # also keeps the host from running ahead of the clock
        if step % 250 == 0:
            rate = (step - first) * args.rows * args.window / (time.time() - begin)
            print(f"{time.time() - begin:5.0f} s step {step} loss {value:.3f} balance "
                  f"{balance.item():.3f} information {information.item():.3f} "
                  f"{rate / 1e6:.2f} M tokens/s", flush=True)
    return step, step * args.rows * args.window, time.time() - begin


def report(weights, tokens, device):
    """Held-out bits per byte and expert use of every kind, withheld ones too."""
    bits, use = {}, {}
    for kind, (_, val, size) in tokens.items():
        bits[kind], use[kind] = model.bits_per_byte(weights, val, size, device)
    seen = list(BASE_SHARE)
    js = {f"{a} | {b}": [round(model.js_divergence(use[a][i], use[b][i]), 3)
                         for i in range(model.LAYERS)]
          for n, a in enumerate(seen) for b in seen[n + 1:]}
    mean = sum(use[k] for k in seen) / len(seen) / model.EXPERTS_PER_TOKEN
    return {"bits_per_byte": {k: round(v, 4) for k, v in bits.items()},
            "js_bits_by_layer": js,
            "least_used_share_by_layer": [round(v.item(), 4) for v in mean.min(-1).values],
            "most_used_share_by_layer": [round(v.item(), 4) for v in mean.max(-1).values],
            "use": {k: [[round(x, 4) for x in row] for row in use[k].tolist()] for k in use}}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data")
    parser.add_argument("out")
    parser.add_argument("--seconds", type=float, default=485)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--rate", type=float, default=5e-3)
    parser.add_argument("--information-weight", type=float, default=0.005)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sample-tokens", type=int, default=150)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    begin = time.time()
    tokens = read_tokens(args.data)
    tokenizer = Tokenizer.from_file(os.path.join(args.data, "tokenizer.json"))
    batches = Batches(tokens, BASE_SHARE, args.window, args.device)
    weights = model.new_weights(args.device)
    print("parameters %.2f M, data read after %.0f s" % (
        sum(w.numel() for w in weights.values()) / 1e6, time.time() - begin), flush=True)
    steps, count, seconds = train(weights, batches, args)
    print(f"steps {steps} tokens {count / 1e6:.0f} M in {seconds:.0f} s", flush=True)
    weights = {n: w.detach().bfloat16().float() for n, w in weights.items()}
    export.save_checkpoint(weights, os.path.join(args.data, "tokenizer.json"), args.out)
    facts = {"steps": steps, "tokens": count, "seconds": seconds, "rows": args.rows,
             "window": args.window} | report(weights, tokens, args.device)
    with open(os.path.join(args.out, "base_report.json"), "w") as f:
        json.dump(facts, f)
    print(facts["bits_per_byte"], facts["least_used_share_by_layer"],
          facts["most_used_share_by_layer"])
    print("c | man-de", facts["js_bits_by_layer"].get("c | man-de"))
    for prompt in PROMPTS:
        ids = model.generate(weights, tokenizer.encode(prompt).ids, args.sample_tokens, 0.7,
                             args.device)
        print("---", repr(tokenizer.decode(ids)), flush=True)


if __name__ == "__main__":
    main()
