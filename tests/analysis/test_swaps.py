"""Experts exchanged for single tokens: the exchange by hand, slopes against finite differences, and the command."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.reference import assert_close
from helpers.refusals import refused
from helpers.tiny_runs import REPOSITORY, environment, run_commands, tiny_config, trained, write_corpus

from default_moe.analysis import swaps
from default_moe.methods import Decision
from default_moe.runs.saved_run import open_saved_run

NONE = 4  # experts of the tiny model


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of Default MoE with 4 experts, K = 1, of which the second layer's router hardly decides."""
    folder = tmp_path_factory.mktemp("swaps")
    write_corpus(folder / "text")
    moe = {"num_experts": NONE, "top_k": 1}
    trained(tiny_config(folder, model={"num_dense_layers": 0}, moe=moe, train={"num_steps": 6}), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def opened(workdir):
    run = open_saved_run(workdir, None, lambda config: config, training=False)
    config = run.program.config
    size = config.train.batch_size
    batch = run.program.put_batch(run.data.validation_rows(config.train.sequence_length).batch, size)
    place_B = np.arange(size, dtype=np.int32) % config.train.sequence_length
    return run, batch, place_B, {e: swaps._Swapping(config, run.program.vocab_size, e) for e in (False, True)}


def test_gates_and_choices_are_exchanged_by_hand():
    """K = 2 of 4, two rows of two tokens: a new expert takes the first one's place; one that runs trades its gate."""
    gates = jnp.array([[[0.4, 0.1, 0.3, 0.2]] * 2] * 2)
    index = jnp.array([[[2, 0]] * 2] * 2)
    state = {"swap_place": jnp.array([1, 0]), "gate_offset": jnp.zeros((2, 2, 4))}
    for expert, new_gates, new_index in (
        (3, [0.2, 0.1, 0.3, 0.4], [2, 3]),
        (2, [0.3, 0.1, 0.4, 0.2], [2, 0]),
        (0, [0.4, 0.1, 0.3, 0.2], [2, 0]),
        (NONE, [0.4, 0.1, 0.3, 0.2], [2, 0]),
    ):
        found = swaps._swapped(Decision(gates, index, gates), {**state, "swap_expert": jnp.int32(expert)})
        for row, place in ((0, 1), (1, 0)):
            assert_close(found.gates[row, place], new_gates)
            np.testing.assert_array_equal(found.expert_index[row, place], new_index)
            assert_close(found.gates[row, 1 - place], gates[0, 0])
            np.testing.assert_array_equal(found.expert_index[row, 1 - place], index[0, 0])


def test_slopes_are_those_of_the_loss(opened):
    """Of a gate that counts in the output. Of an expert that does not run the exact slope is another: its output's."""
    run, batch, place_B, models = opened
    own = models[False]
    nobody, nothing = own._nothing(batch)
    slopes_YBN, exact_YBN = own.slopes(run, place_B, batch), models[True].slopes(run, place_B, batch)
    inactive_YBN = own.routing(run, place_B, batch)["inactive"]
    loss = jax.jit(lambda *args: own._apply(*args)[0])
    for layer, expert in ((1, 1), (1, 2)):  # the last, above which no router may choose otherwise
        moved = [nothing.at[layer, np.arange(len(place_B)), place_B, expert].set(step) for step in (0.05, -0.05)]
        up_B, down_B = (np.float64(loss(run.params, run.variables, place_B, nobody, offset, batch)) for offset in moved)
        np.testing.assert_allclose(slopes_YBN[layer, :, expert], (up_B - down_B) / 0.1, atol=4e-3)
        assert np.abs(slopes_YBN[layer, :, expert]).max() > 0.1
    exact_BN, slopes_BN, inactive_BN = (values[1] for values in (exact_YBN, slopes_YBN, inactive_YBN))
    assert_close(np.where(inactive_BN, 0, exact_BN), np.where(inactive_BN, 0, slopes_BN))
    assert np.abs(exact_BN - slopes_BN)[inactive_BN].min() > 0


def test_the_gain_is_that_of_the_other_expert(opened):
    """Exchanged by the parameters too: the router's columns of two experts change places, in rows of one token."""
    run, batch, _, models = opened
    kernel_YDN = np.asarray(run.params["moe_layers"]["moe"]["router"]["kernel"])
    short = {name: value[:, :1] for name, value in batch.items()}
    place_B = np.zeros(len(short["inputs"]), np.int32)
    routing = models[False].routing(run, place_B, short)
    layer, expert = 1, 3
    swapped = np.where(np.arange(len(kernel_YDN)) == layer, expert, NONE).astype(np.int32)
    found_B = models[False].losses(run, place_B, swapped, short)
    for row, first in enumerate(routing["first"][layer][:3]):
        order = np.arange(NONE)
        order[[first, expert]] = order[[expert, first]]
        kernel = kernel_YDN.copy()
        kernel[layer] = kernel[layer][:, order]
        params = {**run.params, "moe_layers": {**run.params["moe_layers"]}}
        params["moe_layers"]["moe"] = {**params["moe_layers"]["moe"], "router": {"kernel": jnp.asarray(kernel)}}
        other = dataclasses.replace(run, params=params)
        expected_B = models[False].losses(other, place_B, np.full(len(kernel_YDN), NONE, np.int32), short)
        assert found_B[row] == pytest.approx(expected_B[row], rel=1e-5)


def test_a_summary_by_hand():
    """Two tokens, 4 experts, K = 1. The first token's gains are ranked right, the second's the other way round."""
    gain = np.array([[[0, 3.0, 2.0, 1.0], [-1.0, -2.0, -3.0, 0]]])
    first, signal = np.array([[0, 3]]), np.array([[[9.0, 5.0, 4.0, 1.0], [1.0, 2.0, 3.0, 2.5]]])
    inactive = np.arange(4) != first[..., None]
    names = dict.fromkeys(swaps.SIGNALS, signal) | {"probability": np.zeros_like(signal)}
    found = swaps.summary(swaps.Swaps(gain, inactive, names, first), 0)
    assert found.correlation["exact slope"] == pytest.approx((0.0, 1.0))  # 1 and -1
    assert np.isnan(found.correlation["probability"]).all() and np.isnan(found.advised["probability"]).all()
    assert found.best == pytest.approx((1.5, 1.5))  # 3, and 0 where the one that runs is best
    assert found.random == pytest.approx((0.0, 2.0))  # 2 and -2
    assert found.advised["exact slope"] == pytest.approx((-1.5, 1.5))  # stays, and takes expert 2


def test_the_command(workdir, tmp_path):
    command = ["default_moe/analysis/__main__.py", "swaps", f"--workdir={workdir}"]
    write_corpus(tmp_path / "text")
    trained(tiny_config(tmp_path, moe={"router": "remoe"}, train={"num_steps": 1}), tmp_path / "remoe")
    remoe = [*command[:2], f"--workdir={tmp_path / 'remoe'}"]
    whole, many, other = run_commands(
        [[*command, "--batches=1"], [*command, "--batches=9999"], remoe], REPOSITORY, environment()
    )
    assert whole[0] == 0, whole[2]
    assert "layer 1: rank correlation with the true gain: exact slope " in whole[1]
    numbers = json.loads((workdir / "analysis" / "swaps_gain.json").read_text())["by_layer"]
    assert numbers.keys() == {"0", "1"} and numbers["1"]["best"][0] >= 0
    assert (workdir / "analysis" / "swaps_correlation.png").stat().st_size > 1000
    assert many[0] == 2 and "--batches is 9999, but the held-out text has" in many[2]
    assert other[0] == 2 and "there must be two of them" in other[2]


def test_what_cannot_be_exchanged_is_refused(tmp_path):
    for sections, words in (
        ({"moe": {"num_experts": 4, "top_k": 3}}, "runs 3 of 4 experts, but to rank those that do not run"),
        ({"model": {"num_layers": 1, "num_dense_layers": 1}}, "no MoE layers"),
    ):
        with refused(words):
            swaps.check_swappable(tiny_config(tmp_path, **sections))
