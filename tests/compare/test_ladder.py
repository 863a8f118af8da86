"""Ladders: their runs, lines, speed-ups, and the fraction of the exact gradient's gain that a method recovers."""

import math
import subprocess
import sys

import numpy as np
import pytest
from helpers.refusals import refused
from helpers.tiny_runs import REPOSITORY, environment
from scipy import stats

from default_moe.compare import comparison, ladder, matrix, report
from default_moe.compare.plot import pictures
from default_moe.compare.recovered import recovered
from default_moe.compare.runs import Result
from default_moe.compare.statistics import Curve, fit_line, fraction_of_gain
from default_moe.config import default_config

RUNGS = ["train.num_steps=100", "train.num_steps=200", "train.num_steps=400"]
FLOPS = {100: 1e9, 200: 4e9, 400: 1.6e10}  # of the baseline's whole training


def climbed(losses, seeds=range(4), cost=None, sets=()):
    """The tasks of a ladder. losses: by method, a function of compute and seed.  cost: by method, of the baseline's."""
    methods, rungs = matrix.parse_methods(list(losses)), matrix.parse_rungs(RUNGS)
    entries = matrix.entries(default_config(), methods, seeds, matrix.parse_sets(sets), rungs)
    results = {}
    for entry in entries:
        method = entry.candidate.method
        flops = FLOPS[entry.config.train.num_steps] * (cost or {}).get(method, 1.0)
        loss = losses[method](flops, entry.seed)
        if loss is not None:
            curve = Curve((50.0, 100.0), (loss + 1, loss))
            results[entry.folder] = Result(curve, curve, 1.0, 10.0, 1.0, 1.0, 1.0, flops / 100)
    return comparison.compare(entries, results, methods[0].label)


def law(factor, power=-0.1):
    """A loss that takes `factor` of another's compute, with a seed's own luck on all rungs and methods alike."""
    return lambda flops, seed: (3 + 0.1 * seed) * (flops / factor / 1e9) ** power


# Which runs


def test_rungs_are_tasks_of_their_own():
    scales = {32: "1e-2", 64: "5e-3", 128: "3e-3"}
    rungs = matrix.parse_rungs([f"config.model.d_model={width}:optim.peak_lr={lr}" for width, lr in scales.items()])
    entries = matrix.entries(default_config(), matrix.parse_methods(["topk", "default"]), [0, 1], [], rungs)
    assert [entry.seed for entry in entries] == [0] * 6 + [1] * 6
    assert entries[1].folder == "default/model.d_model=32/optim.peak_lr=0.01/seed_0"
    assert entries[1].task == (("model.d_model", 32), ("optim.peak_lr", 0.01)) and entries[1].candidate.tuned == ()
    assert [e.config.model.d_model for e in entries[:6]] == [32, 32, 64, 64, 128, 128]
    assert entries[4].folder == "topk/seed_0"  # as the config has it


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (RUNGS[:2], "must be at least 3 different rungs: with fewer nothing tells whether a line fits"),
        ([*RUNGS[:2], RUNGS[0]], "must be at least 3 different rungs"),
        ([*RUNGS, "train.num_steps"], "--rungs has 'train.num_steps', but must be settings"),
        ([*RUNGS, "model.d_model=32"], "must give the same settings in each rung, in the same order: train.num_steps"),
        ([f"{r}:{r}" for r in RUNGS], "which gives a setting twice"),
        (["train.seed=1", "train.seed=2", "train.seed=3"], "what --methods and --seeds are for"),
        (["optim.peak_lr=1", "optim.peak_lr=2", "optim.peak_lr=3"], "which --set or --methods gives too"),
        (["optim.peak_rl=1", "optim.peak_rl=2", "optim.peak_rl=3"], "--rungs gives 'optim.peak_rl', but there is no"),
    ],
)
def test_rungs_that_make_no_ladder_are_refused(texts, words):
    sets = matrix.parse_sets(["optim.peak_lr=1e-3,2e-3"])
    with refused(words):
        matrix.entries(default_config(), matrix.parse_methods(["topk"]), [0], sets, matrix.parse_rungs(texts))


