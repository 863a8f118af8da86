"""The analysis `gradients` as a command: its flags, what it prints and what it writes."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from default_moe import cli
from default_moe.analysis import gradients, gradients_report
from default_moe.analysis.gradients import Checkpoint, Fidelity
from default_moe.config import Config, flat_items
from default_moe.errors import ConfigError, check, quoted
from default_moe.files import write_report
from default_moe.hardware import machine
from default_moe.runs.pictures import picture_file
from default_moe.runs.progress import Progress
from default_moe.runs.saved_run import open_saved_run

_METHODS = flags.DEFINE_list("methods", ["topk", "default"], "Values of moe.router to compare.")
_REFERENCE = flags.DEFINE_enum(
    "reference",
    gradients.REFERENCES[0],
    gradients.REFERENCES,
    "What is true: the exact gradient of the same forward pass, or that of the model with all experts active.",
)
_TOP_K = flags.DEFINE_list("top_k", None, "Values of K; 1 to N - 1 if not given.")
BATCHES = flags.DEFINE_integer(
    "batches", 8, "Training batches, those after the checkpoint; for swaps held-out batches.", 1, 10_000
)


def run(workdirs: list[Path], step: int | None, overrides: list[str]) -> int:
    """Measure, print and write router gradients; returns the exit code."""
    say = Progress(0).message
    methods, reference = [name.strip() for name in _METHODS.value], _REFERENCE.value

    def chosen(saved: Config) -> Config:
        config = cli.parse_overrides(overrides, saved, allowed=("mesh", "data"))
        _top_ks(config)
        gradients.check_methods(methods, config, reference)
        return config

    checkpoints: list[Checkpoint] = []
    for workdir in workdirs:
        checkpoint = _open(workdir, step, chosen)
        if checkpoints:
            _check_differ_in_seed(workdirs[0], checkpoints, workdir, checkpoint)
        checkpoints.append(checkpoint)
    config, top_ks = checkpoints[0].config, _top_ks(checkpoints[0].config)
    several = len(workdirs) > 1
    say(
        f"step {checkpoints[0].step} of {', '.join(map(str, workdirs))}, trained with {config.moe.method.name!r}, top "
        f"{config.moe.top_k} of {config.moe.num_experts}: cosine similarity of router gradients to the {reference} "
        f"ones, mean over layers ± standard deviation over {BATCHES.value} batches"
        + (f" ± that over {len(workdirs)} runs" if several else "")
        + ", by layer, and their norms relative to those"
    )

    def report(fidelity: Fidelity) -> None:
        say(gradients_report.line(fidelity))

    folder, name = workdirs[0] / "analysis", f"gradients_{reference}" + ("_seeds" if several else "")
    found: list[Fidelity] = []
    written = ""

    def draw() -> bytes:
        return gradients_report.picture(found, reference, config.model.moe_layers)

    try:
        for of_k in gradients.measure(checkpoints, methods, top_ks, BATCHES.value, reference, report, say):
            found += of_k
            if of_k:
                files: dict[str, Any] = {
                    f"{name}.json": gradients_report.as_json(found, checkpoints, reference, machine())
                }
                files |= picture_file(f"{name}.png", draw, say)
                write_report(folder, files)
                written = f"written to {folder}: {', '.join(files)}"
    except KeyboardInterrupt:
        if not written:
            raise
        done = ", ".join(map(str, dict.fromkeys(f.top_k for f in found)))
        raise KeyboardInterrupt(f"{written}, as far as K = {done}") from None
    if not found:
        raise ConfigError(f"--methods={','.join(methods)} can run with no K of {', '.join(map(str, top_ks))}")
    for method in methods[1:]:
        say(gradients_report.verdict(found, method, methods[0]))
    say(written)
    return 0


def _open(workdir: Path, step: int | None, chosen: Callable[[Config], Config]) -> Checkpoint:
    run = open_saved_run(workdir, step, chosen)
    config = run.program.config
    rows = run.data.train_rows(config.train.sequence_length, config.train.seed)
    return Checkpoint(config, run.program.vocab_size, run.step, run.params, run.variables, rows)


def _check_differ_in_seed(first: Path, others: list[Checkpoint], workdir: Path, checkpoint: Checkpoint) -> None:
    """Raises ConfigError if a run is not one of the same settings as the others, with another seed."""
    ours, theirs = (dict(flat_items(c.config.to_dict())) for c in (checkpoint, others[0]))
    names = [name for name in ours | theirs if name != "train.seed" and ours.get(name) != theirs.get(name)]
    both, seed = f"{first} and {workdir}", checkpoint.config.train.seed
    check(not names, f"{both} differ in {', '.join(names)}: runs may differ only in train.seed")
    check(seed not in [c.config.train.seed for c in others], f"{workdir} has train.seed {seed}, as another run does")
    check(checkpoint.vocab_size == others[0].vocab_size, f"{both} have tokenizers of different sizes")
    steps = f"steps {others[0].step} and {checkpoint.step}"
    check(checkpoint.step == others[0].step, f"{both} are at {steps}: give one that both have as --step")


def _top_ks(config: Config) -> list[int]:
    most = config.moe.num_experts - 1
    if _TOP_K.value is None:
        return list(range(1, most + 1))
    texts = [text.strip() for text in _TOP_K.value]
    if not texts or not all(re.fullmatch("[0-9]{1,5}", text) and 1 <= int(text) <= most for text in texts):
        raise ConfigError(f"--top_k is {quoted(','.join(texts))}, but must be numbers from 1 to {most}")
    return sorted({int(text) for text in texts})
