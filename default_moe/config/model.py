"""The settings of the model around the MoE layers."""

from dataclasses import dataclass, field

from default_moe.config.mappings import MAY_CHANGE, dtype_name
from default_moe.errors import check
from default_moe.methods.settings import at_least, check_settings, one_of, positive

REMATS = ("none", "dots", "full")  # from the most memory to the most recomputation


@dataclass(frozen=True)
class ModelConfig:
    """The decoder-only language model around the MoE layers.

    vocab_size: None takes the tokenizer's.  num_dense_layers: leading layers with a dense feed-forward network of
    width dense_dim (None: as wide as one expert).  attention: "xla", "cudnn" (an NVIDIA GPU and bfloat16), "splash"
    (a TPU), or "auto", which takes a kernel where it runs.  remat: what the backward pass recomputes, "none", "full" or
    "dots" (all but products with weights and kernels).  scan_unroll: layers unrolled per step of the scan over layers.
    """

    vocab_size: int | None = field(default=None, metadata=at_least(1, 2**24))
    d_model: int = field(default=128, metadata=at_least(1, 2**20))
    num_layers: int = field(default=4, metadata=at_least(1, 2**12))
    num_heads: int = field(default=4, metadata=at_least(1, 2**10))
    num_dense_layers: int = 1
    dense_dim: int | None = field(default=None, metadata=at_least(1, 2**24))
    tie_embeddings: bool = False
    rope_theta: float = field(default=10_000.0, metadata=positive())
    norm_epsilon: float = field(default=1e-5, metadata=at_least(0))
    dtype: str = field(default="float32", metadata=one_of("float32", "bfloat16"))
    attention: str = field(default="auto", metadata=one_of("auto", "xla", "cudnn", "splash") | MAY_CHANGE)
    remat: str = field(default="none", metadata=one_of(*REMATS) | MAY_CHANGE)
    scan_unroll: int = field(default=1, metadata=at_least(1, 2**12) | MAY_CHANGE)

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        check_settings(self, "model")
        check(
            self.d_model % self.num_heads == 0,
            f"model.num_heads is {self.num_heads}, but must divide model.d_model = {self.d_model}",
        )
        check(
            (self.d_model // self.num_heads) % 2 == 0,
            f"model.d_model / model.num_heads is {self.d_model // self.num_heads}, but rotary embeddings need it even",
        )
        check(
            0 <= self.num_dense_layers <= self.num_layers,
            f"model.num_dense_layers is {self.num_dense_layers}, but must lie between 0 and model.num_layers = "
            f"{self.num_layers}",
        )

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers
