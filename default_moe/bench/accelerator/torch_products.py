"""torch's grouped matrix product on the same work: SwiGLU experts over rows sorted by expert."""

import functools
from pathlib import Path

import numpy as np

from default_moe.bench.accelerator import results as results_file
from default_moe.bench.accelerator.ceilings import matmul_ceiling
from default_moe.bench.accelerator.results import Results
from default_moe.bench.accelerator.scale import scale
from default_moe.bench.report import Row
from default_moe.bench.timing import time_alternately
from default_moe.bench.torch_block import Pending, missing_packages
from default_moe.bench.workload import LayerShape


def measure(results: Results, folder: Path) -> None:
    missing = missing_packages(("torch",))
    if missing:
        results.add({"name": "torch", "error": f"{missing[0]} is not installed"})
        return
    s = scale()
    ceiling = matmul_ceiling(results_file.read(folder))
    for shape in dict.fromkeys((s.layers[0], s.layers[-1])):
        for backward in (False, True):
            name = f"{shape}, SwiGLU by torch's grouped product, " + ("forward+backward" if backward else "forward")
            results.guarded(name, functools.partial(_time, shape, s.dtype, backward, s.rounds, ceiling))


def _time(shape: LayerShape, dtype_name: str, backward: bool, rounds: int, ceiling: float | None) -> Row:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, dtype_name)
    slots, d_model, width = shape.tokens * shape.top_k, shape.d_model, shape.expert_dim
    sizes = np.bincount(np.random.default_rng(0).integers(shape.num_experts, size=slots), minlength=shape.num_experts)
    ends = torch.tensor(np.cumsum(sizes), dtype=torch.int32, device=device)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, device=device, dtype=dtype).requires_grad_(backward)

    x = normal(slots, d_model)
    gate, up = (normal(shape.num_experts, d_model, width) for _ in range(2))
    down = normal(shape.num_experts, width, d_model)
    g = torch.randn_like(x)

    def run() -> Pending:
        with torch.set_grad_enabled(backward):
            hidden = torch.nn.functional.silu(torch._grouped_mm(x, gate, offs=ends))
            y = torch._grouped_mm(hidden * torch._grouped_mm(x, up, offs=ends), down, offs=ends)
        if backward:
            torch.autograd.grad(y, (x, gate, up, down), g)
        return Pending()

    timing = time_alternately({"": run}, rounds)[""]
    flops = shape.active_flops() * (3 if backward else 1) / timing.seconds
    return {
        "ms": timing.seconds * 1e3,
        "TFLOP/s": flops / 1e12,
        "/ matrix product": flops / ceiling if ceiling else None,
    }
