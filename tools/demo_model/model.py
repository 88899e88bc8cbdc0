# SPDX-License-Identifier: Apache-2.0
"""The demo model as plain functions over a dictionary of tensors, for training.

Qwen3-MoE: RMS norms, per-head query and key norms, rotary positions, grouped-query attention, a
router that picks EXPERTS_PER_TOKEN of EXPERTS and norms their weights to one, tied embeddings.
Tensors have the shapes transformers 5 has in memory: experts fused, gate_up (E, 2I, H) with the
gate's rows first, down (E, H, I). All experts are computed densely and masked by the routing
weights: eight times the arithmetic, but three large matrix products instead of many tiny ones.
"""
import math

import torch
import torch.nn.functional as F

VOCABULARY, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 8192, 256, 8, 4, 2, 64
EXPERTS, EXPERT_WIDTH, EXPERTS_PER_TOKEN = 32, 64, 4
ROPE_THETA, NORM_EPS, CONTEXT = 1_000_000.0, 1e-6, 2048
MATRICES = ("q", "k", "v", "o", "gate_up", "down")


def matrix_shapes():
    return {"q": (HEADS * HEAD_DIM, HIDDEN), "k": (KV_HEADS * HEAD_DIM, HIDDEN),
            "v": (KV_HEADS * HEAD_DIM, HIDDEN), "o": (HIDDEN, HEADS * HEAD_DIM),
            "gate_up": (EXPERTS, 2 * EXPERT_WIDTH, HIDDEN), "down": (EXPERTS, HIDDEN, EXPERT_WIDTH)}


def new_weights(device):
    weights = {"embed": torch.randn(VOCABULARY, HIDDEN, device=device) * 0.02,
               "norm": torch.ones(HIDDEN, device=device)}
    for layer in range(LAYERS):
        for name, shape in matrix_shapes().items():
            scale = shape[-1] ** -0.5 * (0.3 if name in ("o", "down") else 1.0)
            weights[f"{layer}.{name}"] = torch.randn(*shape, device=device) * scale
        weights[f"{layer}.router"] = torch.randn(EXPERTS, HIDDEN, device=device) * 0.02
        for name, size in (("norm1", HIDDEN), ("norm2", HIDDEN), ("q_norm", HEAD_DIM),
                           ("k_norm", HEAD_DIM)):
            weights[f"{layer}.{name}"] = torch.ones(size, device=device)
    return weights


def rms(x, weight):
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), NORM_EPS).to(x.dtype)


def rotate(x, cos, sin):
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


def rope_tables(length, device):
    inverse = ROPE_THETA ** (-torch.arange(0, HEAD_DIM, 2, device=device).float() / HEAD_DIM)
    angle = torch.outer(torch.arange(length, device=device).float(), inverse)
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def attention(x, w, layer, tables):
    batch, length, _ = x.shape
    y = rms(x, w[f"{layer}.norm1"])

    def heads(name, count):
        return F.linear(y, w[f"{layer}.{name}"]).view(batch, length, count, HEAD_DIM)

    q = rms(heads("q", HEADS), w[f"{layer}.q_norm"]).transpose(1, 2)
    k = rms(heads("k", KV_HEADS), w[f"{layer}.k_norm"]).transpose(1, 2)
    v = heads("v", KV_HEADS).transpose(1, 2)
    a = F.scaled_dot_product_attention(rotate(q, *tables), rotate(k, *tables), v, is_causal=True,
                                       enable_gqa=True)
    a = a.transpose(1, 2).reshape(batch, length, HEADS * HEAD_DIM)
    return x + F.linear(a, w[f"{layer}.o"])


