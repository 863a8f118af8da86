"""What a person watching a run sees: a progress bar on a terminal, plain lines elsewhere."""

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from default_moe.errors import tell
from default_moe.processes import distributed

_SHOWN = (
    ("train/loss", "loss {:.4f}"),
    ("train/bits_per_byte", "bits/byte {:.2f}"),
    ("train/learning_rate", "lr {:.1e}"),
    ("train/tokens_per_second", "tokens/s {:,.0f}"),
)


class Progress:
    """Shows how far a run of `total_steps` has come, from `start` on. Before that it only prints messages.

    The time left is estimated from the steps after the first, which compiles. With several processes only the first one
    shows anything.
    """

    def __init__(self, total_steps: int, stream: TextIO | None = None):
        self._total = total_steps
        self._stream = stream or sys.stdout  # a program has one, see cli.py
        self._active = distributed.process_index() == 0
        self._first: tuple[int, float] | None = None
        self._bar: Any = None

    def start(self, step: int) -> None:
        """Begins after `step`, with a bar if the stream is a terminal that has a width."""
        if self._active and self._stream.isatty() and shutil.get_terminal_size(fallback=(0, 0)).columns:
            from tqdm import tqdm

            with contextlib.suppress(OSError, ValueError):
                self._bar = tqdm(
                    total=self._total,
                    initial=step,
                    file=self._stream,
                    dynamic_ncols=True,
                    bar_format="{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt}{postfix}",
                )

    def step(self, step: int) -> None:
        """To be called after each step."""
        if self._first is None:
            self._first = (step, time.monotonic())
        self._draw(lambda bar: bar.update(step - bar.n))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows loss, bits per byte, learning rate and tokens/s of a logged step, those of them that there are."""
        parts = [form.format(float(metrics[name])) for name, form in _SHOWN if name in metrics]
        eta = self._eta(step)
        if eta is not None:
            parts.append(f"ETA {_clock(eta)}")
        if self._bar is not None:
            self._draw(lambda bar: bar.set_postfix_str("  ".join(parts)))
        else:
            self.message(f"step {step}/{self._total}  " + "  ".join(parts))

    def message(self, text: str) -> None:
        """Prints lines of text, above the bar if there is one."""
        self._draw(lambda bar: bar.clear())
        if self._active:
            tell(text, self._stream)
        self._draw(lambda bar: bar.refresh())

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._draw(lambda bar: bar.close())

    def _draw(self, change: Callable[[Any], object]) -> None:
        """Change the bar. One that cannot be drawn is given up; no run ends of it."""
        try:
            if self._bar is not None:
                change(self._bar)
        except (OSError, ValueError):
            self._bar = None

    def _eta(self, step: int) -> float | None:
        if self._first is None or step <= self._first[0]:
            return None
        first_step, first_time = self._first
        return (self._total - step) * (time.monotonic() - first_time) / (step - first_step)


def _clock(seconds: float) -> str:
    """3:12, or 1:03:12 from an hour on."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"
