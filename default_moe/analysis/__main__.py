"""What a trained router is like: `python -m default_moe.analysis report --workdir=runs/quickstart`.

report: everything below but gradients, as one HTML file, <workdir>/analysis/report.html.
training: losses, balance and load over training.  routing: load, entropy, confidence, saturation of a checkpoint.
experts: what they have to do with each other and with tokens.  domains: with kinds of text.  tokens: which they take.
defaults: how alike default vectors are, and how well they stand in for outputs.
gradients: how close router gradients of --methods are to the true dense one, for each K, layer by layer.
swaps: what another expert would have done to the loss, and whether the router's gradient says so.
watch: a page about a run under way, on the terminal.
All but the last write pictures as PNG and SVG to <workdir>/analysis, with their numbers as JSON.
"""

import functools
from collections.abc import Callable
from pathlib import Path

from absl import flags

from default_moe import cli
from default_moe.analysis import gradients_command, report_command, swaps_command, watch
from default_moe.errors import ConfigError, quoted

# Each is called with the work directories, the step or None, and the command line's other arguments.
_KINDS: dict[str, Callable[[list[Path], int | None, list[str]], int]] = {
    **{kind: functools.partial(report_command.run, kind) for kind in ("report", *report_command.PARTS)},
    "gradients": gradients_command.run,
    "swaps": swaps_command.run,
    "watch": watch.run,
}
_WORKDIR = flags.DEFINE_multi_string(
    "workdir", None, "Directory of the run; for gradients several times: runs that differ in train.seed."
)
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; the newest if not given.", 0, 2**31 - 1)


def main(argv: list[str]) -> int:
    kinds = [arg for arg in argv[1:2] if not arg.startswith("-")]
    overrides = cli.parse_known_flags([argv[0], *argv[1 + len(kinds) :]])  # --help among them
    if not kinds or kinds[0] not in _KINDS:
        asked = f"there is no analysis {quoted(kinds[0])}" if kinds else "which analysis is not said"
        raise ConfigError(
            f"{asked}: python -m default_moe.analysis KIND --workdir=..., KIND one of {', '.join(_KINDS)}"
        )
    if not all(_WORKDIR.value or [""]):
        raise ConfigError("--workdir is missing: the work directory of a run")
    return _KINDS[kinds[0]](cli.paths(_WORKDIR), _STEP.value, overrides)


if __name__ == "__main__":
    cli.run(main)
