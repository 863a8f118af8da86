"""The analysis `gradients` as a command: its flags, what it prints and what it writes."""

import re
from pathlib import Path
from typing import Any

from absl import flags

from default_moe import cli
from default_moe.analysis import gradients, gradients_report
from default_moe.analysis.gradients import Checkpoint, Fidelity
from default_moe.config import Config
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
_BATCHES = flags.DEFINE_integer("batches", 8, "Training batches, those after the checkpoint.", 1, 10_000)


def run(workdirs: list[Path], step: int | None, overrides: list[str]) -> int:
    """Measure, print and write router gradients; returns the exit code."""
    check(len(workdirs) == 1, "--workdir is given several times, but gradients are those of one run")
    workdir = workdirs[0]
    say = Progress(0).message
    methods = [name.strip() for name in _METHODS.value]

    def chosen(saved: Config) -> Config:
        config = cli.parse_overrides(overrides, saved, allowed=("mesh", "data"))
        _top_ks(config)
        gradients.check_methods(methods, config, _REFERENCE.value)
        return config

    run = open_saved_run(workdir, step, chosen)
    config, step, top_ks = run.program.config, run.step, _top_ks(run.program.config)
    checkpoint = Checkpoint(config, run.program.vocab_size, step, run.params, run.variables)
    rows = run.data.train_rows(config.train.sequence_length, config.train.seed)
    say(
        f"step {step} of {workdir}, trained with {config.moe.method.name!r}, top {config.moe.top_k} of "
        f"{config.moe.num_experts}: cosine similarity of router gradients to the {_REFERENCE.value} ones, mean over "
        f"layers ± standard deviation over {_BATCHES.value} batches, by layer, and their norms relative to those"
    )

    def report(fidelity: Fidelity) -> None:
        say(gradients_report.line(fidelity))

    found = gradients.measure(checkpoint, rows, methods, top_ks, _BATCHES.value, _REFERENCE.value, report, say)
    if not found:
        raise ConfigError(f"--methods={','.join(methods)} can run with no K of {', '.join(map(str, top_ks))}")
    for method in methods[1:]:
        say(gradients_report.verdict(found, method, methods[0]))
    folder, name = workdir / "analysis", f"gradients_{_REFERENCE.value}"
    files: dict[str, Any] = {f"{name}.json": gradients_report.as_json(found, checkpoint, _REFERENCE.value, machine())}
    layers = config.model.moe_layers
    files |= picture_file(f"{name}.png", lambda: gradients_report.picture(found, _REFERENCE.value, layers), say)
    write_report(folder, files)
    say(f"written to {folder}: {', '.join(files)}")
    return 0


def _top_ks(config: Config) -> list[int]:
    most = config.moe.num_experts - 1
    if _TOP_K.value is None:
        return list(range(1, most + 1))
    texts = [text.strip() for text in _TOP_K.value]
    if not texts or not all(re.fullmatch("[0-9]{1,5}", text) and 1 <= int(text) <= most for text in texts):
        raise ConfigError(f"--top_k is {quoted(','.join(texts))}, but must be numbers from 1 to {most}")
    return sorted({int(text) for text in texts})
