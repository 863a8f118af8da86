"""What a run keeps of its starts: each is added, none is lost, and they tell by which code a run was trained."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.refusals import refused

from default_moe.config import Config
from default_moe.runs import starts
from default_moe.runs.code import running_code
from default_moe.runs.identity import RUN_FILE, mark_saved
from default_moe.runs.starts import commit, differences, starts_of
from default_moe.runs.workdir import open_run

DEFAULT, TOPK = "default_moe/methods/default.py", "default_moe/methods/topk.py"


def begin(workdir: Path, step: int = 0, **sections) -> list[str]:
    """What has changed since the last start of a run that has saved a checkpoint."""
    config = Config.from_mapping(sections)
    with open_run(workdir, config, corpus_hash="abc", vocab_size=257) as run:
        run.begin(step, config)
        mark_saved(workdir)
        assert run.start == read(workdir)["starts"][-1]
        return run.notes


def read(workdir: Path) -> dict:
    return json.loads((workdir / RUN_FILE).read_text())


def change(workdir: Path, *files: str) -> None:
    """Make those files others in the last start, by what run.json says."""
    run = read(workdir)
    last = run["starts"][-1]
    other = f"other {len(run['starts'])}"
    run["code"][other] = {**run["code"][last["code"]], **dict.fromkeys(files, "0" * 12)}
    last["code"] = other
    (workdir / RUN_FILE).write_text(json.dumps(run))


def test_each_start_is_added(tmp_path, monkeypatch):
    begin(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config.train.num_steps=500", "\udcff"])
    begin(tmp_path, 7, train={"num_steps": 500})
    run = read(tmp_path)
    first, second = run["starts"]
    assert (first["from_step"], second["from_step"], second["command"]) == (0, 7, sys.argv)
    assert first["versions"]["python"] == ".".join(map(str, sys.version_info[:3])) and "jax" in first["versions"]
    assert first["commit"] == second["commit"] == commit()
    code = running_code(None)
    assert first["code"] == second["code"] == code.digest and run["code"] == {code.digest: code.digests}
    assert 60 < len(code.digests) < 120 and {len(digest) for digest in code.digests.values()} == {12}
    assert first["time"] <= second["time"] and second["time"].endswith("Z")


# Killed as soon as run.json is written, or before the new one takes the place of the old one.
KILLED = """
import os, pathlib, signal, sys
from default_moe.config import Config
from default_moe.runs.identity import mark_saved
from default_moe.runs.workdir import open_run

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

with open_run(sys.argv[1], Config(), "abc", 257) as run:
    if sys.argv[2] == "while":
        pathlib.Path.replace = kill
    run.begin(0, Config())
    mark_saved(pathlib.Path(sys.argv[1]))
    kill()
