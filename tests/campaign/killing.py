"""Commands that are killed at some moment. As a program: a process that has imported everything and forks them off."""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from helpers.tiny_runs import REPOSITORY, become, environment

LONGEST = 120.0  # seconds until a command counts as hanging


class Ended(NamedTuple):
    """codes, outputs: of the commands of a round.  seconds: from the start to the last one's end."""

    codes: list[int]
    outputs: list[str]
    seconds: float


class Launcher:
    """Starts rounds of commands; in each all begin at once."""

    def __init__(self, folder: Path, devices: int):
        """folder: for the cache of compiled programs.  devices: of each process."""
        env = {
            **environment(),
            "JAX_NUM_CPU_DEVICES": str(devices),
            # What is killed while it writes to the cache shall spoil no other's.
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}",
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )

    def __enter__(self) -> "Launcher":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()

    def run(self, *commands: list[str], victim: int = 0, kill: float | None = None, **options: Any) -> Ended:
        """Return how the commands ended.

        kill: seconds after which the victim, a command's number, gets SIGKILL.  words: count them from when it has
        printed this regular expression.  file_size: the largest file that may be written, in bytes.
        """
        order = {"commands": commands, "victim": victim, "kill": kill, **options}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return Ended(*json.loads(self._process.stdout.readline()))


def random_kill(rng: random.Random, whole: float) -> dict[str, Any]:
    """A moment within `whole` seconds, or soon after a step of training."""
    if rng.random() < 0.4:
        return {"kill": rng.uniform(0, whole)}
    return {"kill": rng.uniform(0, 1.5), "words": r"^step \d+/"}


def _round(
    commands: list[list[str]], victim: int, kill: float | None, words: str | None = None, file_size: int | None = None
) -> tuple:
    began = time.monotonic()
    files = [tempfile.TemporaryFile() for _ in commands]  # noqa: SIM115
    children = [_fork(command, file.fileno(), file_size) for command, file in zip(commands, files, strict=True)]
    codes: dict[int, int] = {}
    seen = None if words else began
    while len(codes) < len(children):
        now = time.monotonic()
        if seen is None and re.search(words or "", _text(files[victim]), re.MULTILINE):
            seen = now
        if kill is not None and seen is not None and now - seen >= kill and victim not in codes:
            os.kill(children[victim], signal.SIGKILL)
            kill = None
        if now - began > LONGEST:
            for index, child in enumerate(children):
                if index not in codes:
                    os.kill(child, signal.SIGKILL)
        for index, child in enumerate(children):
            if index not in codes and (ended := os.waitpid(child, os.WNOHANG))[0]:
                codes[index] = os.waitstatus_to_exitcode(ended[1])
        time.sleep(0.005)
    return [codes[index] for index in range(len(children))], [_text(file) for file in files], time.monotonic() - began


def _fork(command: list[str], output: int, file_size: int | None) -> int:
    child = os.fork()
    if child == 0:
        for number in (1, 2):
            os.dup2(output, number)
        if file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
        become(command)
    return child


def _text(file: Any) -> str:
    return os.pread(file.fileno(), 1 << 24, 0).decode(errors="replace")


if __name__ == "__main__":
    replies = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        replies.write(json.dumps(_round(**json.loads(line))) + "\n")
        replies.flush()