def test_rungs_of_equal_compute_are_refused():
    """Half as many steps of twice the tokens, too."""
    for texts in (
        ["optim.peak_lr=1e-3", "optim.peak_lr=2e-3", "optim.peak_lr=3e-3"],
        [
            "train.num_steps=100:train.batch_size=8",
            "train.num_steps=50:train.batch_size=16",
            "train.num_steps=9:train.batch_size=8",
        ],
    ):
        rungs = matrix.parse_rungs(texts)
        entries = matrix.entries(default_config(), matrix.parse_methods(["topk", "hash"]), [0], [], rungs)
        with refused("which take nearly the same operations"):
            ladder.check_rungs(entries, dict(rungs[0]))
    rungs = matrix.parse_rungs(RUNGS)
    ladder.check_rungs(
        matrix.entries(default_config(), matrix.parse_methods(["topk", "hash"]), [0], [], rungs), dict(rungs[0])
    )


# Lines and speed-ups


def test_a_line_is_that_of_least_squares():
    compute, losses = np.array([1e9, 3e9, 2e10, 1e11]), np.array([3.0, 2.7, 2.5, 2.0])
    expected = stats.linregress(np.log(compute), np.log(losses))
    line = fit_line(compute, losses)
    assert (line.slope, line.intercept) == pytest.approx((expected.slope, expected.intercept), rel=1e-10)
    assert line.log_compute(line.loss(5e9)) == pytest.approx(math.log(5e9))
    exact = fit_line([1.0, 10.0, 100.0], [5.0, 2.5, 1.25])
    assert exact.loss(1000.0) == pytest.approx(0.625) and exact.slope == pytest.approx(-math.log10(2))


def test_a_method_that_needs_two_thirds_of_the_compute_is_one_and_a_half_times_as_fast():
    """On the last rung the baseline's loss lies within the method's line, on the first above it."""
    tasks = climbed({"topk": law(1), "default": law(2 / 3)})
    (found,) = ladder.ladders(tasks, ["train.num_steps"])
    first, *others = found.climbs[1].speed_ups
    assert first is None and len(others) == 2
    for one in others:  # no luck is a method's own: the interval is a point
        assert (one.value, one.low, one.high) == pytest.approx((1.5, 1.5, 1.5))
    assert found.climbs[0].line.slope == pytest.approx(-0.1) and found.climbs[1].misfit < 1e-9
    slow = ladder.ladders(climbed({"topk": law(1), "default": law(2)}), ["train.num_steps"])[0].climbs[1].speed_ups
    assert [one and round(one.value, 9) for one in slow] == [0.5, 0.5, None]


def test_what_a_method_computes_besides_counts_against_it():
    """A lower loss for each token, at 1.25 times the operations."""
    tasks = climbed({"topk": law(1), "densemixer": law(1.2)}, cost={"densemixer": 1.25})
    assert tasks[0].rows[1].difference.mean < 0
    (found,) = ladder.ladders(tasks, ["train.num_steps"])
    assert [one and round(one.value * 1.2, 9) for one in found.climbs[1].speed_ups] == [None, 1, 1]


def test_the_interval_of_a_speed_up_is_that_of_its_logarithms():
    """Each seed's factor is its own: exp of Student's interval of the logarithms, by scipy."""
    factors = [0.6, 0.8, 0.7, 0.75]
    losses = {"topk": law(1), "default": lambda flops, seed: law(factors[seed])(flops, seed)}
    (found,) = ladder.ladders(climbed(losses), ["train.num_steps"])
    logs = -np.log(factors)
    low, high = stats.t.interval(0.95, 3, logs.mean(), stats.sem(logs))
    one = found.climbs[1].speed_ups[-1]
    assert (one.value, one.low, one.high) == pytest.approx((np.exp(logs.mean()), np.exp(low), np.exp(high)))


def test_seeds_without_every_rung_are_left_out_and_lines_that_rise_have_no_speed():
    losses = {
        "topk": law(1),
        "default": lambda flops, seed: None if (seed, flops) == (1, 4e9) else law(0.5)(flops, seed),
        "hash": law(1, power=0.1),
        "dense": lambda flops, seed: None if flops == 4e9 else 3.0,
    }
    (found,) = ladder.ladders(climbed(losses), ["train.num_steps"])
    assert [(climb.method, [*climb.lines]) for climb in found.climbs] == [
        ("topk", [0, 1, 2, 3]),
        ("default", [0, 2, 3]),
        ("hash", [0, 1, 2, 3]),
    ]
    assert found.climbs[1].speed_ups[-1].value == pytest.approx(2)
    assert found.climbs[2].speed_ups == (None,) * 3
    short = climbed({"topk": lambda flops, seed: None if flops == 4e9 else 3.0, "default": law(1)})
    assert ladder.ladders(short, ["train.num_steps"]) == []


