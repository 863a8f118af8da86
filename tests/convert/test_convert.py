"""Runs to Hugging Face's folders and back, without transformers, and what cannot be read or written, in a line each."""

import json
import os
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from helpers.hf_models import our_logits, our_params
from helpers.tiny_runs import evaluate, metrics, tiny_settings, trained, write_corpus
from safetensors.numpy import load_file, save_file

from default_moe.config import Config
from default_moe.convert.checkpoints import Weights, empty_array, model_shapes, write_checkpoint
from default_moe.convert.exporting import export_model
from default_moe.convert.families import DEFAULT_MOE, FAMILIES, choose_family
from default_moe.convert.importing import import_model
from default_moe.data import open_data, tokenizer_from_dict
from default_moe.errors import ConfigError
from default_moe.runs.checkpoint import CheckpointStore
from default_moe.training.program import Program

MODEL = {"d_model": 16, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "norm": "rms", "num_dense_layers": 0}
MOE = {"router": "topk", "num_experts": 4, "top_k": 2, "expert_dim": 12}
SETTINGS = {
    "olmoe": ({"qk_norm": "full"}, {}),
    "qwen3_moe": (
        {"qk_norm": "head", "head_dim": 6, "num_dense_layers": 1, "dense_dim": 20, "tie_embeddings": True},
        {"normalize_weights": True},
    ),
    "qwen3_moe, dense layers in between": (
        {
            "qk_norm": "head",
            "num_layers": 6,
            "moe_every": 2,
            "num_dense_layers": 1,
            "dense_layers": "3",
            "dense_dim": 20,
        },
        {},
    ),
    "mixtral": ({"attention_window": 8}, {"normalize_weights": True}),
}


def settings(model, moe):
    return Config.from_mapping(
        {"model": {**MODEL, **model}, "moe": {**MOE, **moe}, "train": {"batch_size": 1}, "mesh": {"data": 1}}
    )


def save_run(config, workdir):
    """A run that has not been trained."""
    program = Program(config, 257, jax.devices()[:1])
    state = program.new_state()
    with CheckpointStore(workdir) as store:
        meta = {"config": config.to_dict(), "tokenizer": {"kind": "bytes"}, "step": 0}
        figures = {"eval/loss": 2.5, "eval/bits_per_byte": 3.6067}
        store.save(0, {"params": state.params, "step": state.step}, meta, figures)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """For each family a run, and what it is exported to, in several files."""
    here = tmp_path_factory.mktemp("models")
    for name, (model, moe) in SETTINGS.items():
        save_run(settings(model, moe), here / name)
        family, why = export_model(here / name, here / f"{name}_out", None, "float32", shard_bytes=17_000)
        assert family.model_type == name.split(",")[0] and not why
    return here


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_comes_back_bit_for_bit(models, tmp_path, name):
    folder = models / f"{name}_out"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = {file.name: load_file(file) for file in folder.glob("*.safetensors")}
    assert len(files) > 3
    assert {tensor: file for file, tensors in files.items() for tensor in tensors} == index["weight_map"]
    sizes = [sum(array.nbytes for array in tensors.values()) for tensors in files.values()]
    assert sum(sizes) == index["metadata"]["total_size"] and max(sizes) <= 17_000
    import_model(folder, tmp_path / "run")
    for path, before in jax.tree_util.tree_leaves_with_path(our_params(models / name)[1]):
        after = our_params(tmp_path / "run")[1]
        for key in path:
            after = after[key.key]
        np.testing.assert_array_equal(before, after)
    tokens = np.arange(30).reshape(2, 15)
    np.testing.assert_array_equal(our_logits(models / name, tokens), our_logits(tmp_path / "run", tokens))
    assert {path.name for path in folder.iterdir()} > {"config.json", "generation_config.json", "README.md"}
    card = (folder / "README.md").read_text()
    assert "held-out loss is 2.5000 nats per token, 3.6067 bits per byte (by the training)" in card
    num_layers = SETTINGS[name][0].get("num_layers", 3)
    assert f"{num_layers} layers of width 16, 4 experts of width 12, 2 for each token.\nNot trained with" in card
    assert "model.norm = 'rms'\n" in card and str(models) not in card
    assert not list(models.glob(".*"))  # nothing unfinished


