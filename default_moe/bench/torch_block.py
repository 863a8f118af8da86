"""torch on the work that our layer is timed on: transformers' Mixtral block, and torch's grouped matrix product."""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from default_moe.bench.workload import LayerShape, Work
from default_moe.errors import ConfigError

Passes = tuple[Callable[[], Any], Callable[[], Any]]  # forward, and forward and backward


def check_installed(*names: str) -> None:
    """Raises ConfigError if a package is missing."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"--vs_torch needs {' and '.join(missing)}: pip install {' '.join(missing)}")


class Pending:
    """All that torch has been asked for, to be waited for by `jax.block_until_ready`."""

    def block_until_ready(self) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()


def candidates(shape: LayerShape, work: Work) -> dict[str, Passes]:
    """Return the passes of the block and of a dense SwiGLU network on torch."""
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    device, dtype = _device(), getattr(torch, work.x.dtype.name)

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
    gate, up, down = (tensor(w).requires_grad_() for w in work.dense)

    def mixtral() -> Any:
        y = block(x)
        return y[0] if isinstance(y, tuple) else y

    def feed_forward() -> Any:
        return (torch.nn.functional.silu(x @ gate) * (x @ up)) @ down

    return {
        "torch dense": _passes(feed_forward, [x, gate, up, down], g),
        "torch mixtral": _passes(mixtral, [x, *block.parameters()], g),
    }


def grouped_swiglu(shape: LayerShape, dtype: str) -> Passes:
    """Return the passes of SwiGLU experts by torch's grouped product, on rows sorted by uniformly drawn experts."""
    import torch

    device, options = _device(), {"device": _device(), "dtype": getattr(torch, dtype)}
    tokens, d_model, num_experts, top_k, width = shape
    chosen = np.random.default_rng(0).integers(num_experts, size=tokens * top_k)
    ends = np.cumsum(np.bincount(chosen, minlength=num_experts))
    offs = torch.tensor(ends, dtype=torch.int32, device=device)
    x = torch.randn(len(chosen), d_model, **options).requires_grad_()
    gate, up = (torch.randn(num_experts, d_model, width, **options).requires_grad_() for _ in range(2))
    down = torch.randn(num_experts, width, d_model, **options).requires_grad_()

    def swiglu() -> Any:
        hidden = torch.nn.functional.silu(torch._grouped_mm(x, gate, offs=offs))
        return torch._grouped_mm(hidden * torch._grouped_mm(x, up, offs=offs), down, offs=offs)

    return _passes(swiglu, [x, gate, up, down], torch.randn_like(x))


def on_random_tensors(function: Callable, shapes: Sequence[tuple[int, ...]], dtype: str) -> Callable[[], Pending]:
    """Return `function` bound to random tensors of these shapes."""
    import torch

    tensors = [torch.randn(shape, device=_device(), dtype=getattr(torch, dtype)) for shape in shapes]

    def run() -> Pending:
        with torch.no_grad():
            function(*tensors)
        return Pending()

    return run


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _passes(forward: Callable[[], Any], parameters: list[Any], g: Any) -> Passes:
    """Return the forward pass without, and with, the gradients of <g, forward()>."""
    import torch

    def only_forward() -> Pending:
        with torch.no_grad():
            forward()
        return Pending()

    def both() -> Pending:
        torch.autograd.grad(forward(), parameters, g)
        return Pending()

    return only_forward, both
