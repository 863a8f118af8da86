"""Runs that are killed at random moments, share a folder, fill a disk, or go on for long."""

import os
import random
import re
import shutil
import subprocess
import sys
import time

import pytest
from campaign.killing import LONGEST, Ended, Launcher, random_kill
from helpers.joining import free_port, with_flags
from helpers.tiny_runs import (
    REPOSITORY,
    as_flags,
    assert_same_state,
    environment,
    metrics,
    steps,
    tiny_settings,
    write_corpus,
)

pytestmark = pytest.mark.campaign

LAST = 40
METHODS = {
    "default": {"router": "default", "default": {"substitute_ramp_steps": 20}},
    "loss_free": {"router": "loss_free"},
    "remoe": {"router": "remoe"},
}
KILLS = int(os.environ.get("CAMPAIGN_KILLS", "25"))  # of each method, and of two processes


def command(folder, workdir, moe=None, **sections) -> list[str]:
    settings = tiny_settings(folder, **{"moe": moe or {}, "checkpoint": {"every_steps": 2}, **sections})
    return ["train.py", f"--workdir={workdir}", *as_flags(settings)]


def check_quiet(ended: Ended) -> None:
    assert ended.seconds < LONGEST, ended.outputs
    for output in ended.outputs:
        assert "Traceback" not in output, output


def kill_until_done(start, workdir, expected, rng, whole, kills) -> int:
    """Kill a run again and again until one start is let be or ends by itself. Returns how often it was."""
    count = 0
    while count < kills:
        ended = start(workdir, **random_kill(rng, whole))
        check_quiet(ended)
        if -9 not in ended.codes:
            break
        count += 1
    else:
        ended = start(workdir)
        check_quiet(ended)
    assert set(ended.codes) == {0}, ended.outputs
    assert_same_state(workdir, expected, LAST)
    assert metrics(workdir) == metrics(expected)
    return count


def kill_often(start, folder, rng) -> None:
    expected = folder / "whole"
    start(expected)
    whole = start(folder / "whole_again").seconds
    assert_same_state(folder / "whole_again", expected, LAST)
    left = KILLS
    chains = 0
    while left:
        chains += 1
        left -= kill_until_done(start, folder / f"run_{chains}", expected, rng, whole, left)
    print(f"{KILLS} kills in {chains} runs: 0 bits different")


@pytest.mark.parametrize("method", METHODS)
def test_kills_at_random_moments(folder, tmp_path, method):
    rng = random.Random(f"{method} {os.environ.get('CAMPAIGN_SEED', '')}")
    with Launcher(tmp_path, devices=8) as launcher:
        kill_often(
            lambda workdir, **kill: launcher.run(command(folder, workdir, METHODS[method]), **kill), tmp_path, rng
        )


def test_kills_of_one_of_two_processes(folder, tmp_path):
    rng = random.Random(f"two {os.environ.get('CAMPAIGN_SEED', '')}")

    def start(workdir, **kill):
        port = free_port()
        line = [*command(folder, workdir, METHODS["default"]), "--start_timeout=30"]
        both = [[*line, *with_flags(index, port)[0]] for index in range(2)]
        return launcher.run(*both, victim=rng.randrange(2), **kill)

    with Launcher(tmp_path, devices=1) as launcher:
        kill_often(start, tmp_path, rng)


def test_two_runs_at_once_in_one_folder(folder, tmp_path):
    with Launcher(tmp_path, devices=8) as launcher:
        check_quiet(launcher.run(command(folder, tmp_path / "alone")))
        for number in range(5):
            workdir = tmp_path / f"run_{number}"
            ended = launcher.run(command(folder, workdir), command(folder, workdir))
            check_quiet(ended)
            assert sorted(ended.codes) == [0, 2]
            refused = ended.outputs[ended.codes.index(2)]
            assert refused.splitlines()[-1].startswith("error: another process is training in the work directory")
            assert_same_state(workdir, tmp_path / "alone", LAST)


def test_preparing_data_while_another_that_prepares_it_is_killed(tmp_path):
    rng = random.Random(3)
    write_corpus(tmp_path / "text", files=400)
    data = {"tokenizer": "bpe:400"}
    short = {"num_steps": 2, "batch_size": 8, "sequence_length": 32}

    def both(workdirs):
        commands = [command(tmp_path, workdir, data=data, train=short) for workdir in workdirs]
        return [[*line, f"--config.data.dir={tmp_path / 'prepared'}"] for line in commands]

    with Launcher(tmp_path, devices=8) as launcher:
        check_quiet(launcher.run(*both([tmp_path / "alone"])))
        for number in range(10):
            shutil.rmtree(tmp_path / "prepared")
            workdirs = [tmp_path / f"{name}_{number}" for name in "ab"]
            ended = launcher.run(*both(workdirs), victim=1, kill=rng.uniform(0, 2))
            check_quiet(ended)
            assert ended.codes[0] == 0, ended.outputs[0]
            assert_same_state(workdirs[0], tmp_path / "alone", 2)


@pytest.mark.parametrize("size", [0, 100, 1_000, 3_000, 10_000, 30_000, 100_000])
def test_a_disk_that_is_full_from_some_size_of_file_on(folder, tmp_path, size):
    """The run ends with a line, or goes on; afterwards the same command brings it to the same end."""
    with Launcher(tmp_path, devices=8) as launcher:
        check_quiet(launcher.run(command(folder, tmp_path / "alone")))
        full = launcher.run(command(folder, tmp_path / "run"), file_size=size)
        check_quiet(full)
        errors = [line for line in full.outputs[0].splitlines() if line.startswith("error: ")]
        assert len(errors) == (full.codes != [0]) and full.codes[0] in (0, 1, 2), full.outputs[0]
        after = launcher.run(command(folder, tmp_path / "run"))
        assert after.codes == [0], after.outputs[0]
        assert_same_state(tmp_path / "run", tmp_path / "alone", LAST)
        assert not list((tmp_path / "run" / "checkpoints").glob("*.saving"))


def test_memory_stays_flat(folder, tmp_path):
    """Over 3,000 steps, with a save every 50 and an evaluation every 100."""
    more = {"train": {"num_steps": 3000, "log_every_steps": 50}, "checkpoint": {"every_steps": 50}}
    line = command(folder, tmp_path / "run", eval={"every_steps": 100, "num_batches": 2}, **more)
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, str(REPOSITORY / line[0]), *line[1:]], env=environment(), stdout=output, cwd=REPOSITORY
        )
    resident: dict[int, int] = {}
    while process.poll() is None:
        logged = re.findall(r"^step (\d+)/", (tmp_path / "output").read_text(), re.MULTILINE)
        kilobytes = _resident(process.pid)
        if logged and kilobytes:
            resident.setdefault(int(logged[-1]), kilobytes)
            last = kilobytes
        time.sleep(0.05)
    assert process.returncode == 0
    assert steps(tmp_path / "run")[-1] == 3000
    begin = resident[min(step for step in resident if step >= 200)]
    print(f"resident after 200 steps {begin / 1024:.0f} MiB, at the end {last / 1024:.0f} MiB: {last / begin:.3f}")
    assert last < 1.03 * begin


def _resident(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/status") as status:
            return int(re.search(r"VmRSS:\s+(\d+)", status.read())[1])
    except (OSError, TypeError):
        return 0
