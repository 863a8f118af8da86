"""Dense models that become Mixtures-of-Experts."""

import jax
import numpy as np
import pytest
from helpers.hf_models import our_logits, our_params
from helpers.tiny_runs import evaluated, metrics, tiny_config, trained, write_corpus

from default_moe.config import Config
from default_moe.convert.checkpoints import read_checkpoint
from default_moe.convert.exporting import export_model
from default_moe.convert.upcycling import Upcycling, upcycle
from default_moe.data import open_data
from default_moe.errors import ConfigError

HIDDEN, EXPERTS = 20, 4


def accept(config):
    pass


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A run of dense layers only, and its text."""
    here = tmp_path_factory.mktemp("dense")
    write_corpus(here / "text")
    model = {"num_dense_layers": 2, "dense_dim": HIDDEN, "norm": "rms"}
    config = tiny_config(here, model=model, train={"num_steps": 4}, eval={"sample_tokens": 4})
    trained(config, here / "run")
    return here / "run"


def upcycled(dense, workdir, **how):
    """The experts of an upcycled run."""
    weights, _ = read_checkpoint(dense, None, accept)
    upcycle(weights, workdir, Upcycling(EXPERTS, 2, **how))
    return jax.tree.map(np.asarray, our_params(workdir)[1]["moe_layers"]["moe"]["experts"])


def test_it_computes_the_same_and_is_evaluated_and_trained_on(dense, tmp_path):
    upcycled(dense, tmp_path / "moe")
    tokens = np.random.default_rng(0).integers(0, 257, (3, 17))
    before = our_logits(dense, tokens)
    np.testing.assert_allclose(our_logits(tmp_path / "moe", tokens), before, atol=2e-6 * np.abs(before).max(), rtol=0)

    reports, texts = zip(evaluated(dense, 4), evaluated(tmp_path / "moe", 0), strict=True)
    assert "note: " not in "".join(texts)
    assert reports[1]["loss"] == pytest.approx(reports[0]["loss"], rel=1e-6)
    assert reports[1]["samples"] == reports[0]["samples"]
    assert sum(reports[1]["layers"][0]["tokens_per_expert"]) > 0

    saved = read_checkpoint(tmp_path / "moe", 0, accept)[0].config.to_dict()
    train = {**saved["train"], "num_steps": 1}
    config = Config.from_mapping({**saved, "train": train, "init_from": str(tmp_path / "moe")})
    trained(config, tmp_path / "tuned")
    rows = open_data(config.data, lambda line: None).train_rows(config.train.sequence_length, config.train.seed)
    first = rows.batch(0, config.train.batch_size)
    logits = np.float64(our_logits(dense, first["inputs"]))
    chosen = np.take_along_axis(logits, first["targets"][..., None], axis=-1)[..., 0]
    loss = (np.log(np.exp(logits).sum(axis=-1)) - chosen).mean()
    assert metrics(tmp_path / "tuned")[0]["train/loss"] == pytest.approx(loss, rel=1e-5)
    assert export_model(tmp_path / "moe", tmp_path / "out", None, "float32")[0].model_type == "mixtral"
    figures = f"{reports[1]['loss']:.4f} nats per token, {reports[1]['bits_per_byte']:.4f} bits per byte (by eval.py)."
    assert figures in (tmp_path / "out" / "README.md").read_text()
    export_model(tmp_path / "tuned", tmp_path / "tuned_out", None, "float32")
    assert "Trained for 1 steps with default_moe from the" in (tmp_path / "tuned_out" / "README.md").read_text()


def test_units_are_drawn_anew_as_the_old_ones_were(dense, tmp_path):
    copies = jax.tree.map(np.asarray, our_params(dense)[1]["dense_layers"]["ffn"])
    experts = upcycled(dense, tmp_path / "moe", redraw=0.4, seed=1)
    chosen = []
    for layer in range(2):
        for expert in range(EXPERTS):
            new = {name: np.moveaxis(experts[name][layer, expert], name != "down", 0) for name in copies}
            old = {name: np.moveaxis(copies[name]["kernel"][layer], name != "down", 0) for name in copies}
            drawn = {name: (new[name] != old[name]).all(axis=1) for name in copies}
            for name, units in drawn.items():
                assert units.sum() == 8 and (units == drawn["up"]).all()
                np.testing.assert_array_equal(new[name][~units], old[name][~units])
                # 8 units of 16 weights: means differ by their standard error, 0.09 deviations, deviations by 0.06.
                before, after = np.float64(old[name][units]), np.float64(new[name][units])
                assert abs(after.mean() - before.mean()) < 0.45 * before.std()
                assert after.std() == pytest.approx(before.std(), rel=0.3)
            chosen.append(tuple(drawn["up"].tolist()))
    assert len(set(chosen)) == 2 * EXPERTS


def test_noise_is_relative_to_each_matrix(dense, tmp_path):
    copies = jax.tree.map(np.asarray, our_params(dense)[1]["dense_layers"]["ffn"])
    experts = upcycled(dense, tmp_path / "moe", noise=0.1)
    for name, kernel in ((name, np.float64(copies[name]["kernel"])) for name in copies):
        for layer in range(2):
            noise = np.float64(experts[name][layer]) - kernel[layer]
            assert noise.std() == pytest.approx(0.1 * kernel[layer].std(), rel=0.1)  # of 1,280 numbers
            assert abs(np.corrcoef(noise.reshape(EXPERTS, -1))[0, 1]) < 0.3


def test_one_expert_a_token_is_refused_since_its_weight_would_be_constant(dense, tmp_path):
    weights, _ = read_checkpoint(dense, None, accept)
    with pytest.raises(ConfigError, match="top_k = 1"):
        upcycle(weights, tmp_path / "moe", Upcycling(4, 1))
    assert not (tmp_path / "moe").exists()
