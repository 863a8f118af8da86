"""Whole runs of a tiny model, in this process or in others, and what they leave on the disk.

As a program it runs commands given as JSON on its standard input; see `run_commands`.
"""

import contextlib
import hashlib
import io
import json
import os
import random
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers.permissions import obey_permissions

from default_moe import cli
from default_moe.config import Config, flat_items
from default_moe.runs import evaluate_checkpoint, trainer
from default_moe.runs.progress import Progress

REPOSITORY = Path(__file__).resolve().parents[2]
TIMES = ("step_seconds", "tokens_per_second", "model_flops_per_second", "mfu")
WORDS = ("the", "cat", "sat", "on", "two", "red", "birds", "fly", "over", "old", "stones", "near", "a", "cold", "river")


def write_corpus(folder: Path, seed: int = 0, files: int = 4) -> str:
    """A few text files of random words; returns the glob that names them."""
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    for number in range(files):
        lines = (" ".join(rng.choices(WORDS, k=rng.randint(3, 9))) for _ in range(120))
        (folder / f"{number}.txt").write_text("\n".join(lines) + "\n")
    return str(folder / "*.txt")


def tiny_settings(folder: Path, **sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings, by section, of a tiny model on the text in `folder`/text; `sections` are added to them."""
    settings = {
        "model": {"d_model": 16, "num_layers": 2, "num_heads": 2},
        "moe": {"num_experts": 8, "top_k": 2, "expert_dim": 16},
        "data": {
            "name": "text_files",
            "files": str(folder / "text" / "*.txt"),
            "dir": str(folder / "prepared"),
            "validation_fraction": 0.2,
        },
        "train": {"num_steps": 40, "batch_size": 8, "sequence_length": 32, "log_every_steps": 1, "seed": 1},
        "checkpoint": {"every_steps": 4, "keep_last": 3},
        "eval": {"every_steps": 12, "num_batches": 4, "sample_tokens": 0},
    }
    for section, values in sections.items():
        settings[section] = {**settings.get(section, {}), **values}
    return settings


def tiny_config(folder: Path, **sections: dict[str, Any]) -> Config:
    return Config.from_mapping(tiny_settings(folder, **sections))


def as_flags(settings: dict[str, dict[str, Any]]) -> list[str]:
    """The command line's flags for settings."""
    return [f"--config.{name}={value}" for name, value in flat_items(settings)]


def environment() -> dict[str, str]:
    """Environment variables for another process that runs the same programs as this one."""
    return {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}


def train(config: Config, workdir: Path) -> tuple[int, str]:
    """Trains in this process as the command does. Returns its exit code, and all it printed."""
    return _run(lambda argv: trainer.train(config, workdir))


def evaluate(workdir: Path, step: int | None = None, override: Any = lambda config: config) -> tuple[int, str]:
    """Evaluates in this process as the command does. Returns its exit code, and all it printed."""
    return _run(lambda argv: evaluate_checkpoint.run(workdir, step, ["the "], override))


def trained(config: Config, workdir: Path, code: int = 0) -> str:
    """What a training that ends with that exit code prints."""
    found, output = train(config, workdir)
    assert found == code, output
    return output


def refused_training(config: Config, workdir: Path, code: int = 2) -> str:
    """The one line with which a training ends that fails with that exit code."""
    *before, last = trained(config, workdir, code).splitlines()
    assert last.startswith("error: ") and not any(line.startswith(("error: ", "Traceback")) for line in before)
    return last


def evaluated(workdir: Path, step: int, asked: int | None = None, **options: Any) -> tuple[dict[str, Any], str]:
    """The report of an evaluation, of which it says that it is of `step`, and what it printed."""
    code, output = evaluate(workdir, asked, **options)
    assert code == 0, output
    text = (workdir / "eval" / f"step_{step}.json").read_text()
    return json.loads(text, parse_constant=pytest.fail), output  # neither NaN nor infinity


def _run(main: Any) -> tuple[int, str]:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            cli.run(main)
        except SystemExit as end:
            return end.code, output.getvalue()
    raise AssertionError("a program ends with an exit code")


def at_step(monkeypatch: Any, step: int, action: Any) -> None:
    """Calls `action` while training in this process does that step."""
    after_step = Progress.step

    def hooked(self: Progress, now: int) -> None:
        after_step(self, now)
        if now == step:
            action()

    monkeypatch.setattr(Progress, "step", hooked)


def metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without the keys that measure time."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if not name.endswith(TIMES)} for line in lines]


def read_events(workdir: Path) -> list[Any]:
    """Every event of every file, oldest file first, with TFRecord's framing (length, 2 checksums) taken off."""
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted((workdir / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            events.append(Event.FromString(data[12 : 12 + size]))
            data = data[12 + size + 4 :]
    return events


def steps(workdir: Path) -> list[int]:
    """The steps in checkpoints/, where there is nothing else."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def saved_state(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by name: parameters, default vectors, optimizer state, random key and counters."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        path = (workdir / "checkpoints" / str(step) / "state").absolute()
        tree = checkpointer.metadata(path).item_metadata.tree
        arguments = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        state = checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=arguments))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}


def assert_same_state(workdir: Path, expected: Path, step: int) -> None:
    """Both runs hold the same bits at that step."""
    ours, theirs = saved_state(workdir, step), saved_state(expected, step)
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (array.dtype, array.shape), name
        assert ours[name].tobytes() == array.tobytes(), f"{name} differs"


def content(*folders: Path) -> dict[str, str]:
    """Every file and folder below, with digests of the files' contents."""
    paths = [path for folder in folders for path in folder.rglob("*")]
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder" for p in paths}


def run_commands(
    commands: list[list[str]], cwd: Path, env: dict[str, str], output: str = "file"
) -> list[tuple[int, str, str]]:
    """Runs commands, ["train.py", "--config=..."], one after the other in `cwd`. Permissions hold for them.

    output: where they print, "file" or "full" (a disk), "pipe" (that nobody reads) or "closed".
    Returns exit code, standard output and standard error of each. They are forked off one process that has
    imported everything, so that each takes a fraction of a second.
    """
    process = subprocess.run(
        [sys.executable, __file__, output],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**env, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}:{env.get('PYTHONPATH', '')}"},
    )
    assert process.returncode == 0, process.stderr
    return [tuple(result) for result in json.loads(process.stdout)]


def _serve() -> None:
    import default_moe.compare.plot  # noqa: F401 - takes seconds, so not once for each command

    commands = json.load(sys.stdin)
    json.dump([_run_forked(command) for command in commands], sys.stdout)


def _run_forked(command: list[str]) -> tuple[int, str, str]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()  # before JAX has started a backend, and with it threads
        if child == 0:
            os.dup2(_output(out.fileno()), 1)
            os.dup2(err.fileno(), 2)
            if sys.argv[1] == "closed":
                os.close(1)
            obey_permissions()
            become(command)
        _, status = os.waitpid(child, 0)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
        return os.waitstatus_to_exitcode(status), texts[0], texts[1]


def _output(file: int) -> int:
    if sys.argv[1] == "full":
        return os.open("/dev/full", os.O_WRONLY)
    if sys.argv[1] == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
        return writer
    return file


def become(command: list[str]) -> None:
    """Run a command in this process, which ends with it."""
    code = 99  # stays if the program ends without an exit code
    try:
        sys.argv = command
        runpy.run_path(str(REPOSITORY / command[0]), run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
