"""Where a run's metrics go beside its own files: Weights & Biases."""

import importlib
import io
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax

from default_moe.config import Config
from default_moe.errors import ConfigError, shown
from default_moe.runs.metrics import Writer
from default_moe.runs.workdir import Run

_UPLOAD_SECONDS = 60.0  # for what has not been sent when the run ends; it stays on the disk if they do not suffice


def check_writers(config: Config) -> None:
    """Raises ConfigError if a setting of `log` needs a package that is not there."""
    if config.log.wandb and jax.process_index() == 0:
        try:
            importlib.import_module("wandb").init  # noqa: B018 - a folder of runs is a module of that name, an empty one
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"log.wandb is {shown(repr(config.log.wandb))}, but wandb cannot be imported ({shown(error)}): install "
                "it with `pip install wandb`, or leave log.wandb unset"
            ) from None


def open_writers(config: Config, run: Run, report: Callable[[str], None]) -> dict[str, Writer]:
    """Return the writers that settings of `log` ask for, by name, in the process that writes.

    report: takes a line about one that cannot be opened, and is left out.
    """
    if not config.log.wandb or jax.process_index() > 0:
        return {}
    try:
        return {"wandb": WandbWriter(config, run)}
    except Exception as error:  # whatever happens on the way to a server
        reason = shown(f"{type(error).__name__}: {error}")
        report(f"wandb cannot be started ({reason}): training continues without it; WANDB_MODE=offline needs no server")
        return {}


class WandbWriter:
    """The run in Weights & Biases that has the id of ours, so that it goes on there where it continues here."""

    def __init__(self, config: Config, run: Run):
        import wandb

        self._run = wandb.init(
            project=config.log.wandb,
            id=run.id,
            name=None if run.resumed else run.workdir.name,  # it may have been renamed there since
            resume="allow",
            dir=run.workdir,
            config=config.to_dict(),
            allow_val_change=True,
            settings=wandb.Settings(console="off", finish_timeout=_UPLOAD_SECONDS),
        )

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._log(step, values)

    def write_png(self, step: int, tag: str, png: bytes) -> None:
        import wandb
        from PIL import Image

        self._log(step, {tag: wandb.Image(Image.open(io.BytesIO(png)))})

    def close(self) -> None:
        self._run.finish(exit_code=int(sys.exc_info()[0] is not None))

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        if step >= self._run.starting_step:  # wandb has the steps before, and would warn of each
            self._run.log(dict(values), step=step)
