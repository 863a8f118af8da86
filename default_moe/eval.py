"""Evaluate a saved checkpoint on held-out text and generate from it: `python eval.py --workdir=runs/quickstart`.

The checkpoint knows its own config; --config.eval.*, --config.mesh.* and --config.data.* change how it is evaluated.
With --tasks it runs benchmarks of lm-evaluation-harness instead.
`python -m default_moe.eval` is the same program.
"""

from absl import flags

from default_moe import cli
from default_moe.config import EvalConfig
from default_moe.errors import ConfigError, check, shown
from default_moe.files import read_file
from default_moe.runs import benchmarks, evaluate_checkpoint
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
_TASKS = flags.DEFINE_list("tasks", [], "Benchmarks of lm_eval to run instead, by name; paper: those of the paper.")
_LIMIT = flags.DEFINE_integer("limit", None, "Questions of each task; all if not given.", 1, 2**31 - 1)
_NUM_FEWSHOT = flags.DEFINE_integer("num_fewshot", None, "Examples before each question.", 0, 1000)
_INCLUDE_PATH = flags.DEFINE_string("include_path", None, "Folder with YAML files of more tasks.")
_OF_TASKS = (_LIMIT, _NUM_FEWSHOT, _INCLUDE_PATH)
_OF_TEXT = (_PROMPT, _PROMPTS, _TOP_K, _TOP_P, _SEED, _PROMPT_ONLY, _STOP)


def main(argv: list[str]) -> int:
    overrides = cli.parse_known_flags(argv)
    for flag in _OF_TEXT if _TASKS.present else _OF_TASKS:
        check(not flag.present, f"--{flag.name} {'does not go with' if _TASKS.present else 'goes with'} --tasks")
    if _TASKS.present:
        return _run_benchmarks(overrides)
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


def _run_benchmarks(overrides: list[str]) -> int:
    tasks = [name.strip() for name in _TASKS.value if name.strip()]
    check(bool(tasks), "--tasks names no task: --tasks=hellaswag,arc_easy, say")
    folder = cli.path(_INCLUDE_PATH) if _INCLUDE_PATH.present else None
    check(folder is None or folder.is_dir(), f"--include_path is {folder}, but there is no such folder")
    return benchmarks.run(
        cli.path(_WORKDIR),
        _STEP.value,
        tasks,
        lambda config: cli.parse_overrides(overrides, config, allowed=("eval", "mesh")),
        _LIMIT.value,
        _NUM_FEWSHOT.value,
        folder,
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
