"""Benchmarks of a saved checkpoint by lm-evaluation-harness, which is imported only when they are asked for."""

import contextlib
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from default_moe.config import Config
from default_moe.errors import check, closest, quoted, shown
from default_moe.files import write_report
from default_moe.hardware import machine
from default_moe.processes import distributed
from default_moe.runs.progress import Progress
from default_moe.runs.saved_run import open_model

# The thirteen of the Default MoE paper, by lm_eval's names; ARC counts as one.
PAPER = (
    "logiqa",
    "mathqa",
    "mmlu",
    "openbookqa",
    "lambada_openai",
    "social_iqa",
    "hellaswag",
    "arc_easy",
    "arc_challenge",
    "winogrande",
    "pubmedqa",
    "boolq",
    "piqa",
    "sciq",
)
_BOOTSTRAP = 1000  # of what has no formula for its standard error, in this process alone


def run(
    workdir: Path,
    step: int | None,
    tasks: Sequence[str],
    override: Callable[[Config], Config],
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: Path | None = None,
) -> int:
    """Run tasks of lm_eval on a checkpoint, print its table, write `<workdir>/eval/tasks_step_N.json`.

    Args:
      workdir: of the run.
      step: which checkpoint; None takes the newest that is whole.
      tasks: names of tasks, groups or tags; "paper" stands for the paper's.
      override: changes the checkpoint's own config.
      limit: of questions of each task; None takes all.
      num_fewshot: examples before each question; None leaves it to the task.
      include_path: folder with more tasks.

    Returns:
      the exit code, 0. Raises ConfigError or CheckpointError on bad input.

    With several processes all do the same, and only the first one prints and writes.
    """
    require_lm_eval()
    asked = {"--tasks": list(tasks), "--limit": limit, "--num_fewshot": num_fewshot}
    model = open_model(workdir, step, override, asked)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # no processes forked beside JAX's threads
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.utils import handle_non_serializable, make_table

    from default_moe.runs.benchmark_model import BenchmarkModel

    datasets.disable_progress_bars()
    for name in ("lm_eval", "datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)  # they tell of each attempt to reach the network
    say = Progress(0).message
    names = list(dict.fromkeys(name for task in tasks for name in (PAPER if task == "paper" else (task,))))
    say(f"opening the tasks {', '.join(names)}")
    manager, loaded = distributed.in_turn(lambda: _open(names, include_path))
    lm = BenchmarkModel(model)
    for task in manager.load(loaded)["tasks"].values():
        lm.check_task(task)
    with contextlib.redirect_stdout(None if distributed.process_index() else sys.stdout):  # lm_eval prints too
        results: Any = simple_evaluate(
            lm,
            tasks=loaded,
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            log_samples=False,
            bootstrap_iters=_BOOTSTRAP,
        )
    if distributed.process_index() == 0:
        say(f"\nstep {model.step}\n{make_table(results)}")
        if "groups" in results:
            say(make_table(results, "groups"))
        plain = json.loads(json.dumps(results, default=handle_non_serializable))
        report = {"step": model.step, **plain, "settings": model.config.to_dict(), "machine": machine()}
        file = f"tasks_step_{model.step}.json"
        write_report(workdir / "eval", {file: report})
        say(f"written to {workdir / 'eval' / file}")
    return 0


def require_lm_eval() -> None:
    """Raises ConfigError if lm_eval is not installed."""
    check(
        importlib.util.find_spec("lm_eval") is not None,
        "--tasks needs lm-evaluation-harness, which is not installed: pip install 'lm_eval>=0.4.13', "
        "or pip install '.[eval]' in a clone of this repository",
    )


def _open(names: Sequence[str], include_path: Path | None) -> tuple[Any, list[Any]]:
    """lm_eval's TaskManager, and the tasks and groups of these names with their data. Raises ConfigError."""
    manager = _manager(names, include_path)
    for name in names:
        check(
            name in manager.task_index,
            f"--tasks names {quoted(name)}, but there is no such task{closest(name, manager.all_tasks)}",
        )
    loaded: list[Any] = []
    for name in names:
        with _in_one_line(manager.task_index, name):
            found = manager.load([name])
        loaded += [found["groups"][name]] if name in found.get("groups", {}) else found["tasks"].values()
    with _in_one_line(manager.task_index, ",".join(names)):
        manager.load(loaded)  # refuses a task that is there twice
    return manager, loaded


def _manager(names: Sequence[str], include_path: Path | None) -> Any:
    """The TaskManager of a folder of tasks alone if they are all there: lm_eval's own take many seconds to be read."""
    from lm_eval.tasks import TaskManager

    if include_path is None:
        return TaskManager()
    local = TaskManager(include_path=include_path, include_defaults=False)
    if all(entry for name in names for entry in _members(local.task_index, name)):
        return local
    return TaskManager(include_path=include_path)


def _members(index: Mapping[str, Any], name: Any) -> Iterator[Any]:
    """The entries of the tasks that a name stands for; None for one that is not there."""
    entry: Any = index.get(name) if isinstance(name, str) else None
    kind = entry.kind.name if entry else ""
    if kind == "TAG":
        members: Any = sorted(entry.tags)
    elif kind == "GROUP" and isinstance(entry.cfg["task"], list):
        items = entry.cfg["task"]
        members = [item.get("group", item.get("task")) if isinstance(item, dict) else item for item in items]
    else:
        yield entry
        return
    for member in members:
        yield from _members(index, member)


@contextlib.contextmanager
def _in_one_line(index: Mapping[str, Any], name: str) -> Iterator[None]:
    """Meanwhile lm_eval opens a task, which may come from anyone. Raises ConfigError for whatever it raises."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {shown(error)}"
        configs = (entry.cfg or {} for entry in _members(index, name) if entry)
        places = dict.fromkeys(str(config["dataset_path"]) for config in configs if "dataset_path" in config)
        check(
            not isinstance(error, ConnectionError),
            f"the task {quoted(name)} needs the data set {' and '.join(places)} of huggingface.co, which cannot be "
            "reached: run the same command where it can, copy ~/.cache/huggingface from there, and set "
            f"HF_HUB_OFFLINE=1; or describe a task that reads local files (--include_path) ({reason})",
        )
        check(False, f"the task {quoted(name)} cannot be opened: {reason}")
