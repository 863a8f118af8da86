"""The whole training step of a config: its parts, its memory, and methods against plain top-k in one run."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from default_moe.bench import report
from default_moe.bench.candidate import StepCandidate, random_batch
from default_moe.bench.kernels import COLUMNS, kernel_times
from default_moe.bench.report import Row
from default_moe.bench.timing import time_alternately
from default_moe.config import Config
from default_moe.hardware import heading, peak_flops
from default_moe.model.size import train_flops_per_token


def run(
    config: Config,
    methods: list[str],
    rounds: int,
    random_tokens: bool = False,
    profile: str | None = None,
    optimizers: list[str] | None = None,
    save: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Time the step with "topk" and each value of moe.router given, print tables, and return their rows.

    All train the same parameters in turn, and are compared with "topk".

    random_tokens: read no data.  profile: folder for a trace of a step of each.  optimizers: values of optim.name, of
    which each method is timed with each, and "topk" with the first is what is compared with; the config's if None.
    save: takes the rows before anything is traced.
    Raises ConfigError.
    """
    train = config.train
    vocab_size = config.model.vocab_size or 257
    data_ms = None
    if random_tokens:
        batch = random_batch(config, vocab_size)
    else:
        from default_moe.data import open_data  # TFDS and its kin, which the other suites do without

        data = open_data(config.data, print)
        vocab_size = data.tokenizer.vocab_size
        rows_of_data = data.train_rows(train.sequence_length, train.seed)
        batch = jax.tree.map(np.asarray, rows_of_data.batch(0, train.batch_size))
        position = itertools.count(step=train.batch_size)
        read = time_alternately({"data": lambda: rows_of_data.batch(next(position), train.batch_size)}, rounds)
        data_ms = read["data"].seconds * 1e3
    names = list(itertools.product(dict.fromkeys(["topk", *methods]), optimizers or [config.optim.name]))
    topk = StepCandidate(_with(config, *names[0]), batch, vocab_size)
    candidates = {names[0]: topk}
    for name in names[1:]:
        candidates[name] = StepCandidate(_with(config, *name), batch, vocab_size, other=topk)
    steps = time_alternately({name: c.step for name, c in candidates.items()}, rounds)
    gradients = time_alternately({name: c.gradient for name, c in candidates.items()}, rounds)
    updates = time_alternately({name: c.optimizer for name, c in candidates.items()}, rounds)
    times: list[Row] = []
    memories: list[Row] = []
    for name, candidate in candidates.items():
        program, memory = candidate.program, candidate.memory
        tokens_per_second = train.batch_size * train.sequence_length / steps[name].seconds
        peak = peak_flops(jax.devices()[0])
        model_flops = tokens_per_second * train_flops_per_token(program.config, vocab_size)
        times.append(
            {
                "router": name[0],
                "optimizer": name[1],
                "step ms": steps[name].seconds * 1e3,
                **steps[name].versus(steps[names[0]], "/ top-k"),
                "tokens/s": tokens_per_second,
                "MFU": peak and model_flops / (peak * program.mesh.size),
                "forward+backward ms": gradients[name].seconds * 1e3,
                "optimizer ms": updates[name].seconds * 1e3,
                "data ms": data_ms,
                "compile s": candidate.compile_seconds,
            }
        )
        memories.append(
            {
                "router": name[0],
                "optimizer": name[1],
                "experts by": program.matmul,
                "attention by": program.attention,
                "state MB": memory.state / 1e6,
                "temporaries MB": memory.temporaries / 1e6,
                "top-k + bytes": memory.total - topk.memory.total,
                "allowed bytes": _allowed_memory(config, program.num_batch_shards) if name[0] == "default" else None,
            }
        )
    print(f"{heading()}\n{report.table(times, tuple(times[0]))}\n\n{report.table(memories, tuple(memories[0]))}")
    print("(allowed Default MoE: the default vectors, and one [T, N] array of float32 for each MoE layer; per device)")
    rows = [time | memory for time, memory in zip(times, memories, strict=True)]
    save(rows)
    if profile:
        for name, candidate in candidates.items():
            folder = Path(profile) / "_".join(name)
            with jax.profiler.trace(folder):
                jax.block_until_ready(candidate.step())
            found = kernel_times(folder)
            table = report.table(found, COLUMNS) if found else "no kernel was seen"
            print(f"\n{' '.join(name)}, a step ({folder})\n{table}", flush=True)
    return rows


def _with(config: Config, router: str, optimizer: str) -> Config:
    """Return `config` with that optimizer, and another method at its defaults unless it is the config's own."""
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, name=optimizer))
    if config.moe.method.name == router:
        return config
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, router=router))


def _allowed_memory(config: Config, num_batch_shards: int) -> int:
    """Return the bytes per device by which a step of Default MoE may exceed one of top-k."""
    layers, experts = config.model.num_moe_layers, config.moe.num_experts
    tokens = config.train.batch_size * config.train.sequence_length // config.train.grad_accum_steps
    return 4 * layers * experts * (config.model.d_model + tokens // num_batch_shards)
