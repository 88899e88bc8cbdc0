#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Goldens of LoRA adapters: tiny random bases, adapters as PEFT writes them, and what transformers + PEFT answer.

    python3 -m venv V && V/bin/pip install torch transformers==5.17.0 peft==0.21.2
    V/bin/python tools/goldens/adapters.py            bases, and the cases of today's writer
    (peft==0.18.1 in the same place)                  the cases of writer "old": fused parameters, transposed order
    (transformers==4.57.1 peft==0.18.0 in another)    the cases of writer "v4": one matrix per expert

Every run makes the cases that its versions can write and leaves the rest alone. Written per case, in
tests/golden/adapters/NAME/:
    adapter/             adapter_config.json and adapter_model.safetensors, untouched but for the fields that a
                         case names in `written`, which PEFT then reads; with `stacked` the experts are rewritten
                         as 3-D tensors after PEFT has given the changes and logits
    golden.safetensors   tokens.I (I32), logits.I (F32 [tokens, vocab]) for I = 0, 1, made in float32
                         delta:MATRIX (F32 [out, in]): the effective change of the matrix
                         applied (I32 [1]): matrices with LoRA; writer (U8): versions, as text
                         __metadata__: base = name of the base's directory
../adapters_names.json: for 36 configurations and 86 names, what PEFT's own functions answer; ../adapters_names_old.json:
the same of writer "old" (84 names), for what changed since ("names" on the command line makes these).
../adapters_refused/NAME/ ("refused" on the command line): adapters that the server refuses by name, as PEFT wrote them.
The bases are in tests/golden/adapters/base-*/ (config.json, model.safetensors, tokenizer.json), with a
golden.safetensors of their own (tokens.I, logits.I); every writer's versions must agree with it.
"""

import json
import math
import os
import pathlib
import shutil
import sys

if os.environ.get("PYTHONHASHSEED") != "0":  # PEFT writes sets
    os.execve(sys.executable, [sys.executable, *sys.argv], dict(os.environ, PYTHONHASHSEED="0"))

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

ROOT = pathlib.Path(__file__).resolve().parents[2] / "tests/golden/adapters"
VOCAB = 80
IS_V5 = transformers.__version__.startswith("5")
PEFT = tuple(int(part) for part in peft.__version__.split(".")[:3])
WRITER = "v4" if not IS_V5 else "old" if PEFT < (0, 19, 1) else "new"

COMMON = dict(vocab_size=VOCAB, max_position_embeddings=64, rope_theta=10000.0, rms_norm_eps=1e-6,
              bos_token_id=None, eos_token_id=0, pad_token_id=None, dtype="float32")
MOE = dict(COMMON, num_experts_per_tok=2, norm_topk_prob=True, decoder_sparse_step=1)
BASES = {
    # layer 1 is dense; nothing is square; q is narrower than hidden
    "base-moe": dict(MOE, hidden_size=40, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=1,
                     head_dim=12, num_experts=5, moe_intermediate_size=24, intermediate_size=56,
                     mlp_only_layers=[1], tie_word_embeddings=True),
    # 2I = H: gate_up_proj is square
    "base-square-gate-up": dict(MOE, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                num_key_value_heads=2, head_dim=16, num_experts=4, moe_intermediate_size=16,
                                intermediate_size=32, mlp_only_layers=[], tie_word_embeddings=True),
    # I = H: down_proj is square
    "base-square-down": dict(MOE, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
                             num_key_value_heads=1, head_dim=8, num_experts=3, moe_intermediate_size=24,
                             intermediate_size=24, mlp_only_layers=[], tie_word_embeddings=True),
    "base-dense": dict(COMMON, hidden_size=44, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                       head_dim=16, intermediate_size=52, tie_word_embeddings=False),
}

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"

# name: (writer, base, LoraConfig arguments)
CASES = {
    "attention": ("new", "base-moe", dict(r=8, lora_alpha=16, target_modules=ATTENTION)),
    "rank-1": ("new", "base-dense", dict(r=1, lora_alpha=3, target_modules=["q_proj", "v_proj"])),
    "dense-all-linear": ("new", "base-dense", dict(r=33, lora_alpha=17, target_modules="all-linear")),
    "patterns": ("new", "base-dense", dict(
        r=5, lora_alpha=10, target_modules=ATTENTION + MLP,
        rank_pattern={"layers.0.self_attn.q_proj": 7, r".*\.1\.mlp\.(gate|up)_proj": 3, "v_proj": 11},
        alpha_pattern={r"^model\.layers\.2\..*": 1.5, "o_proj": 40})),
    "rslora": ("new", "base-dense", dict(r=9, lora_alpha=6, use_rslora=True, target_modules=ATTENTION + MLP,
                                         rank_pattern={"down_proj": 4})),
    "regex": ("new", "base-moe", dict(r=6, lora_alpha=12,
                                      target_modules=r"model\.layers\.[02]\.self_attn\.(q|o)_proj")),
    "layers": ("new", "base-dense", dict(r=3, lora_alpha=12, target_modules=ATTENTION + MLP,
                                         layers_to_transform=[0, 2], layers_pattern="layers")),
    "exclude": ("new", "base-dense", dict(r=4, lora_alpha=4, target_modules=ATTENTION + MLP,
                                          exclude_modules=["k_proj", "layers.1.mlp.up_proj"])),
    "fused": ("new", "base-moe", dict(r=4, lora_alpha=9, target_modules=ATTENTION,
                                      target_parameters=[GATE_UP, DOWN])),
    "fused-reversed": ("new", "base-moe", dict(r=3, lora_alpha=6, target_modules=[],
                                               target_parameters=[DOWN, GATE_UP])),
    "fused-ranks": ("new", "base-moe", dict(r=2, lora_alpha=6, target_modules=["q_proj"],
                                            target_parameters=[GATE_UP, DOWN],
                                            rank_pattern={GATE_UP: 7, r".*\.2\.mlp\.experts\.down_proj": 5},
                                            alpha_pattern={"gate_up_proj": 21})),
    "fused-gate-up": ("new", "base-moe", dict(r=5, lora_alpha=5, target_modules=[], target_parameters=[GATE_UP])),
    "fused-down": ("new", "base-moe", dict(r=5, lora_alpha=5, use_rslora=True, target_modules=[],
                                           target_parameters=[DOWN])),
    "fused-square-gate-up": ("new", "base-square-gate-up", dict(
        r=3, lora_alpha=8, target_modules=[], target_parameters=[GATE_UP])),
    "fused-square-both": ("new", "base-square-gate-up", dict(
        r=3, lora_alpha=8, target_modules=ATTENTION, target_parameters=[GATE_UP, DOWN])),
    "fused-square-down": ("new", "base-square-down", dict(
        r=4, lora_alpha=8, target_modules=[], target_parameters=[DOWN])),
    # old names on transformers 5: PEFT turns them into target_parameters of twice the rank
    "converted": ("new", "base-moe", dict(r=4, lora_alpha=8, target_modules=ATTENTION + MLP, no_dense=True)),
    "old-fused": ("old", "base-moe", dict(r=4, lora_alpha=9, target_modules=ATTENTION,
                                          target_parameters=[GATE_UP, DOWN])),
    "old-fused-down": ("old", "base-moe", dict(r=7, lora_alpha=7, target_modules=[], target_parameters=[DOWN])),
    "old-fused-square-gate-up": ("old", "base-square-gate-up", dict(
        r=3, lora_alpha=8, target_modules=[], target_parameters=[GATE_UP])),
    "old-fused-square-both": ("old", "base-square-gate-up", dict(
        r=3, lora_alpha=8, target_modules=[], target_parameters=[GATE_UP, DOWN])),
    "old-fused-square-down": ("old", "base-square-down", dict(
        r=4, lora_alpha=8, target_modules=[], target_parameters=[DOWN])),
    "per-expert": ("v4", "base-moe", dict(r=4, lora_alpha=8, target_modules=ATTENTION + MLP)),
    "per-expert-ranks": ("v4", "base-moe", dict(
        r=2, lora_alpha=3, target_modules=MLP,
        rank_pattern={r"experts\.3\.gate_proj": 9, "layers.2.mlp.experts.0.down_proj": 5, "layers.1.mlp.up_proj": 13},
        alpha_pattern={"down_proj": 7})),
    # the text of the pattern stays in the file where transformers does not rewrite the targets (dense, or older)
    "regex-text": ("new", "base-dense", dict(r=4, lora_alpha=6, target_modules=r".*\.[02]\..*(q|up|down)_proj",
                                             exclude_modules=r"model\.layers\.2\.mlp\.up.*")),
    "old-regex-text": ("old", "base-moe", dict(r=3, lora_alpha=6, target_modules=r".*\.[02]\..*(q|o)_proj")),
    "regex-per-expert": ("v4", "base-moe", dict(
        r=2, lora_alpha=4, target_modules=r".*\.(experts\.[03]\.(gate|down)_proj|0\.self_attn\.v_proj)")),
    # PEFT writes the resolved list; the text is what a person or another trainer leaves there
    "all-linear-text": ("new", "base-dense", dict(r=2, lora_alpha=3, target_modules="all-linear",
                                                  exclude_modules=r".*\.1\..*",
                                                  written=dict(target_modules="all-linear"))),
    # PEFT's matrices and changes, written as 3-D tensors: no PEFT writes these
    "stacked": ("new", "base-moe", dict(r=3, lora_alpha=6, target_modules=["q_proj"], target_parameters=[GATE_UP, DOWN],
                                        rank_pattern={"experts.gate_up_proj": 5}, stacked="linear")),
    "stacked-transposed": ("new", "base-moe", dict(r=3, lora_alpha=9, target_modules=[],
                                                   target_parameters=[GATE_UP, DOWN], stacked="transposed")),
    "stacked-words": ("v4", "base-moe", dict(r=2, lora_alpha=3, target_modules=MLP, layers_to_transform=[0, 2],
                                             layers_pattern="layers", stacked="linear")),
    # one number, no layers_pattern
    "layers-plain": ("new", "base-dense", dict(r=3, lora_alpha=12, target_modules=["q_proj", "down_proj"],
                                               layers_to_transform=2)),
    # before 0.20: experts 1 and 3 of every layer, and the dense layer 1
    "layers-per-expert": ("v4", "base-moe", dict(r=2, lora_alpha=5, target_modules=["up_proj", "down_proj"],
                                                 layers_to_transform=[1, 3])),
    # set, and without effect: nn.Linear is never fan_in_fan_out, and this base has no biases
    "no-effect": ("new", "base-dense", dict(r=2, lora_alpha=5, target_modules=["v_proj"], bias="lora_only",
                                            written=dict(fan_in_fan_out=True))),
    # embed_tokens and lm_head, with patterns of their own; saved without the base's own matrices
    "embed": ("new", "base-dense", dict(r=5, lora_alpha=8, target_modules=["embed_tokens", "v_proj"], use_rslora=True,
                                        rank_pattern={"v_proj": 2}, embeddings=False)),
    "head": ("new", "base-dense", dict(r=3, lora_alpha=6, target_modules=["lm_head"], alpha_pattern={"lm_head": 4},
                                       embeddings=False)),
    "embed-head-text": ("new", "base-dense", dict(
        r=4, lora_alpha=5, target_modules=r".*(embed_tokens|q_proj)|lm_head", rank_pattern={"model.embed_tokens": 9},
        embeddings=False)),
    # as PEFT saves it when it is not asked: the base's embeddings and head stand beside their LoRA
    "embed-head-base": ("new", "base-dense", dict(r=4, lora_alpha=8,
                                                  target_modules=["embed_tokens", "lm_head", "down_proj"])),
    # tied embeddings: each has its own LoRA and the shared matrix stays ...
    "tied": ("new", "base-moe", dict(r=4, lora_alpha=8, target_modules=["embed_tokens", "lm_head", "o_proj"],
                                     embeddings=False)),
    "tied-embed": ("new", "base-moe", dict(r=6, lora_alpha=8, target_modules=["embed_tokens"], embeddings=False)),
    # ... unless one is asked for both
    "tied-both": ("new", "base-moe", dict(r=6, lora_alpha=9, target_modules=["embed_tokens", "q_proj"],
                                          ensure_weight_tying=True)),
    "tied-both-head": ("new", "base-moe", dict(r=3, lora_alpha=9, target_modules=["lm_head"],
                                               ensure_weight_tying=True)),
}


# What the server refuses by name, as PEFT writes it: (base, LoraConfig arguments, save_pretrained arguments)
REFUSED = {
    "dora": ("base-dense", dict(target_modules=["q_proj"], use_dora=True), {}),
    "modules-to-save": ("base-dense", dict(target_modules=["q_proj"], modules_to_save=["lm_head"]), {}),
    "lora-bias": ("base-dense", dict(target_modules=["q_proj"], lora_bias=True), {}),
    "trained-tokens": ("base-dense", dict(target_modules=["q_proj"], trainable_token_indices=[1, 2]), {}),
    "embeddings-base": ("base-dense", dict(target_modules=["q_proj", "embed_tokens"]), {}),
    "embeddings-whole": ("base-dense", dict(target_modules=["q_proj"]), dict(save_embedding_layers=True)),
    "router": ("base-moe", dict(target_modules=["q_proj"], target_parameters=["gate.weight"]), {}),
    "shared-experts": ("shared", dict(target_modules=["q_proj", "shared_expert.up_proj"]), {}),
}


def make_tokenizer(path):
    from tokenizers import Tokenizer, models, pre_tokenizers, decoders
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|end|>"] + alphabet
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words[:VOCAB])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(path))


def make_base(name, seed):
    path = ROOT / name
    torch.manual_seed(seed)
    arguments = BASES[name]
    kind = "Qwen3Moe" if "num_experts" in arguments else "Qwen3"
    config = getattr(transformers, kind + "Config")(**arguments)
    model = getattr(transformers, kind + "ForCausalLM")(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) / math.sqrt(parameter.shape[-1]) * 1.3)
    shutil.rmtree(path, ignore_errors=True)
    model.save_pretrained(path)
    (path / "model.safetensors").chmod(0o644)
    make_tokenizer(path / "tokenizer.json")
    model, tensors = load_base(name), {}
    for i, tokens in sequences():
        tensors[f"tokens.{i}"] = tokens[0].to(torch.int32)
        tensors[f"logits.{i}"] = logits_of(model, tokens)
    save_file(tensors, path / "golden.safetensors", metadata={"base": name})


def sequences():
    for i, length in enumerate((7, 12)):
        yield i, torch.randint(1, VOCAB, (1, length), generator=torch.Generator().manual_seed(100 + i))


def logits_of(model, tokens):
    with torch.no_grad():
        return model(tokens).logits[0].float()


def load_base(name):
    kind = "Qwen3MoeForCausalLM" if "num_experts" in BASES[name] else "Qwen3ForCausalLM"
    # The configuration is given, because versions 4 and 5 name its fields differently.
    config = getattr(transformers, kind.removesuffix("ForCausalLM") + "Config")(**BASES[name])
    model = getattr(transformers, kind).from_pretrained(ROOT / name, config=config, dtype=torch.float32,
                                                        attn_implementation="eager")
    return model.eval()


def deltas(model):
    """Effective change of every matrix, (out, in), by its name in the checkpoint."""
    out = {}
    for name, module in model.named_modules():
        is_embedding = "default" in getattr(module, "lora_embedding_A", {})
        if not is_embedding and "default" not in getattr(module, "lora_A", {}):
            continue
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        delta = module.get_delta_weight("default").detach().float()
        if is_embedding:
            delta = delta.T
        if delta.dim() == 2:
            out[name] = delta
            continue
        parameter = module.parameter_name
        for e in range(delta.shape[0]):
            if parameter == "down_proj":
                out[f"{name}.{e}.down_proj"] = delta[e]
            else:
                half = delta.shape[1] // 2
                out[f"{name}.{e}.gate_proj"] = delta[e, :half]
                out[f"{name}.{e}.up_proj"] = delta[e, half:]
    return out


def kept(name):
    """Which deltas are committed: all of them would be 10 times the size."""
    if name in ("model.embed_tokens", "lm_head"):
        return True
    layer = int(name.split(".")[2])
    expert = int(name.split(".")[5]) if ".experts." in name else 0
    return layer in (0, 2) and expert in (0, 3)


def stack(path, base, order):
    """Rewrites the experts of an adapter as 3-D tensors: A [E, r, in], B [E, out, r], or each transposed."""
    experts, out, single = BASES[base]["num_experts"], {}, {}
    for key, tensor in load_file(path / "adapter_model.safetensors").items():
        prefix, _, rest = key.partition(".mlp.experts.")
        parts = rest.split(".")
        if not rest:
            out[key] = tensor
        elif parts[0].isdigit():
            single.setdefault((f"{prefix}.mlp.experts.{parts[1]}.{parts[2]}.weight"), {})[int(parts[0])] = tensor
        else:  # both parameters are targeted: the inner one is gate_up_proj
            word = "gate_up_proj" if parts[0] == "base_layer" else "down_proj"
            if parts[-2] == "lora_A":
                tensor = tensor.view(experts, -1, tensor.shape[1])
            else:
                tensor = tensor.view(tensor.shape[0], -1, experts).permute(2, 0, 1)
            out[f"{prefix}.mlp.experts.{word}.{parts[-2]}.weight"] = tensor
    for key, tensors in single.items():
        out[key] = torch.stack([tensors[e] for e in range(experts)])
    for key, tensor in out.items():
        turned = order == "transposed" and tensor.dim() == 3
        out[key] = (tensor.transpose(1, 2) if turned else tensor).contiguous()
    save_file(out, path / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = json.loads((path / "adapter_config.json").read_text())
    settings["target_modules"] += settings["target_parameters"] or []
    settings["target_parameters"] = None
    (path / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True))


def make_case(name, seed):
    writer, base, arguments = CASES[name]
    path = ROOT / name
    arguments = dict(arguments)
    torch.manual_seed(seed)
    written, stacked = arguments.pop("written", {}), arguments.pop("stacked", None)
    embeddings = arguments.pop("embeddings", "auto")
    if arguments.pop("no_dense", False):
        arguments["exclude_modules"] = ["layers.1.mlp." + word for word in MLP]
    model = get_peft_model(load_base(base), LoraConfig(task_type="CAUSAL_LM", **arguments)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    model.save_pretrained(path / "adapter", save_embedding_layers=embeddings)
    (path / "adapter/README.md").unlink(missing_ok=True)
    settings = json.loads((path / "adapter/adapter_config.json").read_text())
    settings["base_model_name_or_path"] = base  # no path of this machine
    settings.update(written)
    (path / "adapter/adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True))
    # What a reader of the files gets, not what is in memory.
    model = peft.PeftModel.from_pretrained(load_base(base), path / "adapter").eval()
    found = deltas(model)
    tensors = {"delta:" + key: value.contiguous() for key, value in found.items() if kept(key)}
    plain = load_file(ROOT / base / "golden.safetensors")
    for i, tokens in sequences():
        logits = logits_of(model, tokens)
        with model.disable_adapter():
            off = float((logits_of(model, tokens) - plain[f"logits.{i}"]).abs().max())
        assert off < 1e-4, (name, off)
        difference = float((logits - plain[f"logits.{i}"]).abs().max())
        assert difference > 0.05, (name, difference)
        tensors[f"tokens.{i}"] = tokens[0].to(torch.int32)
        tensors[f"logits.{i}"] = logits
    writer = f"peft {peft.__version__}, transformers {transformers.__version__}"
    tensors["writer"] = torch.tensor(list(writer.encode()), dtype=torch.uint8)
    tensors["applied"] = torch.tensor([len(found)], dtype=torch.int32)
    if stacked:
        stack(path / "adapter", base, stacked)
    # One entry: safetensors writes several in no particular order.
    save_file(tensors, path / "golden.safetensors", metadata={"base": base})
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    print(f"{name}: {len(found)} matrices, logits moved by {difference:.3f}, {size} bytes")


def make_refused(name):
    base, arguments, saving = REFUSED[name]
    path = ROOT.with_name("adapters_refused") / name
    torch.manual_seed(0)
    if base == "shared":
        config = transformers.Qwen2MoeConfig(**dict(BASES["base-moe"], shared_expert_intermediate_size=8))
        model = transformers.Qwen2MoeForCausalLM(config)
    else:
        model = load_base(base)
    model = get_peft_model(model, LoraConfig(r=1, lora_alpha=2, task_type="CAUSAL_LM", **arguments))
    shutil.rmtree(path, ignore_errors=True)
    model.save_pretrained(path, **saving)
    (path / "README.md").unlink(missing_ok=True)
    settings = json.loads((path / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = base
    (path / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True))
    print(f"{name}: {sorted(load_file(path / 'adapter_model.safetensors'))[:2]}")


# (LoraConfig arguments): which matrices PEFT targets, at what rank and scale.
MATCHING = [
    dict(target_modules=["q_proj"]),
    dict(target_modules=["model.layers.1.self_attn.q_proj", "layers.2.mlp.up_proj"]),
    dict(target_modules=["self_attn.q_proj", "proj", "_proj", "experts.3.gate_proj"]),
    dict(target_modules=["q_proj", "up_proj"], layers_to_transform=[1]),
    dict(target_modules=["q_proj", "model.layers.0.self_attn.k_proj"], layers_to_transform=1),
    dict(target_modules=["q_proj"], layers_to_transform=[0, 2], layers_pattern="layers"),
    dict(target_modules=["q_proj"], layers_to_transform=[0, 2], layers_pattern=["h", "lay(er|ers)"]),
    dict(target_modules=["q_proj"], layers_to_transform=[2], layers_pattern=["h"]),
    dict(target_modules=["gate_proj"], layers_to_transform=[12], layers_pattern=["layers", "experts"]),
    dict(target_modules=[], target_parameters=["mlp.experts.gate_up_proj"], layers_to_transform=[]),
    dict(target_modules=r".*\.q_proj"),
    dict(target_modules=r"q_proj"),
    dict(target_modules=r"model\.layers\.(\d+)\.mlp\.experts\.\1\..*"),
    dict(target_modules=r"(?i).*Q_PROJ|.*\.(?P<w>up|down)_proj"),
    dict(target_modules=r".*layers\.1[0-9]\..*(?<!gate)_proj"),
    dict(target_modules=r"(?!.*self_attn).*"),
    dict(target_modules=["q_proj", "k_proj", "up_proj"], exclude_modules=["layers.0.self_attn.q_proj", "k_proj"]),
    dict(target_modules=["q_proj", "k_proj"], exclude_modules=r".*\.0\..*"),
    dict(target_modules=r".*", exclude_modules=r".*mlp.*"),
    dict(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "down_proj"]),
    dict(target_modules=[], target_parameters=["model.layers.2.mlp.experts.down_proj", "experts.gate_up_proj"]),
    dict(target_modules=["q_proj"], rank_pattern={"q_proj": 2, "layers.1.self_attn.q_proj": 3}),
    dict(target_modules=["q_proj"], rank_pattern={"z": 7, "layers.1.self_attn.q_proj": 3, "q_proj": 2}),
    dict(target_modules=["q_proj"], rank_pattern={"proj": 2, "_proj": 3, ".proj": 4, "self_attn.._proj": 5}),
    dict(target_modules=["q_proj"], rank_pattern={"^model.layers.1.mlp.up_proj": 9, "^layers.0.*": 8}),
    dict(target_modules=["q_proj"], rank_pattern={r"model\.layers\.\d\..*_proj": 11, "experts": 6}),
    dict(target_modules=["q_proj"], rank_pattern={"q_proj|k_proj": 5, r"(a|b|up)_proj": 12, r"1\d\.self_attn\..*": 13}),
    dict(target_modules=["q_proj"], rank_pattern={r"experts\.(\d+)\.gate_proj": 3, r"experts\.1\.down_proj": 4}),
    dict(target_modules=["q_proj"], rank_pattern={r"(.)_(\w+)$": 3}),
    dict(target_modules=["q_proj"], alpha_pattern={"q_proj": 1, "up_proj": 0.5, "gate_up_proj": -3}, use_rslora=True),
    dict(target_modules=["q_proj"], alpha_pattern={"down_proj": 64}, rank_pattern={"mlp.down_proj": 48}),
    dict(target_modules=["embed_tokens", "lm_head"], layers_to_transform=[0]),
    dict(target_modules=["model.embed_tokens", "head"], rank_pattern={"embed_tokens": 3, "lm_head": 2}),
    dict(target_modules=r"(model\.)?embed_tokens|lm_.*", exclude_modules=["lm_head"], alpha_pattern={".*head": 5}),
    dict(target_modules=["lm_head", "q_proj"], layers_to_transform=[1], layers_pattern="layers", exclude_modules=r"model\.e.*"),
    dict(target_modules=r".*", alpha_pattern={"model": 2, "model.embed_tokens": 7}, use_rslora=True),
]
# Before 0.20 layers_to_transform without layers_pattern took the last number of a name, not the first.
MATCHING_OLD = [
    dict(target_modules=["q_proj", "up_proj"], layers_to_transform=[1]),
    dict(target_modules=["q_proj", "gate_proj", "model.layers.0.self_attn.k_proj"], layers_to_transform=3),
    dict(target_modules=["q_proj", "up_proj"], layers_to_transform=[0, 12], layers_pattern="layers"),
    dict(target_modules=["up_proj"], layers_to_transform=[1], layers_pattern=["h", "experts"]),
]


def matching_names():
    words = {"self_attn": ATTENTION, "mlp": MLP}
    for layer in (0, 1, 2, 12):
        for part, modules in words.items():
            for word in modules:
                yield f"model.layers.{layer}.{part}.{word}", False
        for expert in (0, 1, 3, 12):
            for word in MLP:
                yield f"model.layers.{layer}.mlp.experts.{expert}.{word}", False
        for word in ("gate_up_proj", "down_proj"):
            yield f"model.layers.{layer}.mlp.experts.{word}", True
    if WRITER == "new":
        yield "model.embed_tokens", False
        yield "lm_head", False


def make_matching(file, cases):
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key
    out = []
    for arguments in cases:
        config = LoraConfig(r=16, lora_alpha=24, task_type="CAUSAL_LM", **arguments)
        answers = []
        for name, is_parameter in matching_names():
            targets = config.target_parameters or []
            if is_parameter:  # _inject_parameters
                targeted = name in targets or any(name.endswith("." + target) for target in targets)
            else:
                targeted = bool(check_target_module_exists(config, name))
            rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
            alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), name), config.lora_alpha)
            scale = alpha / math.sqrt(rank) if config.use_rslora else alpha / rank
            answers.append([name, targeted, rank, scale])
        arguments = dict(arguments, peft_type="LORA", r=16, lora_alpha=24, peft_version=peft.__version__)
        out.append({"config": json.dumps(arguments), "answers": answers})
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in out)
    ROOT.with_name(file).write_text("[" + lines + "]\n")
    print(f"matching: {len(out)} configurations, {len(answers)} names each")


def main():
    chosen = sys.argv[1:]
    print(f"writer {WRITER}: peft {peft.__version__}, transformers {transformers.__version__}")
    if WRITER == "new" and not chosen:
        for seed, name in enumerate(BASES):
            make_base(name, seed)
    if not chosen or "names" in chosen:
        if WRITER == "new":
            make_matching("adapters_names.json", MATCHING)
        elif WRITER == "old":
            make_matching("adapters_names_old.json", MATCHING_OLD)
    for name in REFUSED:
        if WRITER == "new" and (not chosen or "refused" in chosen):
            make_refused(name)
    for seed, (name, case) in enumerate(CASES.items()):
        if case[0] == WRITER and (not chosen or name in chosen):
            make_case(name, 1000 + seed)


if __name__ == "__main__":
    main()