# Fractions


def test_a_fraction_is_fiellers():
    """At both ends of the interval the paired t-test of ours - r theirs has p = 0.05."""
    rng = np.random.default_rng(0)
    baseline = rng.normal(2, 0.3, 6)
    exact = baseline - rng.normal(0.1, 0.02, 6)
    ours = baseline - 0.5 * (baseline - exact) - rng.normal(0, 0.01, 6)
    found = fraction_of_gain(ours, exact, baseline)
    assert found.value == pytest.approx((baseline - ours).mean() / (baseline - exact).mean())
    assert found.low < found.value < found.high and 0.3 < found.value < 0.7
    for end in (found.low, found.high):
        assert stats.ttest_rel(baseline - ours, end * (baseline - exact)).pvalue == pytest.approx(0.05)
    assert (
        fraction_of_gain(exact, exact, baseline).value == 1 and fraction_of_gain(baseline, exact, baseline).value == 0
    )


def test_a_gain_that_may_be_nothing_has_no_fractions():
    baseline = [2.0, 2.1, 2.2, 2.3]
    for exact in ([2.1, 2.0, 2.3, 2.2], [2.1, 2.2, 2.3, 2.4001]):  # no difference, and a loss
        assert fraction_of_gain([1.9, 2.0, 2.1, 2.2], exact, baseline) is None
        losses = {"topk": baseline, "densemixer": exact, "default": [2.0] * 4}
        by_seed = {method: dict(enumerate(values)) for method, values in losses.items()}
        (said,) = recovered(by_seed, "topk").sentences()
        assert said.endswith("not above zero for certain, so no fraction of it is told.")


def test_fractions_stand_in_the_report_and_over_all_rungs():
    losses = {
        "topk": lambda flops, seed: law(1)(flops, seed),
        "default": lambda flops, seed: law(1)(flops, seed) - 0.05,
        "densemixer": lambda flops, seed: law(1)(flops, seed) - 0.2,
        "frozen": lambda flops, seed: law(1)(flops, seed) + 0.1,
    }
    tasks = climbed(losses)
    found = ladder.ladders(tasks, ["train.num_steps"])
    assert found[0].recovered.fractions["default"].value == pytest.approx(0.25)
    text = report.markdown(tasks, {task.settings: 257 for task in tasks}, {}, ladders=found)
    assert text.count("default recovers 0.25 (95 % interval 0.25 to 0.25).") == 4
    assert (
        text.count("frozen recovers -0.50") == 4 and text.count("Averaged over rungs: Of the gain of densemixer") == 2
    )
    assert "## Ladder" in text and "| topk | 4 | -0.1000 | - | - | - |" in text
    written = report.as_json(tasks, [], {}, {}, ladders=found)
    assert written["tasks"][0]["recovered"]["fractions"]["default"]["value"] == pytest.approx(0.25)
    assert written["ladders"][0]["climbs"][0]["compute"] == pytest.approx([1e9, 4e9, 1.6e10])
    files = pictures(tasks[:1], found)
    assert files["ladder.png"].startswith(b"\x89PNG") and files["ladder.pdf"].startswith(b"%PDF")
    assert "speed-ups tell little" not in text
    bent = {"topk": lambda flops, seed: 3.1 if flops == 4e9 else 3.0 - flops / 4e10}
    bent["default"] = lambda flops, seed: bent["topk"](flops, seed) + 0.001
    assert "speed-ups tell little" in ladder.markdown(ladder.ladders(climbed(bent, seeds=[0]), ["train.num_steps"]))[3]
    few = ladder.ladders(climbed(losses, seeds=range(3)), ["train.num_steps"])
    assert "fewer than 4 seeds tell no fraction of it" in "\n".join(ladder.markdown(few))


def test_nothing_is_computed_before_the_command_forks(tmp_path):
    """JAX has threads as soon as it computes. A child of such a process lacks them, and waits for what they hold."""
    command = [sys.executable, "-m", "default_moe.compare", "--methods=topk,hash", "--seeds=0"]
    command += [f"--rungs={','.join(RUNGS)}", f"--workdir={tmp_path}"]
    command += ["--config.data.name=text_files", "--config.data.files=nowhere/*.txt"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment(), timeout=120)
    assert done.returncode == 2 and "nowhere" in done.stderr.splitlines()[-1]
    assert "fork" not in done.stderr
