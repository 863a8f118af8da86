"""Evaluate a saved checkpoint on held-out text and generate from it: `python eval.py --workdir=runs/quickstart`.

The checkpoint knows its own config; --config.eval.*, --config.mesh.* and --config.data.* change how it is evaluated.
`python -m default_moe.eval` is the same program.
"""

from absl import flags

from default_moe import cli
from default_moe.config import EvalConfig
from default_moe.runs import evaluate_checkpoint

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
_STEP = flags.DEFINE_integer("step", None, "Step to evaluate; the newest if not given.", 0, 2**31 - 1)
_PROMPT = flags.DEFINE_string("prompt", None, "Text to continue; --config.eval.prompt if not given.")


def main(argv: list[str]) -> int:
    overrides = cli.parse_known_flags(argv)
    EvalConfig(prompt=_PROMPT.value or "")  # refuses what is no text
    return evaluate_checkpoint.run(
        cli.path(_WORKDIR),
        _STEP.value,
        _PROMPT.value,
        lambda config: cli.parse_overrides(overrides, config, allowed=("eval", "mesh", "data")),
    )


if __name__ == "__main__":
    cli.run(main, many_processes=True)
