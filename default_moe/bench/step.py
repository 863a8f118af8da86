"""The whole training step of a config: its parts, its memory, and methods against plain top-k in one run."""

import dataclasses
import itertools

import jax
import numpy as np

from default_moe.bench import report
from default_moe.bench.candidate import StepCandidate
from default_moe.bench.report import Row
from default_moe.bench.timing import time_alternately
from default_moe.config import Config
from default_moe.hardware import heading, peak_flops
from default_moe.model.size import train_flops_per_token

_COLUMNS = (
    "router",
    "step ms",
    "/ top-k",
    "quartiles",
    "tokens/s",
    "MFU",
    "forward+backward ms",
    "optimizer ms",
    "data ms",
    "compile s",
)
_MEMORY = ("router", "state MB", "temporaries MB", "top-k + bytes", "allowed bytes")


def run(config: Config, methods: list[str], rounds: int) -> list[Row]:
    """Time the step with "topk" and each value of moe.router given, and print tables. Raises ConfigError."""
    from default_moe.data import open_data  # TFDS and its kin, which the other suites do without

    configs = {name: with_router(config, name) for name in dict.fromkeys(["topk", *methods])}
    train = config.train
    data = open_data(config.data, print)
    rows_of_data = data.train_rows(train.sequence_length, train.seed)
    batch = jax.tree.map(np.asarray, rows_of_data.batch(0, train.batch_size))
    vocab_size = data.tokenizer.vocab_size
    candidates = {name: StepCandidate(one, batch, vocab_size) for name, one in configs.items()}
    position = itertools.count(step=train.batch_size)
    read = time_alternately({"data": lambda: rows_of_data.batch(next(position), train.batch_size)}, rounds)["data"]
    steps = time_alternately({name: c.step for name, c in candidates.items()}, rounds)
    gradients = time_alternately({name: c.gradient for name, c in candidates.items()}, rounds)
    optimizers = time_alternately({name: c.optimizer for name, c in candidates.items()}, rounds)
    tokens = train.batch_size * train.sequence_length
    rows: list[Row] = []
    for name, candidate in candidates.items():
        middle, low, high = steps[name].ratio_to(steps["topk"])
        rows.append(
            {
                "router": name,
                "step ms": steps[name].seconds * 1e3,
                "/ top-k": middle,
                "quartiles": f"{low:.3f}-{high:.3f}",
                "tokens/s": tokens / steps[name].seconds,
                "MFU": model_flops_utilization(
                    configs[name], vocab_size, tokens / steps[name].seconds, candidate.program.mesh.size
                ),
                "forward+backward ms": gradients[name].seconds * 1e3,
                "optimizer ms": optimizers[name].seconds * 1e3,
                "data ms": read.seconds * 1e3,
                "compile s": candidate.compile_seconds,
                "state MB": candidate.memory.state / 1e6,
                "temporaries MB": candidate.memory.temporaries / 1e6,
                "top-k + bytes": candidate.memory.total - candidates["topk"].memory.total,
                "allowed bytes": allowed_memory(config, candidate.program.num_batch_shards)
                if name == "default"
                else None,
            }
        )
    print(f"{heading()}\n{report.table(rows, _COLUMNS)}\n\n{report.table(rows, _MEMORY)}")
    print("(allowed Default MoE: the default vectors, and one [T, N] array of float32 for each MoE layer; per device)")
    return rows


def with_router(config: Config, router: str) -> Config:
    """`config` with another method, at its defaults, unless it is the config's own."""
    if config.moe.method.name == router:
        return config
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, router=router))


def model_flops_utilization(
    config: Config, vocab_size: int, tokens_per_second: float, num_devices: int
) -> float | None:
    """Share of the peak of as many devices that the model's own operations take; None where the peak is unknown."""
    peak = peak_flops(jax.devices()[0])
    return peak and tokens_per_second * train_flops_per_token(config, vocab_size) / (peak * num_devices)


def allowed_memory(config: Config, num_batch_shards: int) -> int:
    """Bytes per device by which a step of Default MoE may exceed one of top-k."""
    layers, experts = config.model.num_moe_layers, config.moe.num_experts
    tokens = config.train.batch_size * config.train.sequence_length // config.train.grad_accum_steps
    return 4 * layers * experts * (config.model.d_model + tokens // num_batch_shards)
