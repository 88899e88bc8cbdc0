#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes logits and greedy tokens of the demo model, base and every adapter, as transformers and
PEFT compute them, for comparison with our own.

    make_goldens.py [models/demo] [tests/golden/demo]      one JSON per adapter, and base.json

Each file: {"adapter": name or null, "versions", "subset": [first, step, count], "prompts": [P]}.
P: {"text", "ids": prompt token ids, "greedy_float32": up to 32 ids that continue it (ends after
<|end|>, id 0), "greedy_gap_min": smallest distance of best and second best logit on the way,
"points": [Q]}, three positions in the prompt (a third, two thirds, last).
Q: {"position", "float32": R, "bfloat16": R}, R: {"logits": base64 of little-endian float32 logits
of the ids first, first+step, ...; "max_abs", "argmax", "top8": [[id, logit]], "lse"}; in bfloat16
also "error_max": largest difference from float32 over ALL ids.
float32: the bf16 weights of model and adapter widened, all arithmetic in float32. bfloat16: model
and adapter as stored.
"""
import base64
import json
import os
import sys

import peft
import torch
import transformers
from tokenizers import Tokenizer

HERE = os.path.dirname(os.path.abspath(__file__))
SUBSET = (5, 16, 512)
GREEDY = 32
CHECK = 1e-4  # our own formula against transformers in float32, of the largest logit


def load(base, adapter, dtype):
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    if adapter:
        model = peft.PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False)
        if dtype == torch.float32:
            model = model.float()
        wrong = {p.dtype for p in model.parameters()} - {dtype}
        assert not wrong, wrong
    return model.eval()


@torch.no_grad()
def logits_of(model, ids):
    return model(torch.tensor([ids])).logits[0].float()


def describe(logits):
    first, step, count = SUBSET
    part = logits[first::step][:count].contiguous().numpy().astype("<f4")
    top = logits.topk(8)
    return {"logits": base64.b64encode(part.tobytes()).decode(),
            "max_abs": logits.abs().max().item(), "argmax": int(logits.argmax()),
            "top8": [[int(i), v.item()] for v, i in zip(top.values, top.indices)],
            "lse": logits.logsumexp(-1).item()}


def greedy(model, ids):
    ids, out, gap = list(ids), [], float("inf")
    while len(out) < GREEDY:
        best = logits_of(model, ids)[-1].topk(2)
        gap = min(gap, (best.values[0] - best.values[1]).item())
        out.append(int(best.indices[0]))
        ids.append(out[-1])
        if out[-1] == 0:
            break
    return out, gap


def one_prompt(text, tokenizer, exact, rounded):
    ids = tokenizer.encode(text).ids[:60]
    full, low = logits_of(exact, ids), logits_of(rounded, ids)
    points = []
    for position in (len(ids) // 3, 2 * len(ids) // 3, len(ids) - 1):
        error = (full[position] - low[position]).abs().max().item()
        points.append({"position": position, "float32": describe(full[position]),
                       "bfloat16": describe(low[position]) | {"error_max": error}})
    tokens, gap = greedy(exact, ids)
    return {"text": text, "ids": ids, "greedy_float32": tokens, "greedy_gap_min": gap,
            "points": points}


def check_against_formula(base, folder, name, prompt):
    """The training code's own forward pass must agree, so that no tensor was left out."""
    import export
    import model
    import train_adapters
    weights = export.load_checkpoint(base, "cpu")
    if name:
        with open(os.path.join(HERE, "adapters.json")) as f:
            spec = json.load(f)[name]
        weights = train_adapters.merged(
            weights, train_adapters.read_adapter(os.path.join(folder, name), spec, "cpu"))
    ids = torch.tensor([prompt["ids"]])
    with torch.no_grad():
        logits = model.forward(weights, ids, model.rope_tables(ids.shape[1], "cpu"))[0][0]
    for point in prompt["points"]:
        got, want = logits[point["position"]], point["float32"]
        worst = max(abs(got[i].item() - v) for i, v in want["top8"]) / want["max_abs"]
        assert worst <= CHECK and int(got.argmax()) == want["argmax"], (name, worst)


def main():
    base = sys.argv[1] if len(sys.argv) > 1 else "models/demo"
    out = sys.argv[2] if len(sys.argv) > 2 else "tests/golden/demo"
    only = sys.argv[3:]
    torch.set_num_threads(int(os.environ.get("THREADS", "1")))
    os.makedirs(out, exist_ok=True)
    tokenizer = Tokenizer.from_file(os.path.join(base, "tokenizer.json"))
    folder = os.path.join(base, "adapters")
    with open(os.path.join(HERE, "golden_prompts.json")) as f:
        prompts = json.load(f)
    with open(os.path.join(HERE, "adapters.json")) as f:
        kinds = {None: "base"} | {name: spec["kind"] for name, spec in json.load(f).items()}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__,
                "peft": peft.__version__}
    for name, kind in kinds.items():
        if only and (name or "base") not in only:
            continue
        path = name and os.path.join(folder, name)
        exact, rounded = load(base, path, torch.float32), load(base, path, torch.bfloat16)
        done = [one_prompt(text, tokenizer, exact, rounded) for text in prompts[kind]]
        check_against_formula(base, folder, name, done[0])
        with open(os.path.join(out, (name or "base") + ".json"), "w") as f:
            json.dump({"adapter": name, "versions": versions, "subset": SUBSET,
                       "prompts": done}, f)
            f.write("\n")
        worst = max(q["bfloat16"]["error_max"] / q["float32"]["max_abs"]
                    for p in done for q in p["points"])
        print(f"{name or 'base':18} prompts of {[len(p['ids']) for p in done]} ids, bf16 error "
              f"{worst:.1e} of the largest, smallest greedy gap "
              f"{min(p['greedy_gap_min'] for p in done):.4f}", flush=True)
        for p in done:
            print("   ", repr(tokenizer.decode(p["greedy_float32"])), flush=True)


if __name__ == "__main__":
    main()
