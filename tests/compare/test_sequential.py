"""Seeds are added until differences are known well enough, and not until they are significant."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.refusals import refused
from helpers.tiny_runs import REPOSITORY, as_flags, environment, run_commands, tiny_settings, write_corpus

from default_moe.compare import comparison, matrix
from default_moe.compare.runs import Result
from default_moe.compare.sequential import WidthRule, width_rule
from default_moe.compare.statistics import Curve, paired
from default_moe.config import default_config

COMPARE = "default_moe/compare/__main__.py"


def compared(sets=(), **losses):
    methods = matrix.parse_methods(list(losses))
    entries = matrix.entries(default_config(), methods, range(len(losses["topk"])), matrix.parse_sets(sets))
    results = {}
    for entry in entries:
        loss = losses[entry.candidate.method][entry.seed]
        curve = Curve((100.0,), (loss,))
        results[entry.folder] = Result(curve, curve, loss, 10.0, 1.0, 1.0, 1.0, 6e3)
    return comparison.compare(entries, results, "topk")


def test_an_interval_is_wide_or_not_whatever_it_is_about():
    """Differences 0.1 -+ 0.01 twice each: deviation sqrt(4e-4 / 3), half-width 3.18245 times that by 2: 0.018374."""
    spread = [0.09, 0.11, 0.09, 0.11]
    for shift in (-1.0, 0.0, 1.0):  # a clear winner, nearly a draw, and a clear loser
        tasks = compared(topk=[3.0] * 4, default=[3 + shift + s for s in spread], densemixer=[3.0, 3.2, 3.0, 3.2])
        half = 3.182446 * math.sqrt(4e-4 / 3) / 2
        wide = WidthRule(0.0183, 16).wide(tasks)
        assert wide == pytest.approx({"default": half, "densemixer": 10 * half}, rel=1e-5)
        assert [*WidthRule(0.0184, 16).wide(tasks)] == ["densemixer"]
        assert not WidthRule(0.2, 16).wide(tasks)
    tasks = compared(["moe.top_k=1,2"], topk=[3.0] * 4, default=[3 + s for s in spread])
    assert [*WidthRule(0.01, 16).wide(tasks)] == ["default (moe.top_k=1)", "default (moe.top_k=2)"]
    said = WidthRule(0.01, 4).sentences(tasks, 4)
    assert "there are 4. It is not below that yet for default (moe.top_k=1): 0.0184, default" in said
    assert "It is below that for all." in WidthRule(0.02, 16).sentences(tasks, 4)


def test_three_seeds_are_too_few_however_alike_they_are():
    tasks = compared(topk=[3.0] * 3, default=[3.1, 3.1, 3.1])
    assert WidthRule(0.1, 16).wide(tasks) == {"default": math.inf}


def test_the_rule_leaves_the_mean_where_it_is_and_its_intervals_are_as_wide_as_told():
    """Of 400 comparisons of two methods that differ by 0.3 deviations, each ended by the rule."""
    rng, means, covered = np.random.default_rng(0), [], 0
    for _ in range(400):
        values = rng.normal(0.3, 1, 16)
        for count in range(4, 17):
            difference = paired(values[:count].tolist(), [0.0] * count)
            row = SimpleNamespace(candidate="default", difference=difference)
            if not WidthRule(0.8, 16).wide([SimpleNamespace(name="", contenders=[row])]):
                break
        means.append(difference.mean)
        covered += difference.low < 0.3 < difference.high
    assert abs(np.mean(means) - 0.3) < 3 * np.std(means) / 20
    assert 0.89 < covered / 400 < 0.97


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0.0, 16, [0], 2, None), "--until is 0.0, but must be a half-width"),
        ((math.nan, 16, [0], 2, None), "--until is nan"),
        ((None, 8, [0], 2, None), "--max_seeds is given without --until"),
        ((0.1, 4, [0, 1, 2, 3, 4], 2, None), "--max_seeds is 4, but --seeds has 5"),
        ((0.1, 3, [0], 2, None), "at least 4 are needed"),
        ((0.1, 16, [0], 1, None), "--methods has only one"),
        ((0.1, 16, [0], 2, "0/2"), "--until cannot go with --shard"),
    ],
)
def test_rules_that_make_no_sense_are_refused(arguments, words):
    with refused(words):
        width_rule(*arguments)


def test_the_command_adds_seeds_and_finds_them_again(tmp_path):
    """Seeds 5 to 8 are given; no interval is narrower than 1e-9, and every one than 100."""
    write_corpus(tmp_path / "text")
    settings = tiny_settings(
        tmp_path,
        model={"num_layers": 1, "num_dense_layers": 0},
        train={"num_steps": 2},
        eval={"every_steps": 2, "num_batches": 1},
    )
    flags = [COMPARE, *as_flags(settings), f"--workdir={tmp_path / 'comparison'}", "--methods=topk,frozen"]
    flags += ["--seeds=5,6,7,8"]
    commands = {
        "whole": ["--until=1e-9", "--max_seeds=5"],
        "more": ["--until=1e-9", "--max_seeds=7", "--dry_run"],
        "narrow": ["--until=100", "--report"],
        "bad": ["--until=often"],
    }
    outcomes = run_commands([[*flags, *more] for more in commands.values()], REPOSITORY, environment())
    codes, outputs, errors = zip(*outcomes, strict=True)
    outputs = dict(zip(commands, outputs, strict=True))
    assert codes == (0, 0, 0, 2), errors
    assert "the number of seeds is open: 6 so far, at most 7, each of 2 runs" in outputs["more"]
    assert (
        outputs["whole"].count(", a new run") == 10 and "a seed is added: 95 % intervals of frozen" in outputs["whole"]
    )
    assert "there are 5. It is not below that yet for frozen" in outputs["whole"]
    assert "topk/seed_10: not begun" in outputs["more"] and "10 runs" not in outputs["more"].splitlines()[-1]
    assert "there are 4. It is below that for all." in outputs["narrow"]
    written = json.loads((tmp_path / "comparison" / "report.json").read_text())
    assert [*written["tasks"][0]["rows"][1]["results"]] == ["5", "6", "7", "8"]
    assert "there are 4." in written["seeds"]
    assert errors[-1].count("\n") == 1 and "--until" in errors[-1]

    shutil.rmtree(tmp_path / "comparison" / "runs" / "frozen" / "seed_6" / "checkpoints")  # as if it had failed
    ((code, output, error),) = run_commands([[*flags, *commands["whole"], "--report"]], REPOSITORY, environment())
    assert code == 0, error
    assert "1 run is not finished: frozen/seed_6" in output and "there are 5." in output
    written = json.loads((tmp_path / "comparison" / "report.json").read_text())
    assert [*written["tasks"][0]["rows"][1]["results"]] == ["5", "7", "8", "9"]