def experts(x, w, layer):
    """Returns the new residual, the router's probabilities and which experts were used."""
    batch, length, _ = x.shape
    y = rms(x, w[f"{layer}.norm2"])
    p = F.linear(y, w[f"{layer}.router"]).float().softmax(-1)
    top, chosen = p.topk(EXPERTS_PER_TOKEN, -1)
    gate = torch.zeros_like(p).scatter(-1, chosen, top / top.sum(-1, keepdim=True))
    fused = F.linear(y, w[f"{layer}.gate_up"].reshape(-1, HIDDEN))
    fused = fused.view(batch, length, EXPERTS, 2, EXPERT_WIDTH)
    h = F.silu(fused[..., 0, :]) * fused[..., 1, :] * gate.unsqueeze(-1).to(y.dtype)
    down = w[f"{layer}.down"].permute(1, 0, 2).reshape(HIDDEN, -1)
    return x + F.linear(h.reshape(batch, length, -1), down), p, (gate > 0).float()


def forward(w, ids, tables):
    """Logits, and per layer the router's mean probabilities and use, (layers, batch, experts)."""
    x = F.embedding(ids, w["embed"])
    probabilities, use = [], []
    for layer in range(LAYERS):
        x = attention(x, w, layer, tables)
        x, p, u = experts(x, w, layer)
        probabilities.append(p.mean(1))
        use.append(u.mean(1))
    logits = F.linear(rms(x, w["norm"]), w["embed"])
    return logits, torch.stack(probabilities), torch.stack(use)


def loss(w, ids, targets, tables):
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits, probabilities, use = forward(w, ids, tables)
    nll = F.cross_entropy(logits.float().view(-1, VOCABULARY), targets.reshape(-1))
    return nll, probabilities, use


def router_losses(probabilities, use, kind_rows):
    """Balance over the whole batch (1 is perfect), and what an expert tells about the kind.

    kind_rows is (batch, kinds), one-hot. The second value is the mutual information in nats
    between the kind of a text and the expert drawn for one of its tokens, averaged over layers.
    """
    share = use.mean(1) / EXPERTS_PER_TOKEN
    mean = probabilities.mean(1)
    balance = EXPERTS * (share * mean).sum(-1).mean()
    count = kind_rows.sum(0).clamp_min(1e-6)
    by_kind = torch.einsum("bk,lbe->lke", kind_rows, probabilities) / count[None, :, None]
    divergence = (by_kind * ((by_kind + 1e-9).log() - (mean[:, None] + 1e-9).log())).sum(-1)
    return balance, (divergence * (count / count.sum())).sum(-1).mean()


def js_divergence(p, q):
    """Jensen-Shannon divergence in bits of two vectors of non-negative numbers."""
    p, q = p / p.sum(), q / q.sum()
    m = (p + q) / 2

    def kl(a):
        return (a * (a.clamp_min(1e-9) / m.clamp_min(1e-9)).log2()).sum()
    return (kl(p) + kl(q)).item() / 2


@torch.no_grad()
def bits_per_byte(w, tokens, size_bytes, device, window=1024):
    """Held-out bits per byte over windows of a token array, and expert use (layers, experts)."""
    v = torch.from_numpy(tokens.astype("int64")).to(device)
    n = (len(v) - 1) // window
    x, y = v[:n * window].view(n, window), v[1:n * window + 1].view(n, window)
    tables = rope_tables(window, device)
    total, use = 0.0, 0
    for i in range(0, n, 16):
        nll, _, u = loss(w, x[i:i + 16], y[i:i + 16], tables)
        total += nll.item() * x[i:i + 16].numel()
        use = use + u.sum(1)
    return total / math.log(2) * (len(v) / (n * window)) / size_bytes, use / n


@torch.no_grad()
def generate(w, ids, count, temperature, device, seed=0):
    generator = torch.Generator(device=device).manual_seed(seed)
    ids = list(ids)
    for _ in range(count):
        x = torch.tensor([ids[-CONTEXT:]], device=device)
        with torch.autocast(device.split(":")[0], torch.bfloat16):
            logits = forward(w, x, rope_tables(x.shape[1], device))[0]
        p = (logits[0, -1].float() / temperature).softmax(-1)
        token = torch.multinomial(p, 1, generator=generator).item()
        if token == 0:
            break
        ids.append(token)
    return ids
