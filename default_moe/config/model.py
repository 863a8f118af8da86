"""The settings of the model around the MoE layers."""

import re
from dataclasses import dataclass

from default_moe.config.mappings import MAY_CHANGE, dtype_name
from default_moe.errors import check, quoted
from default_moe.methods.settings import at_least, between, check_settings, one_of, positive, setting

REMATS = ("none", "dots", "full")  # from the most memory to the most recomputation


@dataclass(frozen=True)
class ModelConfig:
    """The decoder-only language model around the MoE layers."""

    vocab_size: int | None = setting(
        None, "Tokens that the embeddings know; None takes the tokenizer's.", at_least(1, 2**24)
    )
    d_model: int = setting(128, "D, the width of the residual stream.", at_least(1, 2**20))
    num_layers: int = setting(4, "Layers, each of attention and a feed-forward network.", at_least(1, 2**12))
    num_heads: int = setting(4, "Heads of attention; they divide d_model unless head_dim is set.", at_least(1, 2**10))
    num_kv_heads: int | None = setting(
        None,
        "Heads of keys and values, which divide num_heads (grouped-query attention; 1: multi-query); None: num_heads.",
        at_least(1, 2**10),
    )
    head_dim: int | None = setting(
        None, "E, the width of a head, an even number; None: d_model / num_heads.", at_least(2, 2**16)
    )
    attention_window: int | None = setting(
        None,
        "Tokens that a token sees, itself and the latest before it (sliding window); None: all before it.",
        at_least(1, 2**20),
    )
    num_dense_layers: int = setting(
        1, "How many of the layers, the first ones, have a dense network in place of experts."
    )
    moe_every: int = setting(
        1,
        "Which of the other layers have experts: every how-many-th layer of the model, with 2 the second, fourth, ...; "
        "the rest is dense.",
        at_least(1, 2**12),
    )
    dense_layers: str | None = setting(None, "Further dense layers, by number from 0, as in '3,7'; None: no others.")
    dense_dim: int | None = setting(
        None, "Hidden width of the dense networks; None: as wide as one expert.", at_least(1, 2**24)
    )
    tie_embeddings: bool = setting(False, "Use the embeddings as the output's weights too.")
    output_z_weight: float = setting(
        0.0,
        "Factor in the loss of the output's z-loss, the mean over tokens of log(sum(exp(logits)))^2.",
        at_least(0),
        MAY_CHANGE,
    )
    rope_theta: float = setting(10_000.0, "Base of the rotary embeddings' wavelengths.", positive())
    norm: str = setting(
        "layer", "LayerNorm, or RMSNorm without bias, before each part and the output.", one_of("layer", "rms")
    )
    norm_epsilon: float = setting(1e-5, "What norms add to the variance.", between(0, 1))
    qk_norm: str = setting(
        "none",
        "RMSNorm of queries and keys before the rotary embedding: of each 'head' with one scale for all (Qwen3), or of "
        "the 'full' projection (OLMoE).",
        one_of("none", "head", "full"),
    )
    dtype: str = setting("float32", "What is computed in; parameters are float32.", one_of("float32", "bfloat16"))
    attention: str = setting(
        "auto",
        "How attention is computed: 'cudnn' needs an NVIDIA GPU and bfloat16, 'splash' a TPU; 'auto' takes a kernel "
        "where it runs.",
        one_of("auto", "xla", "cudnn", "splash"),
        MAY_CHANGE,
    )
    remat: str = setting(
        "none",
        "What the backward pass recomputes to save memory: nothing, all but products with weights and kernels, or all.",
        one_of(*REMATS),
        MAY_CHANGE,
    )
    scan_unroll: int = setting(1, "Layers unrolled per step of the scan over layers.", at_least(1, 2**12), MAY_CHANGE)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        check_settings(self, "model")
        check(
            self.head_dim is not None or self.d_model % self.num_heads == 0,
            f"model.num_heads is {self.num_heads}, but must divide model.d_model = {self.d_model}, or model.head_dim "
            "must be set",
        )
        check(
            self.head_size % 2 == 0,
            f"{'model.head_dim' if self.head_dim else 'model.d_model / model.num_heads'} is {self.head_size}, but "
            "rotary embeddings need it even",
        )
        check(
            self.num_heads % self.kv_heads == 0,
            f"model.num_kv_heads is {self.kv_heads}, but must divide model.num_heads = {self.num_heads}",
        )
        check(
            0 <= self.num_dense_layers <= self.num_layers,
            f"model.num_dense_layers is {self.num_dense_layers}, but must lie between 0 and model.num_layers = "
            f"{self.num_layers}",
        )
        check(
            self.dense_layers is None
            or (
                re.fullmatch("[0-9]{1,4}(,[0-9]{1,4})*", self.dense_layers) is not None
                and max(self._listed_dense_layers) < self.num_layers
            ),
            f"model.dense_layers is {quoted(self.dense_layers)}, but must be numbers of layers from 0 to "
            f"{self.num_layers - 1}, as in '3,7'",
        )
        check(
            self.num_dense_layers == self.num_layers or self.num_moe_layers > 0,
            f"model.moe_every={self.moe_every} and model.dense_layers={self.dense_layers!r} leave none of "
            f"{self.num_layers} layers with experts: model.num_dense_layers={self.num_layers} says so",
        )

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        """E, the width of a head."""
        return self.head_dim or self.d_model // self.num_heads

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Numbers of the layers that have experts. The others are dense."""
        others = range(self.num_dense_layers, self.num_layers)
        dense = self._listed_dense_layers
        return tuple(layer for layer in others if (layer + 1) % self.moe_every == 0 and layer not in dense)

    @property
    def num_moe_layers(self) -> int:
        return len(self.moe_layers)

    @property
    def _listed_dense_layers(self) -> set[int]:
        return set(map(int, self.dense_layers.split(","))) if self.dense_layers else set()
