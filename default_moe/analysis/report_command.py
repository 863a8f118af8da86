"""The analyses that look at a run as a whole, as commands: `report`, and each of its parts by itself."""

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from default_moe import cli
from default_moe.analysis import default_vectors, domains, experts, over_training, page, routing, statistics, tokens
from default_moe.analysis.gradients import REFERENCES
from default_moe.analysis.observation import Observation, observe, rows_of
from default_moe.analysis.pictures import Part, Picture, write_pictures
from default_moe.config import Config
from default_moe.errors import CheckpointError, ConfigError, check, shown
from default_moe.files import read_file, read_json, write_report
from default_moe.moe.layer import DEFAULT_VECTORS
from default_moe.runs.progress import Progress
from default_moe.runs.saved_run import SavedRun, open_saved_run, read_earlier

PARTS = ("training", "routing", "experts", "defaults", "domains", "tokens")
_MOST_CHECKPOINTS = 8
_SAMPLE = 400  # tokens of the text that is coloured

_AGAINST = flags.DEFINE_multi_string("against", [], "Another run, whose curves are drawn beside; any number of times.")
_TOKENS = flags.DEFINE_integer("tokens", 16_384, "Held-out tokens to look at, and so many of each domain.", 1, 10**9)
_DOMAINS = flags.DEFINE_string(
    "domains",
    None,
    "Kinds of text, name:glob,name:glob; if not given, planted text's generators or Python's largest packages.",
)
_TEXT = flags.DEFINE_string("text", None, "File with a text whose tokens are coloured; held-out text if not given.")


def run(kind: str, workdirs: list[Path], step: int | None, overrides: list[str]) -> int:
    """Analyse a run, print figures, write pictures and the report to `<workdir>/analysis`; returns the exit code.

    kind: "report", or one of `PARTS`.
    """
    check(len(workdirs) == 1, "--workdir is given several times: the report is on one run, --against names others")
    workdir = workdirs[0]
    say = Progress(0).message
    asked = domains.parse_domains(_DOMAINS.value) if _DOMAINS.value else None
    text = _read_text() if _TEXT.value else None

    def override(saved: Config) -> Config:
        config = cli.parse_overrides(overrides, saved, allowed=("eval", "mesh", "data"))
        check(
            bool(config.model.num_moe_layers) and config.moe.num_experts > 1,
            f"{workdir} has no MoE layers with several experts: there is no routing to look at",
        )
        return config

    model = open_saved_run(workdir, step, override, training=False)
    config = model.program.config
    about = (
        f"step {model.step} of {workdir}: {config.moe.method.name!r}, {config.moe.experts_per_token} of "
        f"{config.moe.num_experts} experts, {config.model.num_moe_layers} MoE layers, {config.data.name}"
    )
    say(about)
    analysis = _Analysis(workdir, model, asked, text, say)
    wanted = list(PARTS) if kind == "report" else [kind]
    if DEFAULT_VECTORS not in model.variables and "defaults" in wanted:
        check(kind == "report", f"{workdir} has no default vectors: its method is {config.moe.method.name!r}")
        wanted.remove("defaults")
    folder = workdir / "analysis"
    parts: list[Part] = []
    drawn: dict[str, bytes] = {}
    for name in wanted:
        part = analysis.part(name)
        for line in [f"\n{part.title}", *part.lines]:
            say(line)
        drawn |= write_pictures(folder, [part], say)
        parts.append(part)
    if kind == "report":
        title = f"{workdir.name}, step {model.step}"
        gradients, pictures = _gradients(folder, workdir)
        html = page.page(title, [about], [*parts, gradients], drawn | pictures, _command())
        write_report(folder, {"report.html": html})
        say(f"\nwritten to {folder / 'report.html'}")
    else:
        say(f"\nwritten to {folder}: {', '.join(f'{name}.png' for name in drawn) or 'nothing'}")
    return 0


