"""Evaluating a saved checkpoint: the report of eval.py."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from default_moe.config import Config, flat_items
from default_moe.data import open_data, tokenizer_from_dict
from default_moe.errors import ConfigError
from default_moe.processes import distributed
from default_moe.runs.checkpoint import CheckpointStore
from default_moe.runs.evaluation import Evaluation, evaluate
from default_moe.runs.files import finite_or_null, write_atomically
from default_moe.runs.progress import Progress
from default_moe.runs.sampling import sample_text
from default_moe.training.program import Program


def run(workdir: Path, step: int | None, prompt: str | None, override: Callable[[Config], Config]) -> int:
    """Evaluate a checkpoint on the whole held-out split, print a table, write `<workdir>/eval/step_N.json`.

    Args:
      workdir: of the run.
      step: which checkpoint; None takes the newest that is whole.
      prompt: text to continue; None takes eval.prompt.
      override: changes the checkpoint's own config.

    Returns:
      the exit code, 0. Raises ConfigError or CheckpointError on bad input.

    With several processes only the first one prints and writes.
    """
    say = Progress(0).message
    with CheckpointStore(workdir, read_only=True) as store:
        meta = store.read_meta(step)
        saved = Config.from_mapping(meta["config"])
        whole_split = dataclasses.replace(saved, eval=dataclasses.replace(saved.eval, num_batches=0))
        config = override(whole_split)
        asked = {"--workdir": str(workdir.absolute()), "--step": step, "--prompt": prompt}
        distributed.check_same_start({**asked, **dict(flat_items(config.to_dict()))})
        tokenizer = tokenizer_from_dict(meta["tokenizer"])
        data = distributed.in_turn(lambda: open_data(config.data, say, tokenizer))
        distributed.check_same({"corpus_hash": data.corpus_hash}, "data must be the same on every host")
        if data.corpus_hash != meta["corpus_hash"]:
            say("note: this is not the text that the run was trained on, or another version of it")
        program = Program(config, tokenizer.vocab_size, training=False)
        state = program.abstract_state
        wanted = {"params": state.params, "variables": state.variables}
        restored, _, step = store.restore_for_eval(wanted, step)
    rows = data.validation_rows(config.train.sequence_length)
    result = evaluate(program, restored["params"], restored["variables"], rows, config.eval.num_batches)
    prompt = config.eval.prompt if prompt is None else prompt
    text = sample_text(program, restored["params"], restored["variables"], tokenizer, prompt)
    say(_table(result, step, config))
    say(f"\nfrom the prompt {prompt!r}:\n{text}")
    if distributed.process_index() > 0:
        return 0
    path = workdir / "eval" / f"step_{step}.json"
    report = finite_or_null({"step": step, **dataclasses.asdict(result), "prompt": prompt, "sample": text})
    try:
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, json.dumps(report, indent=1))
    except OSError as error:
        raise ConfigError(f"the report cannot be written to {path}: {error.strerror}") from error
    say(f"\nwritten to {path}")
    return 0


def _table(result: Evaluation, step: int, config: Config) -> str:
    """Held-out figures, and a line per MoE layer."""
    lines = [
        f"step {step}, {config.data.name}, {result.tokens:,} held-out tokens, {result.text_bytes:,} bytes",
        f"  loss           {result.loss:.4f} nats per token",
        f"  perplexity     {result.perplexity:.4f}",
        f"  bits per byte  {result.bits_per_byte:.4f}",
    ]
    columns = [name for name in (result.layers or [{}])[0] if name != "tokens_per_expert"]
    if columns:
        widths = [max(len(name) + 2, 12) for name in columns]
        lines.append("  layer" + "".join(f"{name:>{width}}" for name, width in zip(columns, widths, strict=True)))
    for index, row in enumerate(result.layers, config.model.num_dense_layers):
        values = (f"{row[name]:{width}.4g}" for name, width in zip(columns, widths, strict=True))
        lines.append(f"  {index:5}" + "".join(values))
    return "\n".join(lines)
