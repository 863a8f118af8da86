"""Metrics in Weights & Biases: offline runs of its own library, and what happens where it is not there or fails."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from helpers.tiny_runs import (
    REPOSITORY,
    as_flags,
    environment,
    metrics,
    refused_training,
    tiny_config,
    tiny_settings,
    trained,
)

from default_moe.config import Config
from default_moe.runs.metrics import MetricsWriter
from default_moe.runs.pictures import load_heat_map
from default_moe.runs.workdir import Run
from default_moe.runs.writers import open_writers

PROJECT = Config.from_mapping({"log": {"wandb": "moe"}})


@pytest.fixture
def offline(monkeypatch, tmp_path):
    for name, value in {"MODE": "offline", "CONFIG_DIR": tmp_path / "c", "CACHE_DIR": tmp_path / "d"}.items():
        monkeypatch.setenv(f"WANDB_{name}", str(value))


def records(file: Path):
    """What the library has written to its file: a log of records, in blocks of 32 KiB, cut up at their ends."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record = file.read_bytes(), 7, b""
    while at < len(data):
        if at % 32768 > 32768 - 7:
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(record)
            record = b""


def logged(folder: Path):
    """Of an offline run: its id, its settings, and by step what was logged."""
    (file,) = folder.glob("*.wandb")
    found = list(records(file))
    run = next(record.run for record in found if record.HasField("run"))
    settings = {item.key: json.loads(item.value_json) for item in run.config.update}
    history = {}
    for record in found:
        if record.HasField("history"):
            items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            history[record.history.step.num] = {name: json.loads(value) for name, value in items.items()}
    return run.run_id, settings, history


def starts(workdir: Path) -> list[Path]:
    return sorted(workdir.glob("wandb/offline-run-*"))


def test_a_run_that_is_stopped_and_continues_is_one_run(folder, tmp_path, offline):
    """Stopped by Ctrl-C, which goes to the terminal's whole group of processes, the library's own among them."""
    workdir = tmp_path / "run"
    settings = tiny_settings(folder, log={"wandb": "moe"})
    command = [sys.executable, str(REPOSITORY / "train.py"), f"--workdir={workdir}", *as_flags(settings)]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=environment(), stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    while not process.stdout.readline().startswith("step 3/"):
        assert process.poll() is None
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=100)[0]
    assert process.returncode == 130 and time.monotonic() - began < 60, output
    assert "stopped; the same command continues" in output

    trained(Config.from_mapping(settings), workdir)
    first, second = map(logged, starts(workdir))
    assert first[0] == second[0] == json.loads((workdir / "run.json").read_text())["run_id"]
    assert first[1]["moe"]["num_experts"] == 8 and first[1]["log"] == {"wandb": "moe"}
    last = max(first[2])
    assert list(first[2]) == list(range(1, last + 1)) and list(second[2]) == list(range(last + 1, 41))
    both = {**first[2], **second[2]}
    for line in metrics(workdir):
        step = line.pop("step")
        assert line.items() <= both[step].items()
    pictures = [values["expert_load/path"] for values in both.values() if "expert_load/path" in values]
    kept = {str(path.relative_to(start / "files")) for start in starts(workdir) for path in start.rglob("*.png")}
    assert len(pictures) == 4 and {*pictures} == kept


@pytest.mark.parametrize("module", [None, types.ModuleType("wandb")], ids=["missing", "a folder of that name"])
def test_what_is_not_installed_is_told_before_anything_is_made(folder, tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, "wandb", module)
    line = refused_training(tiny_config(folder, log={"wandb": "moe"}), tmp_path / "run")
    assert re.match(
        "error: log.wandb is 'moe', but wandb cannot be imported .*: install it with `pip install wandb`", line
    )
    assert not (tmp_path / "run").exists()


def test_a_server_that_does_not_answer_ends_nothing(tmp_path, monkeypatch):
    import wandb

    def fail(**_arguments):
        raise wandb.errors.CommError("no route\nto host")

    monkeypatch.setattr(wandb, "init", fail)
    said = []
    assert open_writers(PROJECT, Run(tmp_path, "1f", False, []), said.append) == {}
    (line,) = said
    assert line.startswith(r"wandb cannot be started (CommError: no route\nto host): training continues without it")


class Online:
    """A run that the server knows, up to step 4; it takes nothing at step 6."""

    starting_step = 5

    def __init__(self, **arguments):
        self.arguments, self.steps, self.codes = arguments, [], []

    def log(self, values, step):
        if step == 6:
            raise BrokenPipeError(32, "Broken pipe")
        self.steps.append((step, *values))

    def finish(self, exit_code):
        self.codes.append(exit_code)


def test_steps_that_the_server_has_are_not_sent_again_and_failures_end_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("wandb.init", Online)
    run = Run(tmp_path, "1f", True, [])
    said = []
    more = open_writers(PROJECT, run, said.append)
    online = more["wandb"]._run
    assert (online.arguments["id"], online.arguments["resume"]) == ("1f", "allow")
    assert online.arguments["name"] is None  # as it is called there by now
    writer = MetricsWriter(tmp_path, 3, said.append, more)
    for step in (4, 5, 6, 7):
        writer.write(step, {"train/loss": 1.0})
    writer._write_all(lambda writer: writer.write_png(8, "expert_load", load_heat_map([[1, 2]])))
    with pytest.raises(ZeroDivisionError):
        try:
            raise ZeroDivisionError
        finally:
            writer.close()
    assert online.steps == [(5, "train/loss"), (7, "train/loss"), (8, "expert_load")] and online.codes == [1]
    assert said == ["wandb cannot be written (Broken pipe): training continues, writing is retried"]
    assert [line["step"] for line in metrics(tmp_path)] == [4, 5, 6, 7]
    new = open_writers(PROJECT, dataclasses.replace(run, resumed=False), said.append)["wandb"]
    new.close()
    assert new._run.arguments["name"] == tmp_path.name and new._run.codes == [0]
