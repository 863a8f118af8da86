"""What is logged of a step: names, loads relative to the mean, and speeds without what is left out."""

import time

import numpy as np
import pytest
from helpers.tiny_runs import tiny_config

from default_moe.model.language_model import LayerStats
from default_moe.model.size import train_flops_per_token
from default_moe.runs.measurements import StepMeasurements, layer_statistics

STATS = LayerStats(
    auxiliary_loss=np.float32([0, 0]),
    load_balance_loss=np.float32([1.0, 2.0]),
    router_z_loss=np.float32([4.0, 6.0]),
    router_entropy=np.float32([0.5, 0.7]),
    mean_router_probs=np.float32([[0.5, 0.3, 0.2], [0.0, 0.0, 0.0]]),
    tokens_per_expert=np.int32([[5, 3, 0], [0, 0, 0]]),  # the second layer of 3 experts saw no token
    num_tokens=np.int32([4, 0]),
    observed={},
    more={"default_vector_norm": np.float32([8.0, 9.0])},
)


class Program:
    vocab_size = 257

    def __init__(self, folder):
        # 8 sequences of 32 tokens a step, 1 dense layer first
        self.config = tiny_config(folder, model={"num_layers": 3})


def test_loads_are_relative_to_the_mean():
    found = layer_statistics(STATS)
    np.testing.assert_allclose(found["max_load"], [5 / (8 / 3), 0])
    np.testing.assert_allclose(found["min_load"], [0, 0])
    np.testing.assert_allclose(found["experts_per_token"], [8 / 4, 0])


def test_a_steps_own_values_means_over_layers_and_each_layers(tmp_path):
    values = StepMeasurements(Program(tmp_path), 0).scalars(1, {"loss": 2.5, "layers": STATS})
    of_layers = {"load_balance_loss": 1.0, "router_entropy": 0.5, "max_load": 1.875, "experts_per_token": 2.0}
    of_layers |= {"min_load": 0.0, "idle_experts": 1 / 3}
    speeds = ("step_seconds", "tokens_per_second", "model_flops_per_second")
    assert values.keys() == {
        *("train/loss", "train/router_z_loss", *(f"train/{name}" for name in speeds)),
        *(f"{group}/{n}" for group in ("train", "layer_1", "layer_2") for n in (*of_layers, "default_vector_norm")),
    }
    assert {name: values[f"layer_1/{name}"] for name in of_layers} == pytest.approx(of_layers)
    assert values["train/load_balance_loss"] == 1.5 and values["train/router_z_loss"] == 5.0
    assert values["train/max_load"] == 1.875 and values["train/experts_per_token"] == 1.0  # largest; average
    assert values["train/min_load"] == 0.0 and values["train/idle_experts"] == pytest.approx(2 / 3)


def test_speed_counts_only_the_steps(tmp_path, monkeypatch):
    clock = iter([0.0, 4.0, 4.0, 10.0, 11.0, 11.0, 12.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    program = Program(tmp_path)
    measured = StepMeasurements(program, 0)
    values = measured.scalars(2, {"layers": None})  # 2 steps in 4 s
    assert values["train/step_seconds"] == 2.0 and values["train/tokens_per_second"] == 8 * 32 / 2
    assert values["train/model_flops_per_second"] == 128 * train_flops_per_token(program.config, 257)
    measured.restart(2)  # 6 s went into an evaluation
    assert measured.scalars(3, {"layers": None})["train/step_seconds"] == 1.0
    assert measured.scalars(3, {"layers": None})["train/step_seconds"] == 1.0  # no step has passed
    assert measured.mean_tokens_per_second() == 3 / 5 * 256
