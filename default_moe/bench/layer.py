"""The MoE layer against a dense feed-forward network of equal active FLOPs, timed alternately in one run."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from default_moe.bench import report
from default_moe.bench.report import Row
from default_moe.bench.timing import Timing, call_once, one_line, time_alternately
from default_moe.bench.workload import (
    ROUTINGS,
    LayerShape,
    dense_candidate,
    make_work,
    moe_candidate,
    standard_dtype,
)
from default_moe.config import MATMUL_BACKENDS
from default_moe.errors import check_choice
from default_moe.hardware import heading
from default_moe.moe.experts.backends import available_backends, resolve_backend

_Key = tuple[str, str]  # the candidate's name and its routing
_PASSES = ("forward", "forward+backward")
_COLUMNS = ("candidate", "routing", "ms", "/ dense", "quartiles", "/ top-k", "/ balanced", "/ our default", "GFLOP/s")


def run(
    shapes: Sequence[LayerShape],
    backends: list[str] | None,
    dtype: str | None,
    rounds: int,
    vs_torch: bool,
    save: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """Time every shape and pass, print a table of each, and return all rows. `save` takes those found until then.

    A backend that fails is left out, unless it is the last.

    Columns that begin with "/" are medians over the rounds of a ratio: to the dense network (torch's block to one on
    torch), to plain top-k of the same backend and routing, to balanced routing, and of torch's block to the fastest
    Default MoE of the same routing. Raises ConfigError.
    """
    for backend in backends or ():
        check_choice("--matmul", backend, ("auto", *MATMUL_BACKENDS))
        resolve_backend(backend)
    names = backends or available_backends()
    dtype = dtype or standard_dtype()
    if vs_torch:
        from default_moe.bench import torch_block  # torch is needed for nothing else

        torch_block.check_installed("torch", "transformers")
    print(heading())
    rows: list[Row] = []
    for shape in shapes:
        candidates: dict[_Key, tuple[Callable, Callable]] = {}
        for routing in ROUTINGS:
            work = make_work(shape, routing, dtype)
            found = {"dense": dense_candidate(work)}
            for backend, router in itertools.product(names, ("topk", "default")):
                found[f"{router} {backend}"] = moe_candidate(shape, work, router, backend)
            if vs_torch:
                found |= torch_block.candidates(shape, work)
            # Routing is nothing to a dense network: it is timed once.
            candidates |= {
                (name, routing): f for name, f in found.items() if routing == ROUTINGS[0] or "dense" not in name
            }
        for index, name in enumerate(_PASSES):
            functions = {key: pair[index] for key, pair in candidates.items()}
            for (candidate, _), error in call_once(functions).items():
                backend = candidate.split()[-1]
                functions = {key: f for key, f in functions.items() if key[0].split()[-1] != backend}
                if not any(key[0].startswith("default ") for key in functions) or backend == "dense":
                    raise error
                print(f"\n{shape} {dtype}, {name}: without {backend}, {one_line(error)}")
            timings = time_alternately(functions, rounds)
            group = _rows(timings, shape.active_flops() * (3 if index else 1))
            print(f"\n{shape} {dtype}, {name}\n{report.table(group, _COLUMNS)}", flush=True)
            rows += [{"shape": str(shape), "dtype": dtype, "pass": name, **row} for row in group]
            save(rows)
    return rows


def _rows(timings: dict[_Key, Timing], flops: int) -> list[Row]:
    rows: list[Row] = []
    balanced = ROUTINGS[0]
    for (name, routing), timing in timings.items():
        row = {
            "candidate": name,
            "routing": routing,
            "ms": timing.seconds * 1e3,
            **timing.versus(timings["torch dense" if name.startswith("torch") else "dense", balanced], "/ dense"),
            "GFLOP/s": flops / timing.seconds / 1e9,
            "rounds": len(timing.samples),
        }
        if routing != balanced:
            row["/ balanced"] = timing.ratio_to(timings[name, balanced])[0]
        if name.startswith("default "):
            row["/ top-k"] = timing.ratio_to(timings[name.replace("default", "topk"), routing])[0]
        if name == "torch mixtral":
            ours = [t for (other, where), t in timings.items() if other.startswith("default ") and where == routing]
            row["/ our default"] = timing.ratio_to(min(ours, key=lambda t: t.seconds))[0]
        rows.append(row)
    return rows


def plot(rows: list[Row], path: Path) -> None:
    """Draw bars of "/ dense", forward and backward, one group for each shape and routing. Raises ConfigError."""
    rows = [row for row in rows if row["pass"] == _PASSES[1] and "dense" not in row["candidate"]]
    groups = list(dict.fromkeys((row["shape"], row["routing"]) for row in rows))
    names = list(dict.fromkeys(row["candidate"] for row in rows))
    with report.figure(path, width=1.5 + 1.8 * len(groups)) as figure:
        axes = figure.subplots()
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            found = {(r["shape"], r["routing"]): r["/ dense"] for r in rows if r["candidate"] == name}
            xs = [g + (i - (len(names) - 1) / 2) * width for g, key in enumerate(groups) if key in found]
            bars = axes.bar(xs, [found[key] for key in groups if key in found], width, label=name)
            axes.bar_label(bars, fmt="%.2f", fontsize=7)
        axes.axhline(1, color="black", linewidth=0.8)
        if max(row["/ dense"] for row in rows) > 5:
            axes.set_yscale("log")
        axes.set_xticks(range(len(groups)), [shape.replace(" N", "\nN") + "\n" + routing for shape, routing in groups])
        axes.tick_params(axis="x", labelsize=7)
        axes.set_ylabel("time / dense of equal active FLOPs")
        axes.set_title("MoE layer, forward and backward")
        axes.legend(fontsize=7)