"""


def test_the_starts_survive_a_kill(tmp_path):
    lengths = []
    for when in ("after", "while"):
        command = [sys.executable, "-c", KILLED, str(tmp_path), when]
        ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        lengths.append(len(read(tmp_path)["starts"]))
    assert lengths == [1, 1]
    begin(tmp_path)
    assert len(read(tmp_path)["starts"]) == 2


def test_the_starts_of_a_run_that_never_saved_are_kept_if_it_begins_anew(tmp_path):
    def begins(**sections) -> int:
        config = Config.from_mapping(sections)
        with open_run(tmp_path, config, corpus_hash="abc", vocab_size=257) as run:
            run.begin(0, config)
            assert not run.resumed
        return len(read(tmp_path)["starts"])

    assert [begins(), begins(), begins(train={"seed": 2}), begins()] == [1, 2, 1, 1]


def test_a_start_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with open_run(tmp_path, Config(), corpus_hash="abc", vocab_size=257) as run:
        monkeypatch.setattr("default_moe.runs.workdir.write_run", full)
        with refused("run.json cannot be written .No space left on device"):
            run.begin(0, Config())


def test_code_that_differs_since_the_last_start_is_named(tmp_path):
    begin(tmp_path)
    change(tmp_path, TOPK)
    assert begin(tmp_path) == []  # the run's method is another one
    change(tmp_path, TOPK, DEFAULT, "default_moe/moe/gone.py")
    assert begin(tmp_path) == [f"the code ({DEFAULT}, default_moe/moe/gone.py)"]
    assert begin(tmp_path) == []
    run = read(tmp_path)
    assert len(run["starts"]) == 4 and run["history"] == []  # that is of settings
    moe = Config().moe
    assert [differences(run, each, moe) for each in run["starts"]] == [[], [DEFAULT, "default_moe/moe/gone.py"], [], []]
    change(tmp_path, *running_code(None).digests)
    changed = read(tmp_path)
    wanted = differences(changed, changed["starts"][-1], moe)
    [line] = begin(tmp_path)
    assert line.startswith("the code (default_moe/config/__init__.py, ") and len(line) < 400
    named, others = re.fullmatch(r"the code \((.*) and (\d+) more\)", line).groups()
    assert named.split(", ") == wanted[:8] and 8 + int(others) == len(wanted) > 60


@pytest.mark.parametrize("kept", [None, {}, [], [{"from_step": "0"}], ["x"]])
def test_a_run_of_an_earlier_version_goes_on(tmp_path, kept):
    begin(tmp_path)
    run = read(tmp_path)
    run = {**run, "starts": kept, "code": kept}
    run = run if kept is not None else {name: value for name, value in run.items() if name not in ("starts", "code")}
    (tmp_path / RUN_FILE).write_text(json.dumps(run))
    assert starts_of(run, 7) == [{}] and differences(run, {}, Config().moe) is None
    assert begin(tmp_path) == []
    before, now = read(tmp_path)["starts"]
    assert before == {"commit": None, "code": None, "from_step": 0}
    assert differences(read(tmp_path), before, Config().moe) is None
    assert differences(read(tmp_path), now, Config().moe) == []


@pytest.mark.parametrize(
    ("begun", "steps", "trained"),
    [
        ([0], 8, [0]),
        ([0], 0, []),
        ([0, 4], 8, [0, 1]),
        ([0, 0, 4], 8, [1, 2]),  # killed before it had saved
        ([0, 8], 8, [0]),  # there was nothing to do
        ([0, 4, 2], 8, [0, 2]),  # from an earlier checkpoint, as the newest was damaged
        ([100, 104], 108, [0, 1]),  # a branch of another run
        ([0, 4, 8, 4], 8, [0, 3]),
    ],
)
def test_the_starts_that_have_trained_a_run(begun, steps, trained):
    run = {"starts": [{"from_step": step, "number": number} for number, step in enumerate(begun)]}
    assert [each["number"] for each in starts_of(run, steps)] == trained


def test_the_commit_is_that_of_the_checkout(tmp_path, monkeypatch):
    package = tmp_path / "checkout" / "default_moe"
    package.mkdir(parents=True)
    (package / "a.py").write_text("")

    def found(folder: Path) -> str | None:
        monkeypatch.setattr(starts, "__file__", str(folder / "default_moe" / "runs" / "starts.py"))
        return commit.__wrapped__()

    def git(*arguments: str) -> None:
        user = ("-c", "user.name=A", "-c", "user.email=a@b.c")
        subprocess.run(["git", *user, *arguments], cwd=package.parent, check=True, capture_output=True)

    assert found(package.parent) is None
    git("init")
    assert found(package.parent) is None  # without a commit
    git("add", ".")
    git("commit", "-m", "A")
    git("tag", "-a", "v1", "-m", "v1")
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    assert found(package.parent) == "v1"
    (package / "a.py").write_text("x = 1\n")
    assert found(package.parent) == "v1-dirty"
    installed = package.parent / "venv" / "lib"
    (installed / "default_moe").mkdir(parents=True)
    assert found(installed) is None  # in a checkout of something else
    monkeypatch.setenv("PATH", str(tmp_path))
    assert found(package.parent) is None
