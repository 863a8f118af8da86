"""A comparison refuses a method that sees the tokens it is to predict, and knows that ours do not."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from helpers.refusals import refused
from helpers.tiny_runs import tiny_config, write_corpus

from default_moe.compare import matrix, runs
from default_moe.compare.causality import check_causal, leaked
from default_moe.config import to_config_dict
from default_moe.methods import METHODS, Method
from default_moe.methods.decision import Decision
from default_moe.runs.workdir import Busy


@pytest.fixture
def expert_choice():
    """Each expert takes the tokens of a row that it likes best (Zhou et al. 2022), later ones among them."""

    @dataclasses.dataclass(frozen=True)
    class ExpertChoice(Method):
        name = "expert_choice"

        def route(self, inputs, config):
            probs = jax.nn.softmax(inputs.logits)
            places = max(probs.shape[1] * config.top_k // config.num_experts, 1)
            least = jax.lax.top_k(probs.swapaxes(1, 2), places)[0][..., -1]
            taken = probs >= least[:, None]
            everyone = jnp.broadcast_to(jnp.arange(config.num_experts), probs.shape)
            index = jnp.where(taken, everyone, config.num_experts)
            return Decision(jnp.where(taken, probs, 0), index, probs)

    yield "expert_choice"
    METHODS.pop("expert_choice")


def test_a_router_that_chooses_among_later_tokens_is_refused(expert_choice, tmp_path):
    write_corpus(tmp_path / "text")
    config = tiny_config(tmp_path, moe={"router": expert_choice, "load_balance_weight": 0.0})
    assert 1e-2 < leaked(config).evaluated < 1
    with refused("--methods has expert_choice, whose earlier logits move by 0"):
        check_causal(config, "expert_choice")
    methods = matrix.parse_methods(["topk", "expert_choice"])
    entries = matrix.entries(to_config_dict(tiny_config(tmp_path)), methods, [0], [])
    with refused("it sees the tokens that it is to predict"):
        runs.do_runs(entries, tmp_path / "comparison")
    assert not (tmp_path / "comparison").exists()


@pytest.mark.parametrize("name", ["default_sampled", "expert_threshold", "hash"])
def test_our_methods_see_no_later_token(name, tmp_path):
    config = tiny_config(tmp_path, moe={"router": name}, model={"dtype": "bfloat16" if name == "hash" else "float32"})
    assert check_causal(config, name) is None
    assert max(leaked(config)) < 1e-5


def test_default_vectors_updated_before_use_see_later_tokens_in_training_alone(tmp_path):
    config = tiny_config(tmp_path, moe={"router": "default"})
    assert leaked(config).evaluated < 1e-5 and leaked(config).trained > 1e-3
    assert "updated before they are used (moe.default.ema_update)" in (check_causal(config, "default") or "")
    after = tiny_config(tmp_path, moe={"router": "default", "default": {"ema_update": "after"}})
    assert check_causal(after, "default:ema_update=after") is None


def test_a_model_is_checked_once_whatever_it_is_trained_with(monkeypatch, tmp_path):
    """Two methods and two K are four models, in 16 runs with two seeds and learning rates."""
    checked = []

    def busy(config, workdir, make_program, stop):
        raise Busy("another process trains it")

    monkeypatch.setattr(runs, "check_causal", lambda config, label: checked.append((label, config.moe.top_k)))
    monkeypatch.setattr(runs.trainer, "train", busy)
    sets = matrix.parse_sets(["moe.top_k=1,2", "optim.peak_lr=1e-3,2e-3"])
    methods = matrix.parse_methods(["topk", "hash"])
    entries = matrix.entries(to_config_dict(tiny_config(tmp_path)), methods, [0, 1], sets)
    assert len(entries) == 16 and runs.do_runs(entries, tmp_path) == ({}, None)
    assert sorted(checked) == [("hash", 1), ("hash", 2), ("topk", 1), ("topk", 2)]
