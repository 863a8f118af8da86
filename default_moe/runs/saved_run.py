"""A checkpoint of a run opened to be looked at: its weights, its text, and a program that fits them."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax

from default_moe.config import Config, MeshConfig, flat_items
from default_moe.data import Data, Tokenizer, open_data, tokenizer_from_dict
from default_moe.errors import CheckpointError, ConfigError
from default_moe.processes import distributed
from default_moe.runs.checkpoint import CheckpointStore
from default_moe.runs.progress import Progress
from default_moe.runs.trained_model import TrainedModel
from default_moe.training.program import Program


@dataclass(frozen=True)
class SavedRun(TrainedModel):
    """A trained model, and text to evaluate it on. of_training: whether that is the text of its run."""

    data: Data
    of_training: bool


def parse_meta(meta: Mapping[str, Any]) -> tuple[Config, Tokenizer]:
    """The config and the tokenizer of a checkpoint, by its meta. Raises CheckpointError."""
    try:
        return Config.from_mapping(meta["config"]), tokenizer_from_dict(meta["tokenizer"])
    except KeyError as error:
        raise CheckpointError(f"the checkpoint's meta.json has no {error}") from None
    except ConfigError as error:
        raise CheckpointError(f"the checkpoint's meta.json is not what this version reads: {error}") from None


def open_saved_run(
    workdir: Path,
    step: int | None,
    override: Callable[[Config], Config],
    asked: Mapping[str, Any] | None = None,
    training: bool = True,
) -> SavedRun:
    """Open a checkpoint and the text of its run. With several processes all open it.

    Args:
      workdir: of the run.
      step: which checkpoint; None takes the newest that is whole.
      override: changes the checkpoint's own config.
      asked: flags that must be the same in all processes, by name.
      training: whether training batches must fit the devices too, see `Program`.

    Raises ConfigError or CheckpointError on bad input.
    """
    say = Progress(0).message
    with CheckpointStore(workdir, read_only=True) as store:
        found = _find(store, workdir, step, override, asked)
        config = found.config
        data = distributed.in_turn(lambda: open_data(config.data, say, found.tokenizer))
        distributed.check_same({"corpus_hash": data.corpus_hash}, "data must be the same on every host")
        trained_on = found.meta.get("corpus_hash")
        of_training = data.corpus_hash == trained_on
        if not of_training:
            changes = "; ".join(data.changes_since(str(trained_on))) or "no record of that text is left"
            say(f"note: this is not the text that the run was trained on, or another version of it ({changes})")
        program = Program(config, found.tokenizer.vocab_size, training=training)
        step, params, variables = _restore(store, program, found.step, newest=step is None)
    return SavedRun(step, program, data.tokenizer, params, variables, data, of_training)


def open_model(
    workdir: Path, step: int | None, override: Callable[[Config], Config], asked: Mapping[str, Any] | None = None
) -> TrainedModel:
    """Open a checkpoint as `open_saved_run` does, without the text of its run, which need not be there."""
    with CheckpointStore(workdir, read_only=True) as store:
        found = _find(store, workdir, step, override, asked)
        program = Program(found.config, found.tokenizer.vocab_size, training=False)
        step, params, variables = _restore(store, program, found.step, newest=step is None)
    return TrainedModel(step, program, found.tokenizer, params, variables)


def load(workdir: str | os.PathLike[str], step: int | None = None, mesh: MeshConfig | None = None) -> TrainedModel:
    """Load the model of a run. The text that it was trained on need not be there.

    Args:
      workdir: of the run, or of an imported model.
      step: of the checkpoint; None takes the newest that is whole.
      mesh: how to split the model over all devices; None puts it on the first one.

    Raises ConfigError or CheckpointError if there is no such checkpoint, or it does not fit the devices.
    """
    with CheckpointStore(Path(workdir).expanduser(), read_only=True) as store:
        newest = step is None
        step = store.newest_whole() if step is None else step
        config, tokenizer = parse_meta(store.read_meta(step))
        config = dataclasses.replace(config, mesh=mesh or MeshConfig(data=1))
        program = Program(config, tokenizer.vocab_size, None if mesh else jax.devices()[:1], training=False)
        step, params, variables = _restore(store, program, step, newest)
    return TrainedModel(step, program, tokenizer, params, variables)


def read_earlier(workdir: Path, program: Program, step: int) -> dict[int, Callable[[], tuple[Any, Any]]]:
    """Return by step what reads the parameters and variables of each checkpoint before `step`, on `program`'s devices.

    To be called it raises CheckpointError if that checkpoint is damaged, gone or of another shape.
    """

    def read(earlier: int) -> tuple[Any, Any]:
        with CheckpointStore(workdir, read_only=True) as store:
            return _restore(store, program, earlier, newest=False)[1:]

    with CheckpointStore(workdir, read_only=True) as store:
        return {earlier: functools.partial(read, earlier) for earlier in store.steps() if earlier < step}


class _Found(NamedTuple):
    """A checkpoint that has not been read yet. config: with what the user changed."""

    step: int
    meta: Mapping[str, Any]
    config: Config
    tokenizer: Tokenizer


def _find(
    store: CheckpointStore,
    workdir: Path,
    step: int | None,
    override: Callable[[Config], Config],
    asked: Mapping[str, Any] | None,
) -> _Found:
    """The checkpoint that `open_saved_run` is asked for, the same in all processes."""
    distributed.check_same_start({"--workdir": str(workdir.absolute()), "--step": step, **(asked or {})})
    step = store.newest_whole() if step is None else step
    meta = store.read_meta(step)
    saved, tokenizer = parse_meta(meta)
    config = override(saved)
    distributed.check_same(dict(flat_items(config.to_dict())), "start the same in every process")
    return _Found(step, meta, config, tokenizer)


def _restore(store: CheckpointStore, program: Program, step: int, newest: bool) -> tuple[int, Any, Mapping[str, Any]]:
    """The step that was read, parameters and other variables of the program's model."""
    state = program.abstract_state
    wanted = {"params": state.params, "variables": state.variables}
    # An empty part is not what Orbax finds there.
    present = {name: part for name, part in wanted.items() if part}
    restored, _, step = store.restore_for_eval(present, step, or_newest=newest)
    return step, restored["params"], restored.get("variables", {})
