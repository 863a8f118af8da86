"""What a program reports in one line, not with a traceback: what is wrong, and what would be right."""

import contextlib
import difflib
import sys
from collections.abc import Sequence
from typing import TextIO


class ConfigError(ValueError):
    """A setting, a flag or an installation that cannot work."""


class CheckpointError(RuntimeError):
    """No checkpoint can be restored."""


class TrainingFailed(RuntimeError):
    """Training cannot continue. The last checkpoint is intact."""


class Diverged(TrainingFailed):
    """Too many steps in a row whose loss or gradient was not finite."""


class AnotherProcessFailed(RuntimeError):
    """One of the processes that train as one has failed, so this one cannot continue. code: what all exit with."""

    def __init__(self, line: str, code: int):
        super().__init__(line)
        self.code = code


def shown(value: object, longest: int = 200) -> str:
    """Return a value as it may stand in a message: on one line, at most `longest` characters."""
    if isinstance(value, int) and value.bit_length() > 1000:  # Python itself refuses to write some of these
        return f"a number of {value.bit_length()} bits"
    text = printable(str(value)).replace("\n", "\\n").replace("\t", "\\t")
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def quoted(value: object) -> str:
    """Return `shown`, of a text in quotes."""
    if isinstance(value, int):
        return shown(value)
    try:
        return shown(repr(value))
    except (ValueError, RecursionError):  # of numbers that are too long to be written, or of too many brackets
        return f"a {type(value).__name__} too long to be shown"


def printable(text: str) -> str:
    """Return text from outside as it may go to a terminal: control characters but line ends and tabs are escaped."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def tell(text: str, stream: TextIO | None = None) -> None:
    """Print lines of text, to standard error if not told otherwise. A text that cannot be printed is lost: no more."""
    # RuntimeError: a signal's handler interrupts another print. ValueError: the stream is closed.
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        print(printable(text), file=stream or sys.stderr, flush=True)


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    check(value in choices, f"{name} is {quoted(value)}, but must be one of {', '.join(map(repr, choices))}")


def choose(setting: str, asked: str, options: Sequence[tuple[str, str | None]]) -> str:
    """Return what is asked for by name, or with "auto" the first that can be.

    options: pairs of a name and why it cannot be, None if it can; the best first, the last always can be.
    Raises ConfigError if what is asked for cannot be.
    """
    possible = [name for name, why_not in options if not why_not]
    if asked == "auto":
        return possible[0]
    why_not = dict(options)[asked]
    others = " or ".join(map(repr, ["auto", *possible]))
    check(not why_not, f"{setting} is {asked!r}, but {why_not}: use {others}")
    return asked


def closest(name: str, known: list[str]) -> str:
    """'; did you mean ...?' with the known name closest to `name`, or an empty string if none is close."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {shown(repr(match[0]))}?" if match else ""
