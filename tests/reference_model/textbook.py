"""Qwen3.5-MoE's decoder as loops over tokens, heads and experts, in fp64: slow, plain, sharing no code with the model.

Everything is a list of one-dimensional tensors: ``x[t]`` is token t. Only one sequence at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]
Tokens = list[Tensor]


def logits(
    config: Mapping[str, Any], weights: Weights, ids: list[int], positions: list[tuple[int, int, int]]
) -> Tensor:
    """[T, V] for one sequence of token ids and their (time, height, width) positions."""
    return torch.stack([weights["lm_head.weight"].double() @ x for x in hidden(config, weights, ids, positions)])


def hidden(
    config: Mapping[str, Any], weights: Weights, ids: list[int], positions: list[tuple[int, int, int]]
) -> Tokens:
    """Decoder output after the final norm."""
    w = {name.removeprefix("model."): tensor.double() for name, tensor in weights.items()}
    x = [w["embed_tokens.weight"][i] for i in ids]
    for n, kind in enumerate(config["layer_types"]):
        x = decoder_layer(config, part(w, f"layers.{n}."), kind, x, positions)
    return [offset_norm(token, w["norm.weight"], config) for token in x]


def draft_logits(
    config: Mapping[str, Any],
    weights: Weights,
    states: Tokens,
    next_ids: list[int],
    positions: list[tuple[int, int, int]],
) -> Tensor:
    """[T, V] of the prediction head: states at t and tokens at t + 1 score the tokens at t + 2."""
    w = {name.removeprefix("model."): tensor.double() for name, tensor in weights.items()}
    x = []
    for state, following in zip(states, next_ids, strict=True):
        embedding = offset_norm(w["embed_tokens.weight"][following], w["mtp.pre_fc_norm_embedding.weight"], config)
        previous = offset_norm(state, w["mtp.pre_fc_norm_hidden.weight"], config)
        x.append(w["mtp.fc.weight"] @ torch.cat([embedding, previous]))
    x = decoder_layer(config, part(w, "mtp.layers.0."), "full_attention", x, positions)
    return torch.stack([w["lm_head.weight"] @ offset_norm(token, w["mtp.norm.weight"], config) for token in x])


def part(w: Weights, prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in w.items() if name.startswith(prefix)}


def decoder_layer(
    config: Mapping[str, Any], w: Weights, kind: str, x: Tokens, positions: list[tuple[int, int, int]]
) -> Tokens:
    normal = [offset_norm(token, w["input_layernorm.weight"], config) for token in x]
    if kind == "full_attention":
        mixed = attention(config, part(w, "self_attn."), normal, positions)
    else:
        mixed = delta_net(config, part(w, "linear_attn."), normal)
    out = []
    for token, change in zip(x, mixed, strict=True):
        between = token + change
        out.append(
            between + moe(config, part(w, "mlp."), offset_norm(between, w["post_attention_layernorm.weight"], config))
        )
    return out


def offset_norm(x: Tensor, weight: Tensor, config: Mapping[str, Any]) -> Tensor:
    mean_square = sum(float(v) ** 2 for v in x) / len(x)
    return x / math.sqrt(mean_square + config["rms_norm_eps"]) * (1 + weight)


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def rotated(config: Mapping[str, Any], head: Tensor, position: tuple[int, int, int]) -> Tensor:
    rope = config["rope_parameters"]
    rotary = int(config["head_dim"] * rope["partial_rotary_factor"])
    planes = rotary // 2
    _, height, width = rope["mrope_section"]
    # fp32 on purpose: angles are fp32 products in every engine
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, rotary, 2, dtype=torch.float32) / rotary)
    out = head.clone()
    for i in range(planes):
        axis = 0
        if i % 3 == 1 and i < 3 * height:
            axis = 1
        if i % 3 == 2 and i < 3 * width:
            axis = 2
        angle = torch.tensor(float(position[axis]), dtype=torch.float32) * frequencies[i]
        cos, sin = float(torch.cos(angle)), float(torch.sin(angle))
        out[i] = head[i] * cos - head[i + planes] * sin
        out[i + planes] = head[i + planes] * cos + head[i] * sin
    return out


def attention(config: Mapping[str, Any], w: Weights, x: Tokens, positions: list[tuple[int, int, int]]) -> Tokens:
    n, m, size = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    keys: list[list[Tensor]] = []
    values: list[list[Tensor]] = []
    out = []
    for t, token in enumerate(x):
        k, v = w["k_proj.weight"] @ token, w["v_proj.weight"] @ token
        keys.append(
            [
                rotated(config, offset_norm(k[h * size : (h + 1) * size], w["k_norm.weight"], config), positions[t])
                for h in range(m)
            ]
        )
        values.append([v[h * size : (h + 1) * size] for h in range(m)])
        heads = []
        q = w["q_proj.weight"] @ token
        for h in range(n):
            query = q[2 * h * size : (2 * h + 1) * size]
            gate = q[(2 * h + 1) * size : (2 * h + 2) * size]
            query = rotated(config, offset_norm(query, w["q_norm.weight"], config), positions[t])
            shared = h // (n // m)
            scores = [float(query @ keys[j][shared]) / math.sqrt(size) for j in range(t + 1)]
            top = max(scores)
            powers = [math.exp(s - top) for s in scores]
            mixed = sum((p / sum(powers) * values[j][shared] for j, p in enumerate(powers)), torch.zeros(size).double())
            heads.append(mixed * sigmoid(gate))
        out.append(w["o_proj.weight"] @ torch.cat(heads))
    return out


def delta_net(config: Mapping[str, Any], w: Weights, x: Tokens) -> Tokens:
    hk, hv = config["linear_num_key_heads"], config["linear_num_value_heads"]
    dk, dv = config["linear_key_head_dim"], config["linear_value_head_dim"]
    taps = w["conv1d.weight"][:, 0]
    width = taps.shape[1]
    raw = [w["in_proj_qkv.weight"] @ token for token in x]
    states = [torch.zeros(dk, dv).double() for _ in range(hv)]
    out = []
    for t, token in enumerate(x):
        convolved = torch.zeros_like(raw[0])
        for j in range(width):
            if t - width + 1 + j >= 0:
                convolved = convolved + taps[:, j] * raw[t - width + 1 + j]
        mixed = silu(convolved)
        z, a, b = w["in_proj_z.weight"] @ token, w["in_proj_a.weight"] @ token, w["in_proj_b.weight"] @ token
        heads = []
        for h in range(hv):
            kh = h // (hv // hk)
            q = unit(mixed[kh * dk : (kh + 1) * dk]) / math.sqrt(dk)
            k = unit(mixed[hk * dk + kh * dk : hk * dk + (kh + 1) * dk])
            v = mixed[2 * hk * dk + h * dv : 2 * hk * dk + (h + 1) * dv]
            step = math.log1p(math.exp(float(a[h] + w["dt_bias"][h])))
            forget = math.exp(-math.exp(float(w["A_log"][h])) * step)
            s = states[h] * forget
            wrong = v - k @ s
            s = s + torch.outer(k, wrong) * sigmoid(b[h])
            states[h] = s
            read = q @ s
            mean_square = float(read @ read) / dv
            normal = read / math.sqrt(mean_square + config["rms_norm_eps"]) * w["norm.weight"]
            heads.append(normal * silu(z[h * dv : (h + 1) * dv]))
        out.append(w["out_proj.weight"] @ torch.cat(heads))
    return out


def unit(x: Tensor) -> Tensor:
    return x / math.sqrt(sum(float(v) ** 2 for v in x) + 1e-6)


def moe(config: Mapping[str, Any], w: Weights, x: Tensor) -> Tensor:
    scores = [float(s) for s in w["gate.weight"] @ x]
    top = max(scores)
    powers = [math.exp(s - top) for s in scores]
    chosen = sorted(range(len(powers)), key=lambda e: -powers[e])[: config["num_experts_per_tok"]]
    total = sum(powers[e] for e in chosen)
    f = config["moe_intermediate_size"]
    out = torch.zeros_like(x)
    for e in chosen:
        gate, up = w["experts.gate_up_proj"][e][:f], w["experts.gate_up_proj"][e][f:]
        out = out + powers[e] / total * (w["experts.down_proj"][e] @ (silu(gate @ x) * (up @ x)))
    inner = silu(w["shared_expert.gate_proj.weight"] @ x) * (w["shared_expert.up_proj.weight"] @ x)
    return out + sigmoid(w["shared_expert_gate.weight"] @ x) * (w["shared_expert.down_proj.weight"] @ inner)
