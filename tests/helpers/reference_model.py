"""The whole language model as naive float64 loops over sequences, heads and positions, with top-k experts.

Written from the formulas of the papers, sharing nothing with the package: see `reference.py`.
"""

from typing import Any

import numpy as np
from helpers.reference import Params, Settings, assert_no_near_ties, forward, sigmoid
from helpers.reference_routing import softmax


def logits(params: Any, tokens: np.ndarray, s: Any, top_k: int, segments: np.ndarray | None = None) -> np.ndarray:
    """[B, L, V] of tokens [B, L], in evaluation. s: the settings of the model, as in `ModelConfig`."""
    embed = params["embed"]
    x = np.array([[embed[t] for t in sequence] for sequence in tokens])
    done = {"dense_layers": 0, "moe_layers": 0}
    for number in range(s.num_layers):
        dense = number < s.num_dense_layers or (number + 1) % s.moe_every or str(number) in (s.dense_layers or "")
        kind = "dense_layers" if dense else "moe_layers"
        x = block(x, layer_of(params[kind], done[kind]), s, top_k, segments)
        done[kind] += 1
    head = embed.T if s.tie_embeddings else params["head"]
    return norm(x, params["final_norm"], s) @ head


def layer_of(tree: Any, index: int) -> Any:
    return {name: layer_of(a, index) if isinstance(a, dict) else a[index] for name, a in tree.items()}


def block(x: np.ndarray, layer: Any, s: Any, top_k: int, segments: np.ndarray | None) -> np.ndarray:
    normed = norm(x, layer["attention_norm"], s)
    ids = np.zeros(x.shape[:2], int) if segments is None else segments
    x = x + np.array([attention(normed[b], layer["attention"], s, ids[b]) for b in range(len(x))])
    normed = norm(x, layer["ffn_norm"], s).reshape(-1, x.shape[-1])
    if "ffn" in layer:
        gate, up, down = (layer["ffn"][name]["kernel"] for name in ("gate", "up", "down"))
        a = normed @ gate
        y = (a * sigmoid(a) * (normed @ up)) @ down
    else:
        experts = (layer["moe"]["experts"][name] for name in ("gate", "up", "down"))
        moe = Params(layer["moe"]["router"]["kernel"], *experts)
        result = forward(normed, moe, None, Settings(top_k, "topk"), update=False)
        if top_k < moe.kernel.shape[1]:
            assert_no_near_ties(result.routes)
        y = result.y
    return x + y.reshape(x.shape)


def norm(x: np.ndarray, p: Any, s: Any) -> np.ndarray:
    if s.norm == "rms":
        return rms_norm(x, p["scale"], s)
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + s.norm_epsilon) * p["scale"] + p["bias"]


def rms_norm(x: np.ndarray, scale: np.ndarray, s: Any) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + s.norm_epsilon) * scale


def attention(x: np.ndarray, p: Any, s: Any, segment: np.ndarray) -> np.ndarray:
    """Of one sequence [L, D]: head h uses the keys and values of number h // (heads / kv heads)."""
    length = len(x)
    q, k, v = (np.einsum("ld,dhe->lhe", x, p[name]["kernel"]) for name in ("query", "key", "value"))
    if s.qk_norm == "head":
        q, k = rms_norm(q, p["query_norm"]["scale"], s), rms_norm(k, p["key_norm"]["scale"], s)
    elif s.qk_norm == "full":
        q, k = (
            rms_norm(a.reshape(length, -1), p[name]["scale"], s).reshape(a.shape)
            for a, name in ((q, "query_norm"), (k, "key_norm"))
        )
    y = np.zeros_like(x)
    for h in range(q.shape[1]):
        shared = h // (q.shape[1] // k.shape[1])
        scores = rotated(q[:, h], s.rope_theta) @ rotated(k[:, shared], s.rope_theta).T / q.shape[2] ** 0.5
        for i in range(length):
            first = 0 if s.attention_window is None else max(0, i + 1 - s.attention_window)
            seen = [j for j in range(first, i + 1) if segment[j] == segment[i]]
            y[i] += softmax(scores[i, seen]) @ v[seen, shared] @ p["out"]["kernel"][h]
    return y


def rotated(a: np.ndarray, theta: float) -> np.ndarray:
    """[L, E], of which entries e and e + E/2 are a complex number, turned by position * theta^(-2e/E)."""
    half = a.shape[1] // 2
    angles = np.outer(np.arange(len(a)), theta ** (-np.arange(half) / half))
    turned = (a[:, :half] + 1j * a[:, half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=1)
