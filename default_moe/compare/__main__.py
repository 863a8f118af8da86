"""Which method is better, by how much, with what certainty: `python -m default_moe.compare --config=... --workdir=...`.

Trains every combination of --methods, --seeds and the values of each --set, each seed with the same weights and order
of data for all methods, and writes report.md, report.json and pictures to the work directory. The same command goes
on where it was stopped, and adds what is new to what is done: more seeds, another method. With --shard several
processes share the runs, on one machine or on many with one file system.
"""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from default_moe import cli
from default_moe.compare import matrix, plot, provenance, report, runs
from default_moe.compare.comparison import compare
from default_moe.compare.ladder import check_rungs, ladders
from default_moe.compare.sequential import WidthRule, width_rule
from default_moe.errors import ConfigError, TrainingFailed, check
from default_moe.files import write_report
from default_moe.processes.supervisor import go_on_in_children
from default_moe.runs.identity import RUN_FILE
from default_moe.runs.pictures import picture_files
from default_moe.runs.progress import Progress

_DEFAULT_CONFIG = "configs/compare_small.py"
_CONFIG = config_flags.DEFINE_config_file("config", None, f"Config file; {_DEFAULT_CONFIG} if not given.")
_METHODS = flags.DEFINE_list(
    "methods",
    ["topk", "default"],
    "Values of moe.router, with settings after colons: a method's own (default:substitute=backward) or any "
    "(topk:moe.balancer=quantile); the first is the baseline.",
)
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2", "3"], "Values of train.seed.")
_SET = flags.DEFINE_multi_string(
    "set",
    [],
    "A setting and the values to try, optim.peak_lr=3e-3,6e-3. Those of optim.*, weights of losses, noise and a "
    "method's own (moe.default.*) are each method's to choose: its best counts. Others make tables of their own.",
)
_RUNGS = flags.DEFINE_list(
    "rungs",
    [],
    "A ladder: scales at which all is done, each settings with colons between, model.d_model=32:train.num_steps=300,"
    "model.d_model=64:train.num_steps=600,...; at least three.",
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the comparison; runs/<name of the config> if not given.")
_SHARD = flags.DEFINE_string("shard", None, "I/N: do only the I-th of N shares of the runs, I from 0 on.")
_UNTIL = flags.DEFINE_float(
    "until",
    None,
    "Add seeds one at a time until the 95 % interval of every method's difference has a half-width below this, in nats "
    "per token.",
)
_MAX_SEEDS = flags.DEFINE_integer("max_seeds", 16, "With --until, the most seeds.")
_REPORT = flags.DEFINE_bool("report", False, "Train nothing: report on the runs that are finished.")
_AGAIN = flags.DEFINE_bool(
    "again", False, "Train runs anew that were trained by other code; what is there is kept aside."
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Train nothing: list the runs, and how long the rest takes.")


def main(argv: list[str]) -> int:
    base = cli.parse_config_dict(argv, _CONFIG, _DEFAULT_CONFIG)
    methods = matrix.parse_methods(_METHODS.value)
    seeds, sets = matrix.parse_seeds(_SEEDS.value), matrix.parse_sets(_SET.value)
    rungs = matrix.parse_rungs(_RUNGS.value) if _RUNGS.value else [()]
    rule = None
    if _UNTIL.value is not None or _MAX_SEEDS.present:
        rule = width_rule(_UNTIL.value, _MAX_SEEDS.value, seeds, len(methods), _SHARD.value)
    if rule:  # that there will not be too many is known now
        matrix.entries(base, methods, rule.all_seeds(seeds), sets, rungs)
    entries = matrix.entries(base, methods, seeds, sets, rungs)
    workdir = cli.path(_WORKDIR, f"runs/{cli.config_name(argv, _DEFAULT_CONFIG)}")
    if os.path.exists(workdir / RUN_FILE):
        raise ConfigError(f"{workdir} is the work directory of a run: choose another --workdir for the comparison")
    check(
        not (_AGAIN.value and _REPORT.value),
        "--again trains runs anew, but --report trains nothing: leave one of them out",
    )
    index, count = matrix.parse_shard(_SHARD.value) if _SHARD.value else (0, 1)
    say = Progress(0).message
    only_read = _REPORT.value or _DRY_RUN.value
    if not only_read and __name__ == "__main__":
        go_on_in_children(lambda: runs.checkpoints(workdir))
    if _RUNGS.value:  # not before: it computes with JAX, whose threads a child would miss and wait for
        check_rungs(entries, dict(rungs[0]))
    failures: dict[str, str] = {}
    code, new, programs = None, entries, runs.Programs()
    while True:
        if not only_read:
            failed, code = runs.do_runs(new[index::count], workdir, _AGAIN.value, programs)
            failures |= failed
        wide = _wide(rule, entries, failures, methods[0].label, workdir) if rule and code is None else {}
        if not rule or not wide or len(seeds) >= rule.most:
            break
        if not only_read:
            say(f"\na seed is added: 95 % intervals of {', '.join(f'{n} +-{half:.4f}' for n, half in wide.items())}")
        seeds = [*seeds, max(seeds) + 1]
        entries = matrix.entries(base, methods, seeds, sets, rungs)
        new = [entry for entry in entries if entry.seed == seeds[-1]]
    if rule and not all(runs.finished(entry, workdir) for entry in entries):
        # One that has failed, or is trained anew, must not hide the seeds that were added after its own.
        for seed in rule.all_seeds(seeds)[len(seeds) :]:
            of_seed = matrix.entries(base, methods, [seed], sets, rungs)
            if not any(runs.begun(entry, workdir) for entry in of_seed):
                break
            seeds, entries = [*seeds, seed], [*entries, *of_seed]
    if _DRY_RUN.value:
        for line in runs.plan(entries[index::count], workdir, _AGAIN.value):
            say(line)
        if rule is not None:
            each = len(entries) // len(seeds)
            say(f"the number of seeds is open: {len(seeds)} so far, at most {rule.most}, each of {each} runs")
        return 0
    found = runs.provenances(entries, workdir)
    missing = [e.folder for e in entries if e.folder not in failures and not runs.finished(e, workdir)]
    entries = [entry for entry in entries if entry.folder not in missing]
    if missing:
        which = "1 run is" if len(missing) == 1 else f"{len(missing)} runs are"
        say(f"{which} not finished: {', '.join(missing[:8])}{', ...' if len(missing) > 8 else ''}")
    if code is not None:
        say("the comparison is not finished; the same command continues it")
    if missing and not any(e.candidate.method == methods[0].label and e.folder not in failures for e in entries):
        for line in provenance.lines(found) if _REPORT.value else []:
            say(line)
        say(f"there is nothing to report yet: no run of {methods[0].label} is finished")
        return code or 0
    _write_report(entries, methods[0].label, failures, missing, base, workdir, found, rule, dict(rungs[0]))
    return code or 0


def _wide(
    rule: WidthRule, entries: list[matrix.Entry], failures: dict[str, str], baseline: str, workdir: Path
) -> dict[str, float]:
    """Return the intervals that are too wide; none while runs are not finished."""
    if any(entry.folder not in failures and not runs.finished(entry, workdir) for entry in entries):
        return {}
    return rule.wide(compare(entries, runs.read_results(entries, workdir, failures), baseline))


def _write_report(
    entries: list[matrix.Entry],
    baseline: str,
    failures: dict[str, str],
    missing: list[str],
    base: Any,
    workdir: Path,
    found: dict[str, provenance.Provenance],
    rule: WidthRule | None,
    of_rungs: Collection[str],
) -> None:
    """Write the report. Raises TrainingFailed, after that, if runs have failed.

    found: by which code the runs were trained, by folder.
    """
    say = Progress(0).message
    runs.check_same_text([entry for entry in entries if entry.folder not in failures], workdir)  # of all shares
    results = runs.read_results(entries, workdir, failures)
    tasks = compare(entries, results, baseline)
    if not tasks:
        raise TrainingFailed(f"no run of {baseline} came to its end: {next(iter(failures.values()))}")
    vocab_sizes = {entry.task: runs.vocab_size(entry, workdir) for entry in entries if entry.folder in results}
    climbed = ladders(tasks, of_rungs) if of_rungs else []
    if of_rungs and not climbed:
        say(f"there is no ladder yet: {baseline} has no seed that is finished on three rungs")
    seeds = rule.sentences(tasks, len({entry.seed for entry in entries})) if rule else ""
    notes = [f"**{line}.**" for line in provenance.lines(found)] + [provenance.commits_line(found)]
    text = report.markdown(tasks, vocab_sizes, failures, missing, notes, seeds, climbed)
    say(f"\n{text}")
    as_json = report.as_json(tasks, entries, base.to_dict(), failures, missing, seeds, climbed)
    as_json["code"] = provenance.as_json(found)
    files: dict[str, Any] = {"report.md": text, "report.json": as_json}
    files |= picture_files("report.png", lambda: plot.pictures(tasks, climbed), say)
    write_report(workdir, files)
    say(f"written to {workdir}: {', '.join(files)}")
    if failures:
        raise TrainingFailed(f"{len(failures)} of {len(entries)} runs failed: {', '.join(failures)}")


if __name__ == "__main__":
    cli.run(main)
