"""The report of eval.py: a saved checkpoint evaluated."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from default_moe.config import Config
from default_moe.data import Rows, open_sets
from default_moe.files import write_report
from default_moe.hardware import machine
from default_moe.processes import distributed
from default_moe.runs.evaluation import Evaluation, evaluate
from default_moe.runs.progress import Progress
from default_moe.runs.sampling import Sampling
from default_moe.runs.saved_run import open_saved_run


def run(
    workdir: Path,
    step: int | None,
    prompts: Sequence[str],
    override: Callable[[Config], Config],
    sampling: Sampling = Sampling(),
    stop: Sequence[str] = (),
    prompt_only: bool = False,
) -> int:
    """Evaluate a checkpoint on the whole held-out split, print a table, write `<workdir>/eval/step_N.json`.

    All texts of `eval.sets` are evaluated too. A report on other text than the run's is `step_N_HASH.json`, with the
    beginning of that text's `corpus_hash`.

    Args:
      workdir: of the run.
      step: which checkpoint; None takes the newest that is whole.
      prompts: texts to continue; if empty, eval.prompt.
      override: changes the checkpoint's own config.
      sampling: with the number of tokens and the temperature of the config.
      stop: texts that end what is generated.
      prompt_only: continue the prompts, and neither evaluate nor write a report.

    Returns:
      the exit code, 0. Raises ConfigError or CheckpointError on bad input.

    With several processes only the first one prints and writes.
    """
    say = Progress(0).message

    def on_whole_split(saved: Config) -> Config:
        return override(dataclasses.replace(saved, eval=dataclasses.replace(saved.eval, num_batches=0)))

    asked = {"prompts": list(prompts), "--stop": list(stop), **dataclasses.asdict(sampling)}
    run = open_saved_run(workdir, step, on_whole_split, asked, training=False)
    config = run.program.config
    if not prompt_only:
        sets = distributed.in_turn(
            lambda: open_sets(
                config.eval.globs_by_set, config.data, run.data.tokenizer, config.train.sequence_length, say
            )
        )
        distributed.check_same({name: part.content_hash for name, part in sets.items()}, "eval.sets must be the same")

        def of(rows: Rows) -> Evaluation:
            return evaluate(run.program, run.params, run.variables, rows, config.eval.num_batches)

        result = of(run.data.validation_rows(config.train.sequence_length))
        of_sets = {name: of(part.rows) for name, part in sets.items()}
        say(_table(result, run.step, config) + _table_of_sets(of_sets))
    prompts = prompts or [config.eval.prompt]
    texts, speed = run.sample(prompts, sampling.of(config.eval), stop)
    for prompt, text in zip(prompts, texts, strict=True):
        say(f"\nfrom the prompt {prompt!r}:\n{text}")
    if speed:
        say(f"\n{len(texts)} x {config.eval.sample_tokens} tokens generated at {speed:,.0f} tokens/s")
    if distributed.process_index() == 0 and not prompt_only:
        samples = [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]
        report = {
            "step": run.step,
            **dataclasses.asdict(result),
            "sets": {
                name: {**dataclasses.asdict(found), "hash": sets[name].content_hash} for name, found in of_sets.items()
            },
            "samples": samples,
            "corpus_hash": run.data.corpus_hash,
            "settings": config.to_dict(),
            "machine": machine(),
        }
        file = f"step_{run.step}{'' if run.of_training else f'_{run.data.corpus_hash[:8]}'}.json"
        write_report(workdir / "eval", {file: report})
        say(f"\nwritten to {workdir / 'eval' / file}")
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
    for layer, row in zip(config.model.moe_layers, result.layers, strict=True):
        values = (f"{row[name]:{width}.4g}" for name, width in zip(columns, widths, strict=True))
        lines.append(f"  {layer:5}" + "".join(values))
    return "\n".join(lines)


def _table_of_sets(of_sets: Mapping[str, Evaluation]) -> str:
    """A line for each set, empty if there is none."""
    if not of_sets:
        return ""
    width = max(len(name) for name in ["set", *of_sets])
    lines = [f"\n  {'set':<{width}}    loss  bits per byte      tokens       bytes"]
    for name, found in of_sets.items():
        counts = f"{found.tokens:12,}{found.text_bytes:12,}"
        lines.append(f"  {name:<{width}}{found.loss:8.4f}{found.bits_per_byte:15.4f}{counts}")
    return "\n".join(lines)
