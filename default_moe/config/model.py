"""The settings of the model around the MoE layers."""

from dataclasses import dataclass, field

from default_moe.config.mappings import MAY_CHANGE, dtype_name
from default_moe.errors import check, check_at_least, check_choice

REMATS = ("none", "dots", "full")  # from the most memory to the most recomputation


@dataclass(frozen=True)
class ModelConfig:
    """The decoder-only language model around the MoE layers.

    vocab_size: None takes the tokenizer's.  num_dense_layers: leading layers with a dense feed-forward network of
    width dense_dim (None: as wide as one expert).  attention: "xla", "cudnn" (an NVIDIA GPU and bfloat16), "splash"
    (a TPU), or "auto", which takes a kernel where it runs.  remat: what the backward pass recomputes, "none", "full" or
    "dots" (all but products with weights and kernels).  scan_unroll: layers unrolled per step of the scan over layers.
    """

    vocab_size: int | None = None
    d_model: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_dense_layers: int = 1
    dense_dim: int | None = None
    tie_embeddings: bool = False
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-5
    dtype: str = "float32"
    attention: str = field(default="auto", metadata=MAY_CHANGE)
    remat: str = field(default="none", metadata=MAY_CHANGE)
    scan_unroll: int = field(default=1, metadata=MAY_CHANGE)

    def __post_init__(self) -> None:
        for name in ("d_model", "num_layers", "num_heads", "scan_unroll"):
            check_at_least(f"model.{name}", getattr(self, name), 1)
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
        for name in ("vocab_size", "dense_dim"):
            if getattr(self, name) is not None:
                check_at_least(f"model.{name}", getattr(self, name), 1)
        check(self.rope_theta > 0, f"model.rope_theta is {self.rope_theta}, but must be positive")
        check_choice("model.attention", self.attention, ("auto", "xla", "cudnn", "splash"))
        check_choice("model.remat", self.remat, REMATS)
        object.__setattr__(self, "dtype", dtype_name("model.dtype", self.dtype))

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers
