"""The training step of the paper's 8c1 model on one device: batches, Default MoE against top-k, and a profile."""

import collections
import dataclasses
import functools
import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import jax

from default_moe.bench.accelerator.results import Results
from default_moe.bench.accelerator.scale import scale, step_config
from default_moe.bench.candidate import StepCandidate, random_batch
from default_moe.bench.report import Row
from default_moe.bench.step import allowed_memory, model_flops_utilization, with_router
from default_moe.bench.timing import time_alternately
from default_moe.config import Config
from default_moe.training.memory import step_memory
from default_moe.training.program import Program
from default_moe.training.step import Batch

_STEPS = 5  # timed, of each attempt
_KERNELS = 20  # shown of the profile


def measure(results: Results) -> None:
    """Attempts in the order of `scale`. The first that works is also compared with top-k and profiled."""
    compared = False
    for sequences, remat in scale().attempts:
        name = f"{sequences} sequences, remat={remat}"
        made: list[StepCandidate] = []  # emptied before the next attempt: there is room for one state
        if results.guarded(name, functools.partial(_attempt, made, step_config(sequences, remat))) and not compared:
            compared = True
            profiled: list[Row] = []
            results.guarded(f"profile, {name}", functools.partial(_profile_into, profiled, made[0]))
            for row in profiled:
                results.add({"name": row.pop("kernel"), **row})
            results.guarded(f"Default MoE against top-k, {name}", functools.partial(_versus_topk, made.pop()))


def _attempt(made: list[StepCandidate], config: Config) -> Row:
    """The step of `config`, timed, and left in `made`."""
    made.append(StepCandidate(config, *_work(config), devices=jax.devices()[:1]))
    return _timed(made[0])


def _profile_into(rows: list[Row], candidate: StepCandidate) -> Row:
    rows += profile(candidate)
    return {"kernels' ms": sum(row["ms"] for row in rows), "kernels": len(rows)}


def _work(config: Config) -> tuple[Batch, int]:
    vocab_size = config.model.vocab_size or 257
    return random_batch(config, vocab_size), vocab_size


def _timed(candidate: StepCandidate) -> Row:
    config = candidate.program.config
    timing = time_alternately({"": candidate.step}, _STEPS)[""]
    tokens_per_second = config.train.batch_size * config.train.sequence_length / timing.seconds
    return {
        "step ms": timing.seconds * 1e3,
        "tokens/s": tokens_per_second,
        "MFU": model_flops_utilization(config, candidate.program.vocab_size, tokens_per_second, 1),
        "compile s": candidate.compile_seconds,
        "experts by": candidate.program.matmul,
        "attention by": candidate.program.attention,
        "state GiB": candidate.memory.state / 2**30,
        "temporaries GiB": candidate.memory.temporaries / 2**30,
        "peak GiB": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30,  # so far
    }


def _versus_topk(default: StepCandidate) -> Row:
    """Both routers alternately, step by step on the same parameters: there need not be room for two states."""
    config = default.program.config
    program = Program(with_router(config, "topk"), default.program.vocab_size, jax.devices()[:1])
    topk = program.compile_train_step(jax.tree.map(lambda a: a[:1], _work(config)[0]))
    vectors = default.state.variables

    def topk_step() -> Any:
        state, metrics = topk(dataclasses.replace(default.state, variables={}), default.batch)
        default.state = dataclasses.replace(state, variables=vectors)
        return metrics

    def default_step() -> Any:
        nonlocal vectors
        metrics = default.step()
        vectors = default.state.variables
        return metrics

    timings = time_alternately({"topk": topk_step, "default": default_step}, 2 * _STEPS)
    middle, low, high = timings["default"].ratio_to(timings["topk"])
    return {
        "/ top-k": middle,
        "quartiles": f"{low:.4f}-{high:.4f}",
        "top-k + bytes": default.memory.total - step_memory(topk).total,
        "allowed bytes": allowed_memory(config, default.program.num_batch_shards),
    }


def profile(candidate: StepCandidate) -> list[Row]:
    """The kernels of a step that take longest: name, milliseconds, calls and share of the time of all kernels."""
    jax.block_until_ready(candidate.step())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(candidate.step())
        compressed = next(Path(folder).rglob("*.trace.json.gz")).read_bytes()
    trace = json.loads(gzip.decompress(compressed))["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in trace if e.get("name") == "process_name"}
    lanes = {(e["pid"], e["tid"]): e["args"]["name"] for e in trace if e.get("name") == "thread_name"}

    def is_kernel(event: dict[str, Any]) -> bool:
        lane = lanes.get((event["pid"], event.get("tid")), "")
        if "/device:" in processes.get(event["pid"], ""):
            return "Stream" in lane or lane == "XLA Ops"
        return "XLAEigen" in lane and "::" not in event["name"]  # a CPU's

    milliseconds: collections.Counter[str] = collections.Counter()
    calls: collections.Counter[str] = collections.Counter()
    for event in trace:
        if event.get("ph") == "X" and is_kernel(event):
            milliseconds[event["name"]] += event["dur"] / 1e3
            calls[event["name"]] += 1
    total = sum(milliseconds.values())
    return [
        {"kernel": name, "ms": ms, "calls": calls[name], "share": ms / total}
        for name, ms in milliseconds.most_common(_KERNELS)
    ]
