"""The report on a run: what is observed, against loops; and the commands, the files and the page that they leave."""

import html.parser
import json
import shutil
import subprocess

import flax.linen as nn
import jax
import nbclient
import nbformat
import numpy as np
import pytest
from helpers.refusals import refused
from helpers.tiny_runs import REPOSITORY, environment, run_commands, tiny_config, trained, write_corpus

import default_moe
from default_moe.analysis import domains, watch
from default_moe.analysis.observation import observe
from default_moe.config import DataConfig, MeshConfig
from default_moe.data import open_data
from default_moe.moe import MoELayer
from default_moe.training.step import model_inputs

ANALYSIS = "default_moe/analysis/__main__.py"
PICTURES = {
    "training": ["training_load", "training_loss", "training_max_load", "training_router_entropy"],
    "routing": ["routing_confidence", "routing_entropy", "routing_load", "routing_position", "routing_saturation"],
    "experts": ["experts_coactivation", "experts_norms", "experts_specialisation", "experts_transitions"],
    "defaults": [f"defaults_{name}" for name in ("drift", "explained", "norms", "share", "similarity")],
    "domains": ["domains_information", "domains_share"],
    "tokens": [],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of Default MoE in which dense and MoE layers alternate, K = 2, and one of top-k with K = 1."""
    folder = tmp_path_factory.mktemp("report")
    write_corpus(folder / "text")
    sections = {
        "train": {"num_steps": 8},
        "eval": {"every_steps": 4, "num_batches": 1},
        "checkpoint": {"every_steps": 4},
    }
    alternating = {"num_layers": 4, "num_dense_layers": 0, "moe_every": 2}
    trained(tiny_config(folder, model=alternating, **sections), folder / "default")
    trained(tiny_config(folder, moe={"router": "topk", "top_k": 1}, **sections), folder / "topk")
    return folder


@pytest.fixture(scope="module")
def reported(runs):
    """What each command prints, by what was asked."""
    workdir = f"--workdir={runs / 'default'}"
    few = "--tokens=300"
    texts = runs / "text"
    commands = {
        "report": [
            "report",
            workdir,
            few,
            f"--domains=zero:{texts}/0.txt,one:{texts}/1.txt",
            f"--against={runs / 'topk'}",
        ],
        "defaults": ["defaults", f"--workdir={runs / 'topk'}"],
        "experts": ["experts", f"--workdir={runs / 'topk'}", few],
        "watch": ["watch", workdir],
    }
    done = run_commands([[ANALYSIS, *command] for command in commands.values()], runs, environment())
    return dict(zip(commands, done, strict=True))


def test_what_is_observed_is_what_loops_find(runs):
    """Every expert's answer to every token, in float64, for the layer that sees nothing but embeddings' sum."""
    model = default_moe.load(runs / "default")
    rows = open_data(model.config.data, lambda line: None).validation_rows(32)
    seen = observe(model, rows, 5 * 32, experts=True)
    assert len(seen.tokens) == 5 * 32 and seen.rows.max() == 4 and seen.probs.shape == (2, 160, 8)
    again = observe(model, rows, 5 * 32)
    np.testing.assert_array_equal(again.chosen, seen.chosen)
    assert not again.experts and seen.chosen.sum(axis=-1).min() == seen.chosen.sum(axis=-1).max() == 2
    assert (seen.first == np.where(seen.chosen, seen.probs, 0).argmax(axis=-1)).all()

    params = model.params["moe_layers"]["moe"]["experts"]
    x_YTD = inputs_of_layers(model, rows)
    ema_YND = np.asarray(model.variables["default_vectors"]["moe_layers"]["moe"]["ema"], np.float64)
    for layer in range(2):
        gate, up, down = (np.asarray(params[name][layer], np.float64) for name in ("gate", "up", "down"))
        expected = {name: np.zeros_like(seen.experts[name][layer]) for name in ("weight", "square", "rest", "norm")}
        outputs, totals = np.zeros((160, 16)), np.zeros((2, 2, 8, 16))
        for token, x in enumerate(x_YTD[layer]):
            for i in range(8):
                hidden = x @ gate[i]
                answer = (hidden / (1 + np.exp(-hidden)) * (x @ up[i])) @ down[i]
                p, group = seen.gates[layer, token, i], 0 if seen.chosen[layer, token, i] else 1
                for kind, weight in enumerate((1, p**2)):
                    expected["weight"][kind, group, i] += weight
                    expected["square"][kind, group, i] += weight * answer @ answer
                    expected["rest"][kind, group, i] += weight * ((answer - ema_YND[layer, i]) ** 2).sum()
                    totals[kind, group, i] += weight * answer
                expected["norm"][group, i] += np.linalg.norm(answer)
                outputs[token] += p * (answer if group == 0 else ema_YND[layer, i])
        for name, values in expected.items():
            np.testing.assert_allclose(seen.experts[name][layer], values, rtol=2e-4, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(seen.experts["total"][layer], totals, rtol=2e-3, atol=1e-5)
        np.testing.assert_allclose(
            seen.experts["output_norm"][layer], np.linalg.norm(outputs, axis=-1).sum(), rtol=1e-4
        )
        assert seen.experts["tokens"][layer] == 160


def inputs_of_layers(model, rows) -> np.ndarray:
    """What enters each MoE layer, float64 [Y, T, D], taken from the layers as they are called one by one."""
    seen = []

    def keep(call, args, kwargs, context):
        if isinstance(context.module, MoELayer) and context.method_name == "__call__":
            jax.debug.callback(lambda x: seen.append(np.asarray(x, np.float64)), args[0], ordered=True)
        return call(*args, **kwargs)

    with nn.intercept_methods(keep), model.program.context():
        inputs = model_inputs(rows.batch(0, 5), model.config)
        model.program.model.apply({"params": model.params, **model.variables}, train=False, **inputs)
    return np.stack(seen).reshape(len(seen), -1, seen[0].shape[-1])


def test_eight_devices_observe_what_one_does(runs):
    one, eight = (default_moe.load(runs / "default", 8, mesh) for mesh in (None, MeshConfig(data=4, expert=2)))
    rows = open_data(one.config.data, lambda line: None).validation_rows(32)
    ours, theirs = (observe(model, rows, 11 * 32, experts=True) for model in (one, eight))
    assert len(ours.tokens) == 11 * 32
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_allclose(ours.probs, theirs.probs, atol=1e-5)
    for name, values in ours.experts.items():
        np.testing.assert_allclose(theirs.experts[name], values, rtol=1e-3, atol=1e-3, err_msg=name)


def test_a_report_has_every_part_and_its_numbers(runs, reported):
    code, output, error = reported["report"]
    assert code == 0, error
    folder = runs / "default" / "analysis"
    for name in sum(PICTURES.values(), ["training_balance"]):
        numbers = json.loads((folder / f"{name}.json").read_text(), parse_constant=pytest.fail)
        assert numbers["title"] and len(numbers["caption"]) > 40
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert b"<svg" in (folder / f"{name}.svg").read_bytes()
    assert sorted(path.stem for path in folder.glob("*.png")) == sorted(sum(PICTURES.values(), ["training_balance"]))

    def numbers(name):
        return json.loads((folder / f"{name}.json").read_text())

    assert numbers("routing_load")["layers"] == [1, 3]
    np.testing.assert_allclose(np.mean(numbers("routing_load")["load"], axis=1), 1)
    saturation = numbers("routing_saturation")
    assert saturation["step"] == [4, 8] and saturation["layers"]["layer 3"][1] == 1
    assert numbers("training_load")["step"] == list(range(1, 9))
    assert set(numbers("training_loss")) == {"title", "caption", "default", "topk"}
    assert numbers("domains_share")["domains"] == ["zero", "one"]
    assert numbers("defaults_drift")["layers"]["layer 1"][-1] == 0 < numbers("defaults_drift")["layers"]["layer 1"][0]
    assert "layer 3: default vectors explain" in output and "not measured yet" in (folder / "report.html").read_text()


class Page(html.parser.HTMLParser):
    """Counts what is in a page, and what it would fetch."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.fetched, self.shown = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        self.fetched += [values[name] for name in ("src", "href") if name in values]
        if tag == "span" and "data-e" in values:
            self.shown.append(values)


def test_the_page_needs_no_network(runs, reported):
    text = (runs / "default" / "analysis" / "report.html").read_text()
    page = Page(text)
    assert page.tags.count("img") == len(sum(PICTURES.values(), ["training_balance"]))
    assert page.fetched and all(link.startswith(("data:", "#")) for link in page.fetched)
    assert len(page.shown) == 2 * 400  # tokens of two layers
    assert all(span["title"].startswith(f"expert {span['data-e']}: ") for span in page.shown)
    assert all(f".e{i}{{background:" in text for i in range(8))


@pytest.mark.browser
def test_a_browser_opens_the_page_without_an_error(runs, reported, tmp_path):
    def open_page(file):
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
        done = subprocess.run([*command, f"file://{file}"], capture_output=True, text=True, timeout=120)
        return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]

    page = runs / "default" / "analysis" / "report.html"
    shown, complaints = open_page(page)
    assert 'id="coloured"' in shown or "id=coloured" in shown
    assert complaints == []
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text().replace("addEventListener", "addEventListenerr", 1))
    assert open_page(broken)[1] != []  # it would be seen


