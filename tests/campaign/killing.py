"""Commands that are killed at some moment. As a program: a process that has imported everything and forks them off."""

import contextlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
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
    outputs = [_Output() for _ in commands]
    children = [_fork(command, output, file_size) for command, output in zip(commands, outputs, strict=True)]
    codes: dict[int, int] = {}
    seen = None if words else began
    while len(codes) < len(children):
        now, texts = time.monotonic(), [output.text() for output in outputs]
        if seen is None and re.search(words or "", texts[victim], re.MULTILINE):
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
    texts = [output.text() for output in outputs]
    for output in outputs:
        os.close(output.reader)
    return [codes[index] for index in range(len(children))], texts, time.monotonic() - began


class _Output:
    """What a command prints: through a pipe, for which no limit of files holds."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        self._read = b""

    def text(self) -> str:
        """So far."""
        with contextlib.suppress(BlockingIOError):
            while more := os.read(self.reader, 1 << 16):
                self._read += more
        return self._read.decode(errors="replace")


def _fork(command: list[str], output: _Output, file_size: int | None) -> int:
    child = os.fork()
    if child == 0:
        for number in (1, 2):
            os.dup2(output.writer, number)
        os.close(output.writer)
        if file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
        become(command)
    os.close(output.writer)
    return child


if __name__ == "__main__":
    replies = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        replies.write(json.dumps(_round(**json.loads(line))) + "\n")
        replies.flush()