class _Analysis:
    """Looks at a run as far as it is asked: what several parts need is observed once."""

    def __init__(self, workdir: Path, model: SavedRun, asked: Any, text: str | None, say: Any):
        self.workdir, self.model, self.asked, self.text, self.say = workdir, model, asked, text, say
        self.config = model.program.config
        self.layers = self.config.model.moe_layers
        self._seen: dict[bool, Observation] = {}
        self._earlier: dict[int, tuple[Any, Any]] | None = None

    def part(self, name: str) -> Part:
        return getattr(self, f"_{name}")()

    def _training(self) -> Part:
        others = cli.paths(_AGAINST)
        labels = [path.name for path in (self.workdir, *others)]
        if len(set(labels)) < len(labels):
            labels = [str(path) for path in (self.workdir, *others)]
        logs = [over_training.read_log(self.workdir, self.config, labels[0])]
        logs += [over_training.read_other(path, label) for path, label in zip(others, labels[1:], strict=True)]
        return over_training.part(logs, self.layers)

    def _routing(self) -> Part:
        rows = self._rows()
        before = {
            step: observe(self.model, rows, _TOKENS.value, weights) for step, weights in self._checkpoints().items()
        }
        return routing.part(self._observed(), self.layers, before, self.model.step)

    def _experts(self) -> Part:
        return experts.part(self._observed(experts=True), self.layers)

    def _defaults(self) -> Part:
        before = {step: _vectors(variables) for step, (_, variables) in self._checkpoints().items()}
        seen = self._observed(experts=True)
        return default_vectors.part(_vectors(self.model.variables), seen, self.layers, before, self.model.step)

    def _domains(self) -> Part:
        # A token is hardly ever longer than 8 characters; what is too much is not looked at.
        texts = domains.read_domains(self.asked, self.config.data, 8 * _TOKENS.value)
        seen = {
            name: observe(self.model, rows_of(self.model, found, f"the domain {name!r}"), _TOKENS.value)
            for name, found in texts.items()
        }
        return domains.part(seen, self.layers)

    def _tokens(self) -> Part:
        rows = self._rows() if self.text is None else rows_of(self.model, [self.text], "--text")
        sample = observe(self.model, rows, _SAMPLE).first_tokens(_SAMPLE)
        return tokens.part(self._observed(), sample, self.layers, lambda token: self.model.tokenizer.decode([token]))

    def _rows(self) -> Any:
        return self.model.data.validation_rows(self.config.train.sequence_length)

    def _observed(self, experts: bool = False) -> Observation:
        if experts not in self._seen and True not in self._seen:
            self._seen[experts] = observe(self.model, self._rows(), _TOKENS.value, experts=experts)
        return self._seen.get(True) or self._seen[experts]

    def _checkpoints(self) -> dict[int, tuple[Any, Any]]:
        """Weights of earlier checkpoints that are still there, some of them if they are many."""
        if self._earlier is None:
            self._earlier = dict(self._read_earlier())
        return self._earlier

    def _read_earlier(self) -> Iterator[tuple[int, tuple[Any, Any]]]:
        found = read_earlier(self.workdir, self.model.program, self.model.step)
        for step in statistics.evenly(list(found), _MOST_CHECKPOINTS):
            try:
                yield step, found[step]()
            except CheckpointError as error:
                self.say(f"step {step} is left out: {error}")


def _gradients(folder: Path, workdir: Path) -> tuple[Part, dict[str, bytes]]:
    """What `analysis gradients` has left there, and its pictures by name."""
    found, drawn = [], {}
    for reference in REFERENCES:
        name = f"gradients_{reference}"
        try:
            step, drawn[name] = read_json(folder / f"{name}.json").get("step"), read_file(folder / f"{name}.png")
        except (OSError, ValueError):  # not there, or half there
            continue
        caption = (
            f"How close each method's router gradient is to the {reference} one at step {step}, for each number of "
            "experts that run: cosine similarity above, and norms below, mean and standard deviation over batches."
        )
        found.append(Picture(name, f"Against the {reference} gradient", caption, {}, lambda: None))
    command = shlex.join(["python", "-m", "default_moe.analysis", "gradients", f"--workdir={workdir}"])
    return Part("Router gradients", [] if found else [f"not measured yet: {command}"], found), drawn


def _vectors(variables: Any) -> np.ndarray:
    return np.asarray(variables[DEFAULT_VECTORS]["moe_layers"]["moe"]["ema"])


def _read_text() -> str:
    file = cli.path(_TEXT)
    try:
        text = read_file(file).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text cannot be read from {file}: {shown(error)}") from error
    check(bool(text), f"--text is {file}, but there is no text in it")
    return text


def _command() -> str:
    return shlex.join(["python", "-m", "default_moe.analysis", *sys.argv[1:]])
