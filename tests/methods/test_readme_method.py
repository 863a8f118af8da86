"""The methods that the page about methods shows as examples of new ones are complete, and work like any other."""

import dataclasses
import re
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.refusals import refused
from helpers.steps import CONFIG, VOCAB, change, make_batch
from helpers.tiny_runs import as_flags, environment, run_commands, tiny_settings, write_corpus

from default_moe.config import Config, MoEConfig, default_config
from default_moe.methods import BALANCERS, METHODS, Balancer, Method, NoBalancer, TopK
from default_moe.moe import MoELayer
from default_moe.training.program import Program

PAGE = Path(__file__).parents[2] / "default_moe" / "methods" / "README.md"


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A folder with `my_routers.py`: the classes as the page defines them. Forgotten afterwards."""
    blocks = [block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "(Method)" in block]
    assert [len(block.splitlines()) <= 45 for block in blocks] == [True, True]
    (tmp_path / "my_routers.py").write_text("\n\n".join(blocks))
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    forget()


def forget():
    for name in ("top_p", "threshold"):
        METHODS.pop(name, None)
    sys.modules.pop("my_routers", None)


def program(moe):
    return Program(change(dataclasses.replace(CONFIG, moe=moe), model={"remat": "full"}), VOCAB, jax.devices()[:1])


def test_the_pages_methods_train_like_any_other(plugin):
    settings = default_config()
    settings.moe.update({"plugin": "my_routers", "router": "top_p", "num_experts": 4, "expert_dim": 24, "top_k": 2})
    config = Config.from_config_dict(settings).moe
    _, metrics = program(config).train_step(program(config).new_state(), make_batch())
    layers = jax.device_get(metrics["layers"])
    assert np.isfinite(metrics["total_loss"]) and (layers.tokens_per_expert.sum(axis=1) >= 48).all()

    settings = default_config()  # knows the groups of methods by now
    settings.moe.update({"plugin": "my_routers", "router": "threshold", "num_experts": 4, "expert_dim": 24, "top_k": 2})
    settings.moe.threshold.spread_weight = 0.5
    settings.moe.load_balance_weight = 0.0
    config = Config.from_config_dict(settings).moe
    saved = config.to_dict()
    forget()
    assert MoEConfig.from_mapping(saved).method == METHODS["threshold"](spread_weight=0.5)  # imported again
    forget()
    with refused("moe.router is 'threshold', but must be one of"):
        MoEConfig.from_mapping({"router": "threshold"})
    config = MoEConfig.from_mapping(saved)

    state, _ = program(config).train_step(program(config).new_state(), make_batch())
    _, metrics = program(config).train_step(state, make_batch())
    layers = jax.device_get(metrics["layers"])
    np.testing.assert_allclose(layers.tokens_per_expert.sum(axis=1), 2 * 48, atol=12)  # K = 2 on average
    np.testing.assert_allclose(layers.auxiliary_loss, 0.5 * layers.more["spread_loss"], rtol=1e-5)
    assert (layers.more["threshold_threshold"] != 0.25).all()


def test_all_commands_know_a_method_from_elsewhere(plugin):
    """Each command is a process that has not heard of it: the flag, or the run, says where it is."""
    write_corpus(plugin / "text")
    settings = tiny_settings(
        plugin, moe={"plugin": "my_routers", "router": "top_p"}, train={"num_steps": 2}, eval={"num_batches": 1}
    )
    settings["moe"]["top_p.p"] = 0.75
    flags, run = as_flags(settings), "--workdir=run"
    compared = [flag for flag in flags if "moe.router" not in flag]
    results = run_commands(
        [
            ["train.py", run, *flags],
            ["train.py", run, *flags, "--config.train.num_steps=3"],
            ["eval.py", run],
            ["default_moe/compare/__main__.py", "--workdir=compared", "--methods=topk,top_p", "--seeds=0", *compared],
            ["eval.py", run, "--config.moe.plugin=my_rooters"],
        ],
        plugin,
        {**environment(), "PYTHONPATH": str(plugin)},
    )
    for code, out, err in results[:-1]:
        assert code == 0, out + err
    assert "changed since the last start: train.num_steps was 2, is now 3" in results[1][1]
    code, _, err = results[-1]
    assert code == 2 and "there is no module 'my_rooters': install it, or name its folder in PYTHONPATH" in err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("my routers.py", "must be the name of a module, like a.b"),
        ("not_there.at_all", "there is no module 'not_there'"),
        ("broken_router", r"importing it fails: ZeroDivisionError: division by zero \(broken_router.py, line 2\)"),
        ("taken_router", "importing it fails: TypeError: Other and TopK have the same name, 'topk'"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_one_line(name, words, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_router.py").write_text("a = 1\na / 0\n")
    (tmp_path / "taken_router.py").write_text(
        "from default_moe.methods import Method\nclass Other(Method):\n    name = 'topk'\n"
    )
    with refused(f"moe.plugin is '{name}', but {words}"):
        MoEConfig(plugin=name)
    assert METHODS["topk"] is TopK


class TwoLayers(nn.Module):
    num_experts: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.num_experts)(nn.tanh(nn.Dense(16)(x))).astype(jnp.float32)


def test_a_method_brings_its_own_router_and_sees_what_the_layer_sees():
    seen = {}

    class Deep(TopK):
        name = "deep"

        def router(self, config, name):
            return TwoLayers(config.num_experts, name=name)

        def route(self, inputs, config):
            seen.update(inputs._asdict())
            return super().route(inputs, config)

    del METHODS["deep"]
    layer = MoELayer(MoEConfig(num_experts=4, top_k=2, expert_dim=8, router=Deep()))
    x, ids, mask = jnp.ones((2, 3, 8)), jnp.arange(6).reshape(2, 3), jnp.ones((2, 3))
    variables = layer.init(jax.random.key(0), x, train=False)
    assert set(variables["params"]["router"]) == {"Dense_0", "Dense_1"}
    layer.apply(variables, x, train=True, mask=mask, token_ids=ids)
    assert seen["train"] and seen["token_ids"] is ids and seen["mask"] is mask and seen["x"].shape == x.shape

    config = dataclasses.replace(CONFIG, moe=dataclasses.replace(CONFIG.moe, router=Deep()))
    Program(config, VOCAB, jax.devices()[:1]).abstract_state  # noqa: B018 - traces the model
    assert seen["token_ids"].dtype == jnp.int32


def test_two_methods_of_one_name_are_an_error():
    with pytest.raises(TypeError, match="Another and TopK have the same name, 'topk'"):
        type("Another", (Method,), {"name": "topk"})
    assert METHODS["topk"] is TopK
    with pytest.raises(TypeError, match="Another and NoBalancer have the same name, 'none'"):
        type("Another", (Balancer,), {"name": "none"})
    assert BALANCERS["none"] is NoBalancer
