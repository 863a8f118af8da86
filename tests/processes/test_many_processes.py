"""Two processes that train as one: the same losses as in one process, the same stops, and one end for both."""

import contextlib
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import pytest
from helpers.joining import free_port, with_flags
from helpers.tiny_runs import (
    REPOSITORY,
    as_flags,
    assert_same_state,
    environment,
    metrics,
    run_commands,
    steps,
    tiny_settings,
    write_corpus,
)

from default_moe.processes import distributed

LAST = 40
SETTINGS = {
    "model": {"num_layers": 1, "num_dense_layers": 0},
    "train": {"num_steps": LAST},
    "checkpoint": {"every_steps": 1000},
    "eval": {"every_steps": LAST, "num_batches": 0},
}
LONGEST = 120  # seconds that any command may take


def on_slurm(index: int, port: int) -> tuple[list[str], dict[str, str]]:
    """As `with_flags`, in a step that srun started."""
    number = str(index)
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_PROCID": number}
    job = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": number, "JAX_COORDINATOR_PORT": str(port)}
    return [], step | job


class Processes:
    """A command in processes that have two devices together, and what they print."""

    def __init__(self, folder: Path, command: list[str], more: list[str], cwds: list[Path], joined: Any):
        """more: flags of all but the first.  cwds: where each is started."""
        port, count = free_port(), len(cwds)
        self._outputs = [folder / f"output_{port}_{index}" for index in range(count)]
        self._last = time.monotonic() + LONGEST
        self.processes = []
        # Some are killed while they write to the cache of compiled programs.
        env = {
            **environment(),
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_NUM_CPU_DEVICES": f"{2 // count}",
        }
        for index, cwd in enumerate(cwds):
            flags, variables = joined(index, port) if count > 1 else ([], {})
            line = [sys.executable, *command, *flags, *(more if index else [])]
            with self._outputs[index].open("w") as output:
                options = {"cwd": cwd, "env": {**env, **variables}, "stdout": output, "stderr": subprocess.STDOUT}
                self.processes.append(subprocess.Popen(line, **options))

    def output(self, index: int) -> str:
        return self._outputs[index].read_text()

    def wait_for_step(self, step: int) -> None:
        """Returns when that step is logged."""
        self.wait_for(f"step {step}/")

    def wait_for(self, words: str) -> None:
        """Returns when process 0 has printed a line that begins with them."""
        while not re.search(f"^{words}", self.output(0), re.MULTILINE):
            assert all(process.poll() is None for process in self.processes), self.output(0)
            assert time.monotonic() < self._last
            time.sleep(0.01)

    def wait_for_port(self, port: int) -> None:
        """Returns when process 0 listens there."""
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                return
            assert time.monotonic() < self._last
            time.sleep(0.05)

    def wait(self, seconds: float = LONGEST) -> tuple[list[int], list[str]]:
        """Exit codes and outputs of all, which must end in that time."""
        last = time.monotonic() + seconds
        codes = [process.wait(timeout=max(last - time.monotonic(), 0)) for process in self.processes]
        return codes, [self.output(index) for index in range(len(codes))]


@contextlib.contextmanager
def started(
    folder: Path,
    workdir: Path,
    program: str = "train.py",
    flags: Sequence[str] = (),
    more: Sequence[str] = (),
    cwds: Sequence[Path] = (REPOSITORY, REPOSITORY),
    joined: Any = with_flags,
) -> Iterator[Processes]:
    """Processes of which nothing is left afterwards: two, or as many as `cwds`."""
    settings = as_flags(tiny_settings(folder, **SETTINGS)) if program == "train.py" else []
    command = [str(REPOSITORY / program), f"--workdir={workdir}", *settings, *flags]
    both = Processes(folder, command, list(more), list(cwds), joined)
    try:
        yield both
    finally:
        for process in both.processes:
            process.kill()
            process.wait()
        last = time.monotonic() + 5
        while time.monotonic() < last and running(workdir):
            time.sleep(0.05)
        assert not running(workdir)


def running(workdir: Path) -> list[str]:
    """The commands under way that name the work directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_text())
    return [command for command in found if f"--workdir={workdir}\0" in command]


def errors(output: str) -> list[str]:
    """The lines that say what is wrong; nothing else may."""
    assert "Traceback" not in output and "stack trace" not in output, output
    return [line for line in output.splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="module")
def alone(folder):
    """The run of one process."""
    with started(folder, folder / "alone", cwds=[REPOSITORY]) as one:
        codes, outputs = one.wait()
    assert codes == [0], outputs
    return folder / "alone"


@pytest.fixture(scope="module")
def moved(folder):
    """A run begun by two processes, of which SIGTERM reached the second; gone on with by one, and stopped; then by two,
    of which the first was killed, and again by two, of which the second was; then by two, of which SIGTERM reached the
    second before the first step; and brought to its end by two.

    Its work directory, and of each part the exit codes, what was printed, and the newest step saved.
    """
    workdir = folder / "moved"
    parts = []

    def part(codes, outputs):
        parts.append((codes, outputs, steps(workdir)[-1]))

    with started(folder, workdir) as both:
        both.wait_for_step(1)
        both.processes[1].terminate()
        part(*both.wait())
    saved = parts[-1][2]
    with started(folder, workdir, cwds=[REPOSITORY]) as one:
        one.wait_for_step(saved + 1)
        one.processes[0].terminate()
        part(*one.wait())
    saved = parts[-1][2]
    for killed in range(2):
        with started(folder, workdir) as both:
            both.wait_for_step(saved + 2)
            both.processes[killed].kill()
            part(*both.wait(seconds=30))
    with started(folder, workdir) as both:
        both.wait_for("devices: ")
        both.processes[1].terminate()
        part(*both.wait())
    with started(folder, workdir, flags=["--config.checkpoint.every_minutes=0.001"]) as both:
        part(*both.wait())
    return workdir, parts


def test_sigterm_to_one_process_saves_the_same_step_in_both(moved):
    _, [(codes, (first, second), saved), *_] = moved
    assert codes == [0, 0], first
    assert re.findall(r"^step (\d+)/", first, re.MULTILINE)[-1] == str(saved)
    assert 1 < saved < LAST - 5
    assert "continues from the last checkpoint" in first
    assert "devices: 2 x cpu" in first
    rest = [line for line in second.splitlines() if "[Gloo]" not in line]
    assert all("SIGTERM caught" in line for line in rest), rest


def test_sigterm_before_the_first_step_of_a_continued_run_is_not_lost(moved):
    codes, (first, _), saved = moved[1][4]
    assert codes == [0, 0], first
    assert "continues from the last checkpoint" in first and saved <= moved[1][1][2] + 10


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other_with_one_line(moved, killed):
    codes, outputs, _ = moved[1][2 + killed]
    assert codes[killed] == -signal.SIGKILL and codes[1 - killed] == 1
    (error,) = errors(outputs[1 - killed])
    assert "another process is gone" in error and "continues from the last checkpoint" in error


def test_a_run_goes_on_in_another_number_of_processes_and_after_a_kill(moved, alone):
    workdir, parts = moved
    saved = [part[2] for part in parts]
    assert saved[0] < saved[1] < LAST - 5 and saved[1:4] == 3 * saved[1:2]
    assert saved[1] < saved[4] < LAST == saved[5]
    for part, start in zip(parts[1:], saved, strict=False):
        assert f"continuing from step {start}" in part[1][0]
    assert parts[1][0] == [0] and parts[5][0] == [0, 0]
    assert f"done: everything is in {workdir}" in parts[5][1][0]
    # Bit for bit: a sum of two parts, one from each device, is the same whichever way they come together.
    assert metrics(workdir) == metrics(alone)
    assert_same_state(workdir, alone, LAST)
    assert saved[4] < steps(workdir)[0] < steps(workdir)[1] < LAST  # those of the last part, saved by the clock


def test_two_processes_evaluate_as_one_does(folder, moved):
    workdir, _ = moved
    with started(folder, workdir, "eval.py") as both:
        codes, (first, second) = both.wait()
    assert codes == [0, 0], first
    report = json.loads((workdir / "eval" / f"step_{LAST}.json").read_text())
    assert report["loss"] == pytest.approx(metrics(workdir)[-1]["eval/loss"], rel=1e-6)
    assert first.count(f"step {LAST}, text_files") == 1 and "text_files" not in second


# What cannot start


def assert_all_end(both: Processes, process: int | None, words: str) -> None:
    """Both with exit code 2 and one line, which names the process and says that."""
    codes, outputs = both.wait(seconds=60)
    assert codes == [2, 2], outputs
    for index, output in enumerate(outputs):
        (error,) = errors(output)
        assert error.startswith(f"error: process {index if process is None else process}: ") and words in error


def test_processes_with_other_settings_all_say_how_they_differ(folder, tmp_path):
    """Started as SLURM does it."""
    more = ["--config.train.seed=7", "--config.moe.top_k=1"]
    with started(folder, tmp_path / "run", more=more, joined=on_slurm) as both:
        assert_all_end(
            both,
            None,
            "moe.top_k is 2 in process 0 but 1 in process 1; train.seed is 1 in process 0 but 7 in process 1",
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "process", "words"), [(None, 1, "names no file"), (3, None, "corpus_hash is ")], ids=["missing", "other"]
)
def test_text_that_one_host_lacks_or_has_otherwise(folder, tmp_path, text, process, words):
    (tmp_path / "here").mkdir()
    if text:
        write_corpus(tmp_path / "here" / "text", seed=text)
    flags = [f"--config={REPOSITORY}/configs/quickstart.py", "--config.data.files=text/*.txt"]
    with started(folder, tmp_path / "run", flags=flags, cwds=[folder, tmp_path / "here"]) as both:
        assert_all_end(both, process, words)
    assert not (tmp_path / "run").exists()


def test_a_work_directory_in_use_ends_both(folder, tmp_path):
    """Only process 0 looks whether it is."""
    (tmp_path / "run").mkdir()
    descriptor = os.open(tmp_path / "run", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with started(folder, tmp_path / "run") as both:
        assert_all_end(both, 0, "another process is training in the work directory")
    os.close(descriptor)
    assert list((tmp_path / "run").iterdir()) == []


def test_ctrl_c_ends_a_process_that_waits_for_the_others(folder, tmp_path):
    port = free_port()
    here = lambda index, _: with_flags(index, port)  # noqa: E731
    with started(folder, tmp_path / "run", cwds=[REPOSITORY] * 2, joined=here) as both:
        both.processes[1].kill()
        both.wait_for_port(port)
        both.processes[0].send_signal(signal.SIGINT)
        code, output = both.processes[0].wait(timeout=20), both.output(0)
    assert code == 130 and errors(output) == ["error: interrupted before the run began"]


MEET = "the 2 processes did not all meet at 127.0.0.1:{free} within 1 s"
FLAGS = {
    "nobody there": (["--coordinator=127.0.0.1:{free}", "--num_processes=2", "--process_id=1"], MEET),
    "nobody comes": (["--coordinator=127.0.0.1:{free}", "--num_processes=2", "--process_id=0"], MEET),
    "a port in use": (
        ["--coordinator=127.0.0.1:{used}", "--num_processes=2", "--process_id=0"],
        "port {used} is in use",
    ),
    "no coordinator": (["--num_processes=2", "--process_id=0"], "must come with --coordinator"),
    "no number": (["--coordinator=127.0.0.1:1"], "must come with --num_processes and --process_id"),
    "no port": (["--coordinator=there", "--num_processes=2", "--process_id=0"], "must be HOST:PORT"),
    "a number too large": (["--coordinator=there:1", "--num_processes=2", "--process_id=2"], "must lie between 0 and"),
    "no one": (["--coordinator=there:1", "--num_processes=0", "--process_id=0"], "must be at least 1"),
    "an interactive shell of a SLURM job": (["--config.moe.top_k=0"], "moe.top_k is 0"),
}


@pytest.fixture(scope="module")
def answers(folder):
    """Exit code, output and errors of each command, in a SLURM job of two tasks but not started by srun."""
    job = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    with socket.create_server(("", 0)) as server:
        ports = {"free": free_port(), "used": server.getsockname()[1]}
        commands = [
            ["train.py", "--start_timeout=1", f"--workdir={folder}/none", *(flag.format(**ports) for flag in flags)]
            for flags, _ in FLAGS.values()
        ]
        results = run_commands(commands, REPOSITORY, {**environment(), **job})
    assert not running(folder / "none")
    return ports, dict(zip(FLAGS, results, strict=True))


@pytest.mark.parametrize("name", FLAGS)
def test_flags_that_join_nobody_get_one_line(answers, name):
    ports, results = answers
    code, _, printed = results[name]
    assert code == 2, printed
    assert printed.startswith("error: ") and printed.count("\n") == 1, printed
    assert FLAGS[name][1].format(**ports) in printed


def test_an_error_is_one_line_even_if_nobody_is_left_to_ask(monkeypatch, capsys):
    """Process 0 was killed: a computation with it breaks off, and so does the question whether another failed."""

    class Link:
        index, failure = 1, None

        def look(self):
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: recvmsg:Connection reset by peer")

        def tell(self, topic, text):
            self.look()

        def end(self, line, code, until_heard):
            raise SystemExit(f"{code}: {line}")

    monkeypatch.setattr(distributed, "_processes", Link())
    with pytest.raises(SystemExit, match="1: process 1: another process is gone"):
        distributed.fail_after(jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer"))
    assert capsys.readouterr().err == ""
