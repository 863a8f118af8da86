"""A checkpoint of a run opened to be looked at: its weights, its text, and a program that fits them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from default_moe.config import Config, flat_items
from default_moe.data import Data, Tokenizer, open_data, tokenizer_from_dict
from default_moe.errors import CheckpointError, ConfigError
from default_moe.processes import distributed
from default_moe.runs.checkpoint import CheckpointStore
from default_moe.runs.progress import Progress
from default_moe.training.program import Program


@dataclass(frozen=True)
class SavedRun:
    """step: of the checkpoint.  variables: the model's collections beside `params`."""

    step: int
    program: Program
    data: Data
    params: Any
    variables: Mapping[str, Any]


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
        distributed.check_same_start({"--workdir": str(workdir.absolute()), "--step": step, **(asked or {})})
        newest = step is None
        step = store.newest_whole() if step is None else step
        meta = store.read_meta(step)
        saved, tokenizer = parse_meta(meta)
        config = override(saved)
        distributed.check_same(dict(flat_items(config.to_dict())), "start the same in every process")
        data = distributed.in_turn(lambda: open_data(config.data, say, tokenizer))
        distributed.check_same({"corpus_hash": data.corpus_hash}, "data must be the same on every host")
        if data.corpus_hash != meta.get("corpus_hash"):
            changes = "; ".join(data.changes_since(str(meta.get("corpus_hash")))) or "no record of that text is left"
            say(f"note: this is not the text that the run was trained on, or another version of it ({changes})")
        program = Program(config, tokenizer.vocab_size, training=training)
        state = program.abstract_state
        wanted = {"params": state.params, "variables": state.variables}
        # An empty part is not what Orbax finds there.
        present = {name: part for name, part in wanted.items() if part}
        restored, _, step = store.restore_for_eval(present, step, or_newest=newest)
    return SavedRun(step, program, data, restored["params"], restored.get("variables", {}))