def test_bfloat16_is_rounded_once(models, tmp_path):
    export_model(models / "olmoe", tmp_path / "out", 0, "bfloat16")
    whole = {
        name: array for file in (models / "olmoe_out").glob("*.safetensors") for name, array in load_file(file).items()
    }
    rounded = load_file(tmp_path / "out" / "model.safetensors")
    assert rounded.keys() == whole.keys()
    for name, array in rounded.items():
        np.testing.assert_array_equal(array, whole[name].astype(ml_dtypes.bfloat16))
    import_model(tmp_path / "out", tmp_path / "run")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_an_imported_model_is_evaluated_and_trained_on_from_where_it_was(models, tmp_path):
    """The loss of the first step is the model's own, whether default vectors learn beside it or not."""
    import_model(models / "olmoe_out", tmp_path / "run")
    write_corpus(tmp_path / "text")
    tokenizer = str(models / "olmoe_out" / "tokenizer.json")
    base = tiny_settings(tmp_path, train={"num_steps": 1, "log_every_steps": 1}, data={"tokenizer": tokenizer})

    def on_text(config):
        return Config.from_mapping({**config.to_dict(), **{name: base[name] for name in ("data", "eval")}})

    code, output = evaluate(tmp_path / "run", override=on_text)
    assert code == 0 and "step 0, text_files" in output

    model = {**settings(*SETTINGS["olmoe"]).to_dict()["model"], "vocab_size": 257}
    batch = {"init_from": str(tmp_path / "run"), "model": model}
    ramp = {"router": "default", "default": {"substitute_ramp_steps": 8, "warm_up_batches": 1}}
    for number, moe in enumerate(({}, ramp)):
        config = Config.from_mapping({**base, **batch, "moe": {**MOE, **moe}})
        trained(config, tmp_path / f"tuned_{number}")
        rows = open_data(config.data, lambda line: None).train_rows(config.train.sequence_length, config.train.seed)
        first = rows.batch(0, config.train.batch_size)
        logits = np.float64(our_logits(tmp_path / "run", first["inputs"]))
        chosen = np.take_along_axis(logits, first["targets"][..., None], axis=-1)[..., 0]
        loss = (np.log(np.exp(logits).sum(axis=-1)) - chosen).mean()
        assert metrics(tmp_path / f"tuned_{number}")[0]["train/loss"] == pytest.approx(loss, rel=1e-5)


def test_writing_takes_no_second_copy_of_the_weights(tmp_path):
    config = Config.from_mapping(
        {"model": {"vocab_size": 1 << 17, "d_model": 128, "num_layers": 1, "num_dense_layers": 1}}
    )
    params = jax.tree.map(lambda leaf: empty_array(leaf.shape), model_shapes(config, 257)["params"])
    rng = np.random.default_rng(0)
    for array in jax.tree.leaves(params):
        array[...] = rng.standard_normal(array.shape, np.float32)
    size = sum(array.nbytes for array in jax.tree.leaves(params))
    resident = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    write_checkpoint(tmp_path / "run", Weights(config, tokenizer_from_dict({"kind": "bytes"}), {"params": params}))
    assert memory("VmHWM") - resident < size / 4


def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def change_config(**values):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def change_tensors(change):
    def changed(folder):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return changed


def cut(folder):
    os.truncate(folder / "model.safetensors", 4000)


