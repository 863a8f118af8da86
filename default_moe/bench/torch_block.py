"""transformers' Mixtral block with its grouped_mm experts, on the work that our layer is timed on."""

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np

from default_moe.bench.workload import LayerShape, Work
from default_moe.errors import ConfigError


def missing_packages(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]


def check_installed() -> None:
    """Raises ConfigError if a package is missing."""
    missing = missing_packages(("torch", "transformers"))
    if missing:
        raise ConfigError(f"--vs_torch needs {' and '.join(missing)}: pip install {' '.join(missing)}")


class Pending:
    """All that torch has been asked for, to be waited for by `jax.block_until_ready`."""

    def block_until_ready(self) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()


def candidates(shape: LayerShape, work: Work) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Forward, and forward and backward, of the block and of a dense SwiGLU network on torch."""
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, work.x.dtype.name)

    def tensor(array: Any) -> Any:
        return torch.tensor(np.asarray(array, np.float32)).to(device, dtype)

    config = MixtralConfig(
        hidden_size=shape.d_model,
        intermediate_size=shape.expert_dim,
        num_local_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
    )
    config._experts_implementation = "grouped_mm"
    block = MixtralSparseMoeBlock(config).to(device, dtype)
    experts = work.params["experts"]
    gate_up = np.concatenate([np.asarray(experts[name]).swapaxes(1, 2) for name in ("gate", "up")], axis=1)
    with torch.no_grad():
        block.gate.weight.copy_(tensor(np.asarray(work.params["router"]["kernel"]).T))
        block.experts.gate_up_proj.copy_(tensor(gate_up))
        block.experts.down_proj.copy_(tensor(np.asarray(experts["down"]).swapaxes(1, 2)))
    x, g = tensor(work.x).requires_grad_(), tensor(work.g)
    dense = [tensor(w).requires_grad_() for w in work.dense]

    def mixtral() -> Any:
        y = block(x)
        return y[0] if isinstance(y, tuple) else y

    def feed_forward() -> Any:
        gate, up, down = dense
        return (torch.nn.functional.silu(x @ gate) * (x @ up)) @ down

    def passes(forward: Callable[[], Any], parameters: list[Any]) -> tuple[Callable[[], Any], Callable[[], Any]]:
        def only_forward() -> Pending:
            with torch.no_grad():
                forward()
            return Pending()

        def both() -> Pending:
            torch.autograd.grad(forward(), parameters, g)
            return Pending()

        return only_forward, both

    return {
        "torch dense": passes(feed_forward, [x, *dense]),
        "torch mixtral": passes(mixtral, [x, *block.parameters()]),
    }
