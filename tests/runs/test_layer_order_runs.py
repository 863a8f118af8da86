"""A whole run of a model whose dense layers are not the first ones: its files say which layer is which."""

import json
import os
import signal

import pytest
from helpers.tiny_runs import assert_same_state, at_step, evaluated, metrics, tiny_config, train, trained

from default_moe.analysis import gradients_report
from default_moe.analysis.gradients import Checkpoint


def test_a_run_names_its_layers_and_continues_bit_for_bit(folder):
    config = tiny_config(
        folder,
        model={"num_layers": 6, "moe_every": 2, "dense_layers": "3"},  # DMDDDM
        train={"num_steps": 8},
        eval={"every_steps": 8},
    )
    assert "router 'default', 8 experts" in trained(config, folder / "whole")
    loads = [json.loads(line) for line in (folder / "whole" / "expert_load.jsonl").read_text().splitlines()]
    assert len(loads) == 9 and all(load["layers"] == [1, 5] for load in loads)
    *_, last = metrics(folder / "whole")
    assert {name.split("/")[0] for name in metrics(folder / "whole")[0] if "layer_" in name} == {"layer_1", "layer_5"}
    report, output = evaluated(folder / "whole", 8)
    table = output.split("  layer ")[1].splitlines()[1:3]
    assert [line.split()[0] for line in table] == ["1", "5"] and len(report["layers"]) == 2
    assert report["loss"] == pytest.approx(last["eval/loss"], rel=0.2)  # there of some batches

    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        train(config, folder / "stopped")
    assert metrics(folder / "stopped")[-1]["step"] < 8
    trained(config, folder / "stopped")
    assert metrics(folder / "stopped") == metrics(folder / "whole")
    assert_same_state(folder / "stopped", folder / "whole", 8)

    found = gradients_report.as_json([], [Checkpoint(config, 257, 8, {}, {}, None)], "dense", {})
    assert found["layers"] == [1, 5]
