"""The MoE layer against a dense feed-forward network of equal active FLOPs, timed alternately in one run."""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from default_moe.bench import report
from default_moe.bench.report import Row
from default_moe.bench.timing import Timing, time_alternately
from default_moe.bench.workload import ROUTINGS, LayerShape, Work, dense_candidate, make_work, moe_candidate
from default_moe.checks import check_choice
from default_moe.config import MATMUL_BACKENDS, ConfigError

_PASSES = ("forward", "forward+backward")
_COLUMNS = ("candidate", "ms", "/ dense", "quartiles", "/ top-k", "/ our default", "GFLOP/s")


def run(
    shapes: Sequence[LayerShape], backends: list[str] | None, dtype: str | None, rounds: int, vs_torch: bool
) -> list[Row]:
    """Time every shape, routing and pass, print a table of each, and return all rows.

    "/ dense" and "/ top-k" are medians over the rounds of the ratio to the dense network and to plain top-k of the same
    backend; torch's block is compared with a dense network on torch. Raises ConfigError.
    """
    for backend in backends or ():
        check_choice("--matmul", backend, MATMUL_BACKENDS)
    names = backends or list(MATMUL_BACKENDS)
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    if vs_torch:
        from default_moe.bench import torch_block  # torch is needed for nothing else

        torch_block.check_installed()
    print(report.heading())
    rows: list[Row] = []
    for shape in shapes:
        for routing in ROUTINGS:
            work = make_work(shape, routing, dtype)
            candidates = _candidates(shape, work, names)
            if vs_torch:
                candidates |= torch_block.candidates(shape, work)
            for index, name in enumerate(_PASSES):
                timings = time_alternately({key: pair[index] for key, pair in candidates.items()}, rounds)
                group = _rows(shape, timings, index)
                print(f"\n{shape} {dtype}, {routing} routing, {name}\n{report.table(group, _COLUMNS)}", flush=True)
                rows += [
                    {"shape": str(shape), "dtype": dtype, "routing": routing, "pass": name, **row} for row in group
                ]
    return rows


def _candidates(shape: LayerShape, work: Work, backends: list[str]) -> dict[str, tuple[Callable, Callable]]:
    candidates = {"dense": dense_candidate(work)}
    for backend in backends:
        for router in ("topk", "default"):
            candidates[f"{router} {backend}"] = moe_candidate(shape, work, router, backend)
    return candidates


def _rows(shape: LayerShape, timings: dict[str, Timing], index: int) -> list[Row]:
    rows: list[Row] = []
    for name, timing in timings.items():
        dense = timings["torch dense" if name.startswith("torch") else "dense"]
        middle, low, high = timing.ratio_to(dense)
        topk = timings.get(name.replace("default ", "topk "))
        rows.append(
            {
                "candidate": name,
                "ms": timing.seconds * 1e3,
                "/ dense": middle,
                "quartiles": f"{low:.3f}-{high:.3f}",
                "/ top-k": timing.ratio_to(topk)[0] if topk and name.startswith("default ") else None,
                "GFLOP/s": shape.active_flops() * (3 if index else 1) / timing.seconds / 1e9,
                "rounds": len(timing.samples),
            }
        )
        if name.startswith("torch mixtral"):
            ours = [t for key, t in timings.items() if key.startswith("default ")]
            best = min(ours, key=lambda t: t.seconds)
            rows[-1]["/ our default"] = timing.ratio_to(best)[0]
    return rows


def plot(rows: list[Row], path: Path) -> None:
    """Bars of "/ dense", forward and backward, one group for each shape and routing. Raises ConfigError."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["pass"] == _PASSES[1] and "dense" not in row["candidate"]]
    groups = list(dict.fromkeys((row["shape"], row["routing"]) for row in rows))
    names = list(dict.fromkeys(row["candidate"] for row in rows))
    figure, axes = plt.subplots(figsize=(1.5 + 1.8 * len(groups), 4.2), layout="constrained")
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        found = {(r["shape"], r["routing"]): r["/ dense"] for r in rows if r["candidate"] == name}
        xs = [g + (i - (len(names) - 1) / 2) * width for g, key in enumerate(groups) if key in found]
        bars = axes.bar(xs, [found[key] for key in groups if key in found], width, label=name)
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.axhline(1, color="black", linewidth=0.8)
    if max(row["/ dense"] for row in rows) > 5:
        axes.set_yscale("log")
    axes.set_xticks(
        range(len(groups)), [f"{shape.replace(' N', chr(10) + 'N')}\n{routing}" for shape, routing in groups]
    )
    axes.tick_params(axis="x", labelsize=7)
    axes.set_ylabel("time / dense of equal active FLOPs")
    axes.set_title("MoE layer, forward and backward")
    axes.legend(fontsize=7)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot write the picture {path}: {error}") from None
    finally:
        plt.close(figure)
