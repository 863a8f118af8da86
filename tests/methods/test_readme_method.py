"""The method that the page about methods shows as an example of a new one is complete, and works like any other."""

import dataclasses
import re
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.steps import CONFIG, VOCAB, change, make_batch

from default_moe.config import Config, default_config
from default_moe.methods import METHODS, Method, TopK
from default_moe.training.program import Program

PAGE = Path(__file__).parents[2] / "default_moe" / "methods" / "README.md"


@pytest.fixture
def proportional():
    """The class as the page defines it, as a module of the package; forgotten afterwards."""
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "(Method)" in block)
    assert len(code.splitlines()) <= 35
    module = types.ModuleType("default_moe.methods.proportional")
    sys.modules[module.__name__] = module
    exec(compile(code, str(PAGE), "exec"), module.__dict__)
    yield module.Proportional
    del METHODS["proportional"], sys.modules[module.__name__]


def test_the_pages_method_trains_like_any_other(proportional):
    settings = default_config()
    settings.moe.update({"router": "proportional", "num_experts": 4, "expert_dim": 24, "top_k": 2})
    settings.moe.proportional.rate = 0.5
    config = dataclasses.replace(CONFIG, moe=Config.from_config_dict(settings).moe)
    assert config.moe.method == proportional(rate=0.5)
    assert Config.from_mapping(config.to_dict()) == config
    program = Program(change(config, model={"remat": "full"}), VOCAB, devices=jax.devices()[:1])
    state, metrics = program.train_step(program.new_state(), make_batch())
    layers = jax.device_get(metrics["layers"])
    bias = state.variables["router_state"]["moe_layers"]["moe"]["bias"]
    np.testing.assert_allclose(bias, 0.5 * (1 - layers.tokens_per_expert / 24), rtol=1e-5)  # 48 tokens, K / N = 1/2
    assert (layers.more["spread_loss"] > 0).all()
    np.testing.assert_allclose(layers.auxiliary_loss, 0.001 * layers.more["spread_loss"], rtol=1e-5)


def test_two_methods_of_one_name_are_an_error():
    with pytest.raises(TypeError, match="Another and TopK have the same name, 'topk'"):
        type("Another", (Method,), {"name": "topk"})
    assert METHODS["topk"] is TopK