def test_the_notebook_runs(runs, monkeypatch):
    """On a small run in the place of the quickstart: every cell, and what it says about that run."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    path = REPOSITORY / "default_moe" / "analysis" / "tour.ipynb"
    notebook = nbformat.reads(path.read_text().replace("runs/quickstart", str(runs / "default")), 4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(runs)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.get("text", "") for output in outputs)
    assert printed.startswith("step 8, 'default', 2 of 8 experts\ndef load(path):")
    assert "layer 3: tokens by expert" in printed and "layer 1: R2 " in printed and "topk     [" in printed
    assert sum("<span class=e" in output.get("data", {}).get("text/html", "") for output in outputs) == 1


def test_a_run_is_watched(runs, reported):
    code, output, error = reported["watch"]
    assert code == 0, error
    first, loss, held_out, speed, head, *layers = output.splitlines()
    assert first == f"{runs / 'default'}: 'default', step 8 of 8"
    logged = [json.loads(line) for line in (runs / "default" / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in logged if "train/loss" in line][-1]
    assert loss.startswith(f"loss       {last['train/loss']:.4f}  █")  # the first is the highest
    assert held_out.split()[-1] <= held_out.split()[2] and "tokens/s, 0 minutes left" in speed
    assert head.split() == ["layer", *watch._COLUMNS] and [line.split()[0] for line in layers] == ["1", "3"]
    assert float(layers[0].split()[2]) == pytest.approx(last["layer_1/router_entropy"], abs=1e-3)
    assert watch.curve(np.arange(9.0)) == "▁▂▃▄▅▅▆▇█" and watch.curve(np.ones(200)) == "▁" * 60


def test_a_run_without_default_vectors(runs, reported):
    code, _, error = reported["defaults"]
    assert code == 2 and "has no default vectors: its method is 'topk'" in error
    code, output, error = reported["experts"]
    assert code == 0, error
    names = sorted(path.stem for path in (runs / "topk" / "analysis").glob("*.png"))
    assert names == ["experts_norms", "experts_specialisation"]  # one layer, one expert per token
    assert "layer 1: token" in output


REFUSALS = {
    "a domain without files": (["domains", "--domains=a:nowhere/*.txt,b:text/0.txt"], "names no file"),
    "one domain": (["domains", "--domains=a:text/0.txt"], "one domain compares with nothing"),
    "no glob": (["domains", "--domains=a,b"], "--domains has 'a', but must be different names with a glob each"),
    "no text": (["tokens", "--text=nowhere.txt"], "--text cannot be read from nowhere.txt"),
    "no such run to compare with": (["training", "--against=nowhere"], "--against is nowhere, which is no run"),
    "nothing to watch": (["watch", "--step=3"], "watch takes --workdir and nothing else"),
    "no such step": (["routing", "--step=7"], "step 7"),
    "a setting of the model": (["routing", "--config.moe.top_k=1"], "moe.* is fixed by the checkpoint"),
}


def test_what_cannot_be_is_one_line(runs):
    commands = [[ANALYSIS, *command, "--workdir=default", "--tokens=64"] for command, _ in REFUSALS.values()]
    dense = tiny_config(runs, model={"num_dense_layers": 2}, train={"num_steps": 1})
    trained(dense, runs / "dense")
    commands += [[ANALYSIS, "report", f"--workdir={name}"] for name in ("dense", "nowhere")]
    words = [words for _, words in REFUSALS.values()] + ["has no MoE layers with several experts", "nowhere"]
    for command, (code, _, error), expected in zip(
        commands, run_commands(commands, runs, environment()), words, strict=True
    ):
        *_, last = error.splitlines()
        assert code == 2 and last.startswith("error: ") and expected in last, (command, error)
        assert "Traceback" not in error


def test_the_standard_library_has_domains(tmp_path):
    texts = domains.read_domains(None, DataConfig(), 1000)
    assert len(texts) == 6 and "asyncio" in texts and all(sum(map(len, found)) > 1000 for found in texts.values())
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    found = domains.read_domains({"x": f"{tmp_path}/a.jsonl", "y": f"{tmp_path}/a.jsonl"}, DataConfig(), 10)
    assert found == {"x": ["one", "two"], "y": ["one", "two"]}
    (tmp_path / "empty.txt").write_text("")
    with refused("hold no text"):
        domains.read_domains({"x": f"{tmp_path}/empty.txt"}, DataConfig(), 10)


def test_the_domains_of_planted_text_are_its_generators():
    texts = domains.read_domains(None, DataConfig(name="planted/3"), 3000)
    assert list(texts) == ["a", "b", "c"]
    for letter, found in texts.items():
        assert len(found) == 3 and {text[::16] for text in found} == {64 * letter}
    with refused("data.validation_fraction is 1e-06, which holds out no text of some generators"):
        domains.read_domains(None, DataConfig(name="planted/3", validation_fraction=1e-6), 3000)


def test_a_checkpoint_that_is_damaged_is_left_out(runs, tmp_path):
    shutil.copytree(runs / "topk", tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "4" / "meta.json").write_text("{}")
    command = [ANALYSIS, "routing", f"--workdir={tmp_path / 'run'}", "--tokens=64"]
    [(code, output, error)] = run_commands([command], runs, environment())
    assert code == 0 and "step 4 is left out" in output + error
