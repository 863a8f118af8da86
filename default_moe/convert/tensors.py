"""Which tensor of a Hugging Face model is which part of our parameters, and how it is turned.

torch's matrices are [out, in], ours [in, out]; there each layer and each expert has tensors of its own, here they are
stacked: layers along the first axis, experts along the next.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from default_moe.config import Config
from default_moe.convert.families import Family, adds_vectors
from default_moe.moe.layer import DEFAULT_VECTORS, ROUTER_STATE

Turn = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Part:
    """One of their tensors, and where it belongs.

    name, shape: theirs.  path: of the parameter here, or of an array in a collection.  index: of it within that.
    to_ours, to_theirs: how it is turned.
    """

    name: str
    shape: tuple[int, ...]
    path: tuple[str, ...]
    index: tuple[int, ...]
    to_ours: Turn
    to_theirs: Turn


def parts(config: Config, family: Family, vocab_size: int) -> Iterator[Part]:
    """All tensors of a model, layer by layer."""
    model, moe = config.model, config.moe
    width, heads, size = model.d_model, model.num_heads, model.head_size

    def as_is(name: str, shape: tuple[int, ...], path: str, index: tuple[int, ...] = ()) -> Part:
        return Part(name, shape, tuple(path.split("/")), index, lambda a: a, lambda a: a)

    def matrix(name: str, out: int, into: int, path: str, index: tuple[int, ...] = ()) -> Part:
        return Part(name, (out, into), tuple(path.split("/")), index, lambda a: a.T, lambda a: a.T)

    def split_heads(name: str, count: int, path: str, index: tuple[int, ...]) -> Part:
        ours, theirs = (width, count, size), (width, count * size)
        return Part(
            name,
            theirs[::-1],
            tuple(path.split("/")),
            index,
            lambda a: a.T.reshape(ours),
            lambda a: a.reshape(theirs).T,
        )

    def norm(name: str, path: str, index: tuple[int, ...]) -> Iterator[Part]:
        yield as_is(f"{name}.weight", (width,), f"{path}/scale", index)
        if model.norm == "layer":
            yield as_is(f"{name}.bias", (width,), f"{path}/bias", index)

    def feed_forward(name: str, hidden: int, path: str, index: tuple[int, ...]) -> Iterator[Part]:
        for short, out, into in (("gate", hidden, width), ("up", hidden, width), ("down", width, hidden)):
            yield matrix(f"{name}.{short}_proj.weight", out, into, f"{path}/{short}/kernel", index)

    yield as_is("model.embed_tokens.weight", (vocab_size, width), "embed")
    for layer in range(model.num_layers):
        is_dense = layer not in model.moe_layers
        ours = "dense_layers" if is_dense else "moe_layers"
        before = sum(other < layer for other in model.moe_layers)  # with experts
        index = (layer - before if is_dense else before,)
        theirs = f"model.layers.{layer}"
        yield from norm(f"{theirs}.input_layernorm", f"{ours}/attention_norm", index)
        yield from norm(f"{theirs}.post_attention_layernorm", f"{ours}/ffn_norm", index)
        for name, short, count in (("query", "q", heads), ("key", "k", model.kv_heads), ("value", "v", model.kv_heads)):
            yield split_heads(
                f"{theirs}.self_attn.{short}_proj.weight", count, f"{ours}/attention/{name}/kernel", index
            )
            if model.qk_norm != "none" and short != "v":
                length = size if model.qk_norm == "head" else count * size
                path = f"{ours}/attention/{name}_norm/scale"
                yield as_is(f"{theirs}.self_attn.{short}_norm.weight", (length,), path, index)
        yield Part(
            f"{theirs}.self_attn.o_proj.weight",
            (width, heads * size),
            (ours, "attention", "out", "kernel"),
            index,
            lambda a: a.T.reshape(heads, size, width),
            lambda a: a.reshape(heads * size, width).T,
        )
        if is_dense:
            hidden = model.dense_dim or moe.expert_dim
            yield from feed_forward(f"{theirs}.mlp", hidden, f"{ours}/ffn", index)
            continue
        yield matrix(f"{theirs}.{family.moe}.gate.weight", moe.num_experts, width, f"{ours}/moe/router/kernel", index)
        for expert in range(moe.num_experts):
            for name, short in zip(("gate", "up", "down"), family.parts, strict=True):
                out, into = (width, moe.expert_dim) if name == "down" else (moe.expert_dim, width)
                their_name = f"{theirs}.{family.moe}.experts.{expert}.{short}.weight"
                yield matrix(their_name, out, into, f"{ours}/moe/experts/{name}", (*index, expert))
        if moe.num_shared_experts:
            hidden = moe.num_shared_experts * moe.expert_dim
            yield from feed_forward(f"{theirs}.mlp.shared_experts", hidden, f"{ours}/moe/shared_experts", index)
        if moe.load_balancer.biased:
            name = f"{theirs}.mlp.gate.e_score_correction_bias"
            yield as_is(name, (moe.num_experts,), f"{ROUTER_STATE}/{ours}/moe/bias", index)
        if adds_vectors(config):
            name = f"{theirs}.mlp.default_vectors"
            yield as_is(name, (moe.num_experts, width), f"{DEFAULT_VECTORS}/{ours}/moe/ema", index)
    yield from norm("model.norm", "final_norm", ())
    if not model.tie_embeddings:
        yield matrix("lm_head.weight", vocab_size, width, "head")