def no_shard(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "model-2.safetensors"}}')


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
BAD = {
    "another architecture": (change_config(model_type="gpt2"), "model_type is 'gpt2', but must be one of"),
    "another activation": (change_config(hidden_act="gelu"), "hidden_act is 'gelu', but only 'silu'"),
    "biases": (change_config(attention_bias=True), "attention_bias is True"),
    "clipped projections": (change_config(clip_qkv=8.0), "clip_qkv is 8.0"),
    "scaled positions": (change_config(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "rope of type 'yarn'"),
    "no width": (change_config(hidden_size=None), "hidden_size is None, but must be a positive number"),
    "dense layers that are no list": (
        change_config(model_type="qwen3_moe", moe_intermediate_size=12, mlp_only_layers=2),
        "mlp_only_layers is 2",
    ),
    "dense layers that are not there": (
        change_config(model_type="qwen3_moe", moe_intermediate_size=12, mlp_only_layers=[0, 3]),
        "mlp_only_layers is [0, 3], but must be numbers of layers",
    ),
    "half a layer": (change_config(num_hidden_layers=2.5), "num_hidden_layers is 2.5"),
    "more experts a token than there are": (change_config(num_experts_per_tok=9), "moe.top_k is 9"),
    "a small vocabulary": (change_config(vocab_size=200), "has ids up to 256, but vocab_size is 200"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json cannot be read: No such file"),
    "a config that is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "it is not JSON"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
    "no tensors": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors cannot be read"),
    "tensors cut off": (cut, "model.safetensors cannot be read: "),
    "an index of files that are not there": (no_shard, "model-2.safetensors cannot be read: No such file"),
    "a tensor less": (change_tensors(lambda t: t.pop(EXPERT)), f"has no tensor {EXPERT} (1 are missing)"),
    "a tensor more": (change_tensors(lambda t: t.update(bias=np.ones(2, np.float32))), "has a tensor bias that has no"),
    "a tensor of another shape": (
        change_tensors(lambda t: t.update({EXPERT: np.ones((2, 3), np.float32)})),
        f"{EXPERT} has the shape [2, 3], but must have [12, 16]",
    ),
    "a tensor of whole numbers": (
        change_tensors(lambda t: t.update({EXPERT: np.ones((12, 16), np.int32)})),
        f"{EXPERT} is of type I32",
    ),
}


@pytest.fixture(scope="module")
def whole(models):
    export_model(models / "olmoe", models / "whole", None, "float32")
    return models / "whole"


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_imported_is_named_and_nothing_is_written(whole, tmp_path, name):
    change, words = BAD[name]
    shutil.copytree(whole, tmp_path / "model")
    change(tmp_path / "model")
    with pytest.raises(ConfigError) as error:
        import_model(tmp_path / "model", tmp_path / "run")
    assert words in str(error.value) and "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["model"]


def test_nothing_is_written_over(whole, models, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "thesis.tex").write_text("years of work")
    for convert in (
        lambda: import_model(whole, tmp_path / "there"),
        lambda: export_model(models / "olmoe", tmp_path / "there", None, "float32"),
    ):
        with pytest.raises(ConfigError, match="is not an empty folder"):
            convert()
    assert os.listdir(tmp_path / "there") == ["thesis.tex"]


OTHERS = {
    "layer norms": ({"norm": "layer"}, {}, "model.norm is 'layer'"),
    "default vectors in the output": ({}, {"router": "default"}, "moe.router='default' adds to the output"),
    "a bias": ({}, {"router": "loss_free"}, "moe.balancer='bias' has a bias"),
    "a balancer's bias": ({}, {"router": "topk", "balancer": "quantile"}, "moe.balancer='quantile' has a bias"),
    "sigmoid scores": ({}, {"score_function": "sigmoid"}, "moe.score_function is 'sigmoid'"),
    "groups": ({}, {"num_groups": 2, "groups_per_token": 2}, "moe.num_groups is 2"),
    "larger weights": ({}, {"weight_scale": 2.5}, "moe.weight_scale is 2.5"),
    "shared experts": ({}, {"num_shared_experts": 1}, "moe.num_shared_experts is not 0"),
    "no experts": ({"num_dense_layers": 3}, {}, "there are no MoE layers"),
    "a window": ({"attention_window": 4, "qk_norm": "full"}, {}, "not as olmoe, since model.attention_window is set"),
    "a dense layer": ({"num_dense_layers": 1}, {}, "not as mixtral, since model.num_dense_layers is not 0"),
    "dense layers in between": ({"moe_every": 2}, {}, "not as mixtral, since model.moe_every or model.dense_layers"),
    "raw weights": ({}, {}, "not as mixtral, since moe.normalize_weights is False"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_no_public_family_computes_is_exported_with_code_of_its_own(name):
    model, moe, words = OTHERS[name]
    family, why = choose_family(settings(model, moe))
    assert family is DEFAULT_MOE and words in why


def test_a_method_that_no_family_computes_is_not_exported():
    for router in ("sparsemixer", "hash", "expert_threshold", "default_threshold"):
        with pytest.raises(ConfigError, match=rf"moe\.router is '{router}', but only models of 'topk', "):
            choose_family(settings({}, {"router": router}))


def test_what_only_trains_the_router_is_no_obstacle():
    for moe in (
        {"router": "default", "default": {"substitute": "backward"}},
        {"router": "default", "default": {"substitute_at_eval": False}},
        {"router": "probmoe"},
    ):
        config = settings(SETTINGS["olmoe"][0], moe)
        assert choose_family(config) == (FAMILIES["olmoe"], "")
