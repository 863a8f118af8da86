"""Runs whose output cannot be printed, or whose folders cannot be read or written."""

import re
import shutil
import sys

import pytest
from helpers.checkpoints import biggest_file, flip_a_bit
from helpers.tiny_runs import (
    REPOSITORY,
    as_flags,
    assert_same_state,
    content,
    environment,
    run_commands,
    steps,
    tiny_settings,
    trained,
)

from default_moe import cli
from default_moe.config import Config
from default_moe.errors import tell

LAST = 6


@pytest.fixture(scope="module")
def settings(folder):
    return tiny_settings(
        folder,
        train={"num_steps": LAST},
        moe={"router": "topk"},
        checkpoint={"every_steps": 2},
        eval={"num_batches": 1},
    )


@pytest.fixture(scope="module")
def finished(folder, settings):
    trained(Config.from_mapping(settings), folder / "finished")
    return folder / "finished"


@pytest.mark.parametrize("output", ["full", "pipe", "closed"])
def test_a_run_that_cannot_print_goes_on(folder, settings, finished, output):
    workdir = folder / output
    command = ["train.py", f"--workdir={workdir}", *as_flags(settings)]
    [(code, _, errors)] = run_commands([command], REPOSITORY, environment(), output)
    assert (code, errors) == (0, "")
    assert steps(workdir) == steps(finished)
    assert_same_state(workdir, finished, LAST)


def test_an_evaluation_that_nobody_reads_ends_quietly(finished, tmp_path):
    """As in `eval.py --workdir=... | head -1`: its report is written all the same."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    [(code, _, errors)] = run_commands([["eval.py", f"--workdir={workdir}"]], REPOSITORY, environment(), "pipe")
    assert (code, errors) == (0, "")
    assert (workdir / "eval" / f"step_{LAST}.json").is_file()


def test_what_cannot_be_printed_is_lost_and_no_more(monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    cli._open_streams()  # as in a program that was started without
    tell("nobody hears this")
    print("nor this")
    assert capfd.readouterr() == ("", "")


def test_text_from_outside_changes_no_terminal(capsys):
    tell("a\x1b]0;title\x07b\r\x00\tc\nd \u202e\udcff é")
    assert capsys.readouterr().err == "a\\x1b]0;title\\x07b\\r\\x00\tc\nd \\u202e\\udcff é\n"


def lock_checkpoints(workdir):
    (workdir / "checkpoints").chmod(0)


def lock_the_newest(workdir):
    (workdir / "checkpoints" / str(LAST)).chmod(0)


def damage_and_lock(workdir):
    flip_a_bit(biggest_file(workdir / "checkpoints" / str(LAST)))
    for path in (workdir, workdir / "checkpoints"):
        path.chmod(0o555)


def unlock(workdir):
    for path in (workdir, workdir / "checkpoints", *(workdir / "checkpoints").glob("*")):
        path.chmod(0o755)


# What is done, the exit codes of train.py and eval.py, and what they say.
PLACES = {
    "checkpoints": (
        lock_checkpoints,
        [2, 2],
        [r"^error: the checkpoints in .* cannot be read \(Permission denied\)"] * 2,
    ),
    "a step": (
        lock_the_newest,
        [0, 0],
        [
            r"is damaged .* Permission denied.*\n.*moved to .*6\.damaged\n.*\n*workdir: .*, continuing from step 4",
            r"is damaged .* Permission denied",
        ],
    ),
    "all": (
        damage_and_lock,
        [2, 2],
        [
            r"^error: the work directory .* cannot be written \(Permission denied\)",
            "^error: the report cannot be written",
        ],
    ),
}


@pytest.fixture(scope="module")
def answers(folder, settings, finished):
    """Exit code, output and errors of train.py and eval.py, and what they left, for each place."""
    workdirs = {name: shutil.copytree(finished, folder / name.replace(" ", "_")) for name in PLACES}
    commands = []
    for name, workdir in workdirs.items():
        PLACES[name][0](workdir)
        evaluation = ["eval.py", f"--workdir={workdir}", "--config.eval.num_batches=1"]
        # Evaluated first: training mends what it can.
        commands += [evaluation, ["train.py", f"--workdir={workdir}", *as_flags(settings)]]
    results = iter(run_commands(commands, REPOSITORY, environment()))
    answers = {name: (next(results), next(results)) for name in PLACES}
    for workdir in workdirs.values():
        unlock(workdir)
    return answers, workdirs


@pytest.mark.parametrize("name", PLACES)
def test_folders_that_may_not_be_read_or_written(answers, finished, name):
    results, workdirs = answers
    _, codes, words = PLACES[name]
    evaluated, training = results[name]
    for (code, out, err), wanted, said in zip((training, evaluated), codes, words, strict=True):
        assert code == wanted, err
        assert re.search(said, out + err if code == 0 else err, re.MULTILINE), out + err
        assert "Traceback" not in err and err.count("error: ") == (code != 0)
    if name == "a step":
        assert steps_with_others(workdirs[name]) == ["2", "4", "6", "6.damaged"]
    else:
        shutil.rmtree(workdirs[name] / "eval", ignore_errors=True)
        assert len(content(workdirs[name])) == len(content(finished))


def steps_with_others(workdir):
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())
