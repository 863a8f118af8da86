"""How experts over several devices are computed: the choice between two forms, and what each moves.

  "gather"    Tokens are gathered over the expert axis, every device computes its own experts' part of their outputs,
              and the parts are summed and scattered. On any platform.
  "exchange"  Each choice of a token travels to the device that holds the expert, and its output back, by
              `jax.lax.ragged_all_to_all`, which XLA has for TPUs and GPUs.

`gather.py` and `exchange.py` compute them. Neither drops a token or gathers experts.
"""

import jax.numpy as jnp

from default_moe import sharding
from default_moe.config import MoEConfig
from default_moe.errors import choose
from default_moe.hardware import is_nvidia, platform


def resolve_expert_parallel(config: MoEConfig, num_tokens: int, d_model: int) -> str | None:
    """Return the form under the mesh in use, None if it does not split experts.

    "auto" takes on TPUs the one that moves less. On GPUs it gathers: Marin's authors found `ragged_all_to_all` three
    times slower there, and we have not measured it.

    num_tokens: T of a device.

    Raises ConfigError if "exchange" was asked for by name and cannot be.
    """
    num_devices = sharding.num_shards("expert")
    if num_devices == 1:
        return None
    gather, exchange = (f(config, num_tokens, d_model, num_devices) for f in (gather_bytes, exchange_bytes))
    options = [("gather", None), ("exchange", _why_no_exchange(config))]
    first_gather = gather <= exchange or is_nvidia()
    return choose("moe.expert_parallel", config.expert_parallel, options if first_gather else options[::-1])


def _why_no_exchange(config: MoEConfig) -> str | None:
    """Say what keeps "exchange" from being used under the mesh in use, None if nothing does."""
    if config.method.dense_gradient:
        return f"with moe.router={config.method.name!r} every expert needs every token"
    if not (platform() == "tpu" or is_nvidia()):
        return f"XLA has the collective that it needs only on TPUs and NVIDIA GPUs, and this is {platform()!r}"
    if not set(sharding.mesh_axes("expert")) <= set(sharding.mesh_axes("batch")):
        return "mesh.rules do not split the batch over the axis that experts are split over"
    return None


def gather_bytes(config: MoEConfig, num_tokens: int, d_model: int, num_devices: int) -> float:
    """Count what a device receives from the others along the expert axis, forward and backward.

    Of every token of the others, (G - 1) T: x and its gradient in the compute dtype, the float32 output and its
    gradient, the float32 probabilities and their gradient, and the int32 choices. Of every sample its place and its
    expert, int32.
    """
    a_token = 2 * d_model * (_itemsize(config) + 4) + 8 * config.num_experts + 4 * config.most_experts_per_token
    samples = 8 * config.method.samples_per_token(config)
    return (num_devices - 1) * num_tokens * (a_token + samples)


def exchange_bytes(config: MoEConfig, num_tokens: int, d_model: int, num_devices: int) -> float:
    """Count what a device receives from the others along the expert axis, forward and backward, on average.

    With balanced routing its experts run T K choices, and so do its tokens, of which (G - 1) / G come from, or go to,
    other devices: rows and their outputs' gradients arrive for its experts, outputs and the rows' gradients for its
    tokens, all in the compute dtype. The same share of the float32 default vectors and of their sums, [N, D] each. And
    the int32 sizes of N groups from G - 1 devices. Samples, and their sizes, travel forward only.
    """
    samples = config.method.samples_per_token(config)
    rows = (4 * config.experts_per_token + 2 * samples) * num_tokens * d_model * _itemsize(config)
    vectors = 2 * config.num_experts * d_model * 4 if config.default_vectors else 0
    sizes = 4 * config.num_experts * (2 if samples else 1)
    return (num_devices - 1) * ((rows + vectors) / num_devices + sizes)


def _itemsize(config: MoEConfig) -> int:
    return jnp.dtype(config.dtype or "float32").itemsize
