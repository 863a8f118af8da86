"""Evaluate a saved checkpoint on held-out text and generate from it: `python eval.py --workdir=runs/quickstart`.

The checkpoint knows its own config; --config.eval.*, --config.mesh.* and --config.data.* change how it is evaluated.
`python -m default_moe.eval` is the same program.
"""

from absl import flags

from default_moe import cli
from default_moe.config import EvalConfig
from default_moe.errors import ConfigError, check, shown
from default_moe.files import read_file
from default_moe.runs import evaluate_checkpoint
from default_moe.runs.sampling import Sampling

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
_STEP = flags.DEFINE_integer("step", None, "Step to evaluate; the newest if not given.", 0, 2**31 - 1)
_PROMPT = flags.DEFINE_multi_string(
    "prompt", [], "Text to continue, any number of times; --config.eval.prompt if none."
)
_PROMPTS = flags.DEFINE_string("prompts", None, "File with more of them, one on each line.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw tokens among so many likeliest; 0: among all.", 0, 2**31 - 1)
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw among the likeliest tokens of so much probability together.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the draws.", 0, 2**32 - 1)
_PROMPT_ONLY = flags.DEFINE_bool("prompt_only", False, "Continue the prompts; evaluate nothing, write no report.")
_STOP = flags.DEFINE_multi_string("stop", [], "Text that ends what is generated, any number of times.")


def main(argv: list[str]) -> int:
    overrides = cli.parse_known_flags(argv)
    prompts = [*_PROMPT.value, *_read_prompts()]
    for text in (*prompts, *_STOP.value):
        EvalConfig(prompt=text)  # refuses what is no text
    return evaluate_checkpoint.run(
        cli.path(_WORKDIR),
        _STEP.value,
        prompts,
        lambda config: cli.parse_overrides(overrides, config, allowed=("eval", "mesh", "data")),
        Sampling(top_k=_TOP_K.value, top_p=_TOP_P.value, seed=_SEED.value),
        [text for text in _STOP.value if text],
        _PROMPT_ONLY.value,
    )


def _read_prompts() -> list[str]:
    if not _PROMPTS.value:
        return []
    file = cli.path(_PROMPTS)
    try:
        prompts = read_file(file).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts cannot be read from {file}: {shown(error)}") from error
    check(any(prompts), f"--prompts is {file}, but there is no text in it")
    return [prompt for prompt in prompts if prompt]


if __name__ == "__main__":
    cli.run(main, many_processes=True)
