"""The whole training step of a config: its parts, its memory, and Default MoE against plain top-k in one run."""

import dataclasses
import itertools
import time
from typing import Any

import jax
import numpy as np
import optax

from default_moe.bench import report
from default_moe.bench.report import Row
from default_moe.bench.timing import time_alternately
from default_moe.config import Config
from default_moe.data import open_data
from default_moe.hardware import peak_flops
from default_moe.model_size import train_flops_per_token
from default_moe.program import Program

_COLUMNS = ("router", "step ms", "/ top-k", "quartiles", "tokens/s", "MFU", "optimizer ms", "data ms", "compile s")
_MEMORY = ("router", "state MB", "temporaries MB", "top-k + bytes", "allowed bytes")


class _Candidate:
    """A router's compiled step with its state, which each call replaces."""

    def __init__(self, config: Config, batch: Any, vocab_size: int):
        self.program = program = Program(config, vocab_size)
        self.state = program.new_state()
        self.batch = program.put_batch(
            lambda first, count: jax.tree.map(lambda a: a[first : first + count], batch), config.train.batch_size
        )
        began = time.perf_counter()
        self.compiled = program.train_step.compile(self.state, self.batch)
        self.compile_seconds = time.perf_counter() - began

        def optimize(params: Any, opt_state: Any) -> Any:
            updates, opt_state = program.optimizer.update(params, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        self._optimize = program.jit(optimize)

    def step(self) -> Any:
        self.state, metrics = self.compiled(self.state, self.batch)
        return metrics

    def optimizer(self) -> Any:
        return self._optimize(self.state.params, self.state.opt_state)


def run(config: Config, rounds: int) -> list[Row]:
    """Time the step with moe.router "topk" and "default", print tables, and return the rows. Raises ConfigError."""
    train = config.train
    data = open_data(config.data, print)
    rows_of_data = data.train_rows(train.sequence_length, train.seed)
    batch = jax.tree.map(np.asarray, rows_of_data.batch(0, train.batch_size))
    candidates = {
        router: _Candidate(
            dataclasses.replace(config, moe=dataclasses.replace(config.moe, router=router)),
            batch,
            data.tokenizer.vocab_size,
        )
        for router in ("topk", "default")
    }
    position = itertools.count(step=train.batch_size)
    read = time_alternately({"data": lambda: rows_of_data.batch(next(position), train.batch_size)}, rounds)["data"]
    steps = time_alternately({name: c.step for name, c in candidates.items()}, rounds)
    optimizers = time_alternately({name: c.optimizer for name, c in candidates.items()}, rounds)
    tokens = train.batch_size * train.sequence_length
    flops = train_flops_per_token(config, data.tokenizer.vocab_size) * tokens
    peak = peak_flops(jax.devices()[0])
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
                "MFU": flops / steps[name].seconds / (peak * jax.device_count()) if peak else None,
                "optimizer ms": optimizers[name].seconds * 1e3,
                "data ms": read.seconds * 1e3,
                "compile s": candidate.compile_seconds,
                **_memory(candidate, candidates["topk"], config),
            }
        )
    print(f"{report.heading()}\n{report.table(rows, _COLUMNS)}\n\n{report.table(rows, _MEMORY)}")
    print("(allowed: the default vectors, and one [T, N] array of float32 for each MoE layer; per device)")
    return rows


def _memory(candidate: _Candidate, topk: _Candidate, config: Config) -> Row:
    """Per device, as the compiler assigned it."""
    mine, other = candidate.compiled.memory_analysis(), topk.compiled.memory_analysis()
    layers, experts = config.model.num_moe_layers, config.moe.num_experts
    tokens = config.train.batch_size * config.train.sequence_length // config.train.grad_accum_steps
    local_tokens = tokens // candidate.program.num_batch_shards

    def total(memory: Any) -> int:
        return memory.argument_size_in_bytes + memory.temp_size_in_bytes

    return {
        "state MB": mine.argument_size_in_bytes / 1e6,
        "temporaries MB": mine.temp_size_in_bytes / 1e6,
        "top-k + bytes": total(mine) - total(other),
        "allowed bytes": 4 * layers * experts * (config.model.d_model + local_tokens),
    }
