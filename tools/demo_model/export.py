# SPDX-License-Identifier: Apache-2.0
"""Writes the demo model as a Hugging Face checkpoint, and reads it back for training."""
import json
import os
import shutil

import torch
from safetensors.torch import load_file, save_file

import model

SHARDS = 3
ATTENTION = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
             "o": "self_attn.o_proj"}
SMALL = {"router": "mlp.gate", "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
         "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}


def config():
    return {
        "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False,
        "attention_dropout": 0.0, "bos_token_id": None, "decoder_sparse_step": 1,
        "eos_token_id": 0, "head_dim": model.HEAD_DIM, "hidden_act": "silu",
        "hidden_size": model.HIDDEN, "initializer_range": 0.02,
        "intermediate_size": model.EXPERT_WIDTH * model.EXPERTS_PER_TOKEN,
        "max_position_embeddings": model.CONTEXT, "max_window_layers": model.LAYERS,
        "mlp_only_layers": [], "model_type": "qwen3_moe",
        "moe_intermediate_size": model.EXPERT_WIDTH, "norm_topk_prob": True,
        "num_attention_heads": model.HEADS, "num_experts": model.EXPERTS,
        "num_experts_per_tok": model.EXPERTS_PER_TOKEN, "num_hidden_layers": model.LAYERS,
        "num_key_value_heads": model.KV_HEADS, "output_router_logits": False, "pad_token_id": 0,
        "rms_norm_eps": model.NORM_EPS, "rope_scaling": None, "rope_theta": model.ROPE_THETA,
        "router_aux_loss_coef": 0.01, "sliding_window": None, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False,
        "vocab_size": model.VOCABULARY}


def to_published_names(weights):
    """Our fused tensors under the names, and one by one, as published Qwen3-MoE files have them."""
    out = {"model.embed_tokens.weight": weights["embed"]}
    for layer in range(model.LAYERS):
        prefix = f"model.layers.{layer}."
        for ours, theirs in (ATTENTION | SMALL).items():
            out[f"{prefix}{theirs}.weight"] = weights[f"{layer}.{ours}"]
        gate_up, down = weights[f"{layer}.gate_up"], weights[f"{layer}.down"]
        for expert in range(model.EXPERTS):
            name = f"{prefix}mlp.experts.{expert}."
            out[name + "gate_proj.weight"] = gate_up[expert, :model.EXPERT_WIDTH]
            out[name + "up_proj.weight"] = gate_up[expert, model.EXPERT_WIDTH:]
            out[name + "down_proj.weight"] = down[expert]
    out["model.norm.weight"] = weights["norm"]
    return {k: v.to(torch.bfloat16).cpu().contiguous().clone() for k, v in out.items()}


def load_checkpoint(folder, device):
    """The checkpoint in the training form, float32."""
    files = sorted(f for f in os.listdir(folder) if f.endswith(".safetensors"))
    stored = {}
    for name in files:
        stored |= load_file(os.path.join(folder, name))
    out = {"embed": stored["model.embed_tokens.weight"], "norm": stored["model.norm.weight"]}
    for layer in range(model.LAYERS):
        prefix = f"model.layers.{layer}."
        for ours, theirs in (ATTENTION | SMALL).items():
            out[f"{layer}.{ours}"] = stored[f"{prefix}{theirs}.weight"]

        def part(name):
            return torch.stack([stored[f"{prefix}mlp.experts.{e}.{name}_proj.weight"]
                                for e in range(model.EXPERTS)])
        out[f"{layer}.gate_up"] = torch.cat([part("gate"), part("up")], 1)
        out[f"{layer}.down"] = part("down")
    return {k: v.float().to(device) for k, v in out.items()}


def write_json(path, value):
    with open(path, "w") as f:
        json.dump(value, f, indent=2)
        f.write("\n")


def save_checkpoint(weights, tokenizer_json, folder):
    os.makedirs(folder, exist_ok=True)
    tensors = to_published_names(weights)
    room = sum(t.nbytes for t in tensors.values()) / SHARDS
    shards, used = [{}], 0
    for name, tensor in tensors.items():
        if used + tensor.nbytes / 2 > room * len(shards):
            shards.append({})
        shards[-1][name] = tensor
        used += tensor.nbytes
    index = {"metadata": {"total_size": used}, "weight_map": {}}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, os.path.join(folder, name), metadata={"format": "pt"})
        index["weight_map"] |= {key: name for key in shard}
    write_json(os.path.join(folder, "model.safetensors.index.json"), index)
    write_json(os.path.join(folder, "config.json"), config())
    write_json(os.path.join(folder, "generation_config.json"), {
        "do_sample": True, "eos_token_id": 0, "pad_token_id": 0, "temperature": 0.7,
        "top_k": 20, "top_p": 0.95})
    write_json(os.path.join(folder, "tokenizer_config.json"), {
        "add_prefix_space": False, "added_tokens_decoder": {"0": {
            "content": "<|end|>", "lstrip": False, "normalized": False, "rstrip": False,
            "single_word": False, "special": True}},
        "bos_token": None, "clean_up_tokenization_spaces": False, "eos_token": "<|end|>",
        "model_max_length": model.CONTEXT, "pad_token": "<|end|>",
        "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": None})
    shutil.copy(tokenizer_json, os.path.join(folder, "tokenizer.json"))
