"""Settings: what is refused, what passes, and the ways in and out."""

import functools
import json
import math
import operator
import re

import jax.numpy as jnp
import pytest
from helpers.refusals import refused

from configs import paper, quickstart
from default_moe import config
from default_moe.config import Config, MoEConfig, default_config, to_config_dict


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("moe.num_experts", 0, "at least 1"),
        ("moe.top_k", 0, "between 1 and moe.num_experts = 8"),
        ("moe.top_k", 9, "between 1 and moe.num_experts = 8"),
        ("moe.expert_dim", 0, "at least 1"),
        ("moe.router", "densemix", "'default', 'default_sampled', 'default_threshold', 'dense', 'densemixer'"),
        ("moe.default.ema_decay", 1.01, "[0, 1]"),
        ("moe.default.ema_decay", -0.1, "[0, 1]"),
        ("moe.default.substitute", "both", "'forward', 'backward'"),
        ("moe.default.ema_init", "ones", "'zeros', 'gaussian'"),
        ("moe.load_balance_weight", -1.0, "at least 0"),
        ("moe.dtype", "float16", "'float32', 'bfloat16'"),
        ("moe.matmul", "dense", "'auto', 'blocks', 'ragged', 'mosaic', 'hopper', 'tokamax'"),
        ("moe.expert_parallel", "scatter", "'auto', 'gather', 'exchange'"),
        ("model.num_heads", 3, "must divide model.d_model = 128"),
        ("model.num_heads", 128, "model.d_model / model.num_heads is 1, but rotary"),
        ("model.head_dim", 7, "model.head_dim is 7, but rotary"),
        ("model.head_dim", 2**17, "at most 65536"),
        ("model.num_kv_heads", 3, "must divide model.num_heads = 4"),
        ("model.num_kv_heads", 8, "must divide model.num_heads = 4"),
        ("model.attention_window", 0, "at least 1"),
        ("model.norm", "batch", "'layer', 'rms'"),
        ("model.qk_norm", "all", "'none', 'head', 'full'"),
        ("model.num_dense_layers", 5, "between 0 and model.num_layers = 4"),
        ("model.moe_every", 0, "at least 1"),
        ("model.moe_every", 5, "leave none of 4 layers with experts: model.num_dense_layers=4 says so"),
        ("model.dense_layers", "1,2,3", "leave none of 4 layers with experts"),
        ("model.dense_layers", "2,4", "must be numbers of layers from 0 to 3, as in '3,7'"),
        ("model.dense_layers", "1;2", "must be numbers of layers from 0 to 3"),
        ("model.remat", "some", "'none', 'dots', 'full'"),
        ("model.dtype", "int8", "'float32', 'bfloat16'"),
        ("data.name", "text_files", "data.files is not set"),
        ("data.validation_fraction", 0.0, "between 0 and 1"),
        ("data.tokenizer", "bpe:100", "at least 257"),
        ("train.batch_size", 0, "at least 1"),
        ("train.grad_accum_steps", 5, "multiple of train.grad_accum_steps"),
        ("train.profile_steps", "a:b", "train.profile_steps is 'a:b', but must be FIRST:END, '10:13' for"),
        ("train.profile_steps", "13:10", "END above FIRST"),
        ("train.profile_steps", "0:3", "FIRST from 1"),
        ("train.profile_steps", "401:410", "to train.num_steps = 400"),
        ("optim.peak_lr", 0.0, "positive"),
        ("optim.peak_lr", float("inf"), "finite"),
        ("optim.peak_lr", 1e-13, "not below 1e-12"),
        ("optim.weight_decay", math.inf, "finite"),
        ("optim.weight_decay", 400.0, "below 1 / optim.peak_lr = 333"),
        ("optim.eps", 2.0, "at most 1"),
        ("optim.clip_norm", 1e-9, "not be below optim.eps = 1e-08"),
        ("model.norm_epsilon", 1e9, "[0, 1]"),
        ("train.seed", 2**32, "at most 4294967295"),
        ("data.tokenizer", "", "data.tokenizer is empty"),
        ("optim.b2", 1.5, "[0, 1]"),
        ("optim.b1", 1.0, "below 1"),
        ("optim.momentum", 1.0, "below 1"),
        ("optim.name", "adam", "'adamw', 'muon'"),
        ("optim.schedule", "step", "'cosine', 'linear', 'constant', 'wsd'"),
        ("optim.decay_fraction", 1.5, "[0, 1]"),
        ("data.files", "*.txt", "data.name='text_files'"),
        ("mesh.rules", (("embd", "fsdp"),), "did you mean 'embed'?"),
        ("mesh.rules", ("embed",), "pairs"),
        ("mesh.data", 0, "positive"),
        ("mesh.fsdp", -1, "at most one of them -1"),
        ("checkpoint.keep_last", 0, "at least 1"),
        ("eval.sets", "texts/*.md", "must begin with a name: 'code:texts/*.md', say"),
        ("eval.sets", "a:x.md,b c:y.md", "eval.sets has the part 'b c:y.md', but must be NAME:GLOB"),
        ("eval.sets", f"{'n' * 41}:x.md", "NAME of at most 40 letters, digits,"),
        ("eval.sets", "a:x.md,b:", "eval.sets has the part 'b:', but must be"),
        ("eval.sets", "a:x.md,a:y.md", "eval.sets has two sets called 'a'"),
        ("eval.temperature", -1.0, "at least 0"),
        (
            "log.wandb",
            "team/moe",
            "log.wandb is 'team/moe', but a project's name has at most 128 characters, and none of",
        ),
        ("eval.temperature", 1e-320, "not below 1e-6"),
        ("moe.capacity_factor", math.inf, "finite"),
        ("moe.capacity_factor", 1e308, "at most 2147483647"),
        ("moe.router_noise_std", math.nan, "at least 0"),
        ("moe.loss_free.bias_update_rate", math.nan, "positive"),
        ("moe.remoe.lambda_factor", math.inf, "finite"),
        ("moe.sparsemixer.mask_threshold", math.nan, "finite"),
        ("optim.b2", 1 - 1e-12, "below 1, in float32 too"),
        ("optim.clip_norm", math.nan, "positive"),
        ("model.d_model", 2**32, "at most 1048576"),
        ("model.dense_dim", 10**30, "at most 16777216"),
        ("train.batch_size", 10**30, "at most 2147483647"),
        ("train.sequence_length", 2**28 - 1, "at most 1048576"),
        ("train.batch_size", 2**24, "less than 2**31 tokens"),
        ("eval.batch_size", 2**24, "less than 2**31 tokens"),
        ("train.num_steps", 10**400, "a number of 1329 bits, but must be at most"),
        ("data.tokenizer", "bpe:\u0663\u0660\u0660", "at least 257"),
        ("data.tokenizer", f"bpe:{'9' * 30}", "at most 9999999"),
        ("data.dir", "a\0b", "'a\\x00b', but must be text without NUL"),
        ("data.dir", "~nosuchuser/x", "home directory of a known user"),
        ("init_from", "n" * 300, "255 in each name"),
        ("eval.prompt", "\ud800", "lone surrogates"),
        ("eval.prompt", "x" * 10**6, "..., but must have at most 65536 characters"),
        ("mesh.rules", (("batch", "data"), ("batch", "fsdp")), "'batch' twice"),
        ("mesh.rules", (("batch", ("data", "data")),), "each once at most"),
    ],
)
def test_a_value_that_cannot_work_is_refused_in_one_line_that_says_what_would(key, value, words):
    config = default_config()
    *groups, name = key.split(".")
    functools.reduce(operator.getitem, groups, config)[name] = value
    with refused(re.escape(words)) as error:
        Config.from_config_dict(config)
    assert key.split(".")[0] in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({"model": {"d_modle": 3}}, "'model.d_modle'; did you mean 'd_model'?"),
        ({"modle": {}}, "'modle'; did you mean 'model'?"),
        ({"model": {"d_model": "wide"}}, "model.d_model is 'wide', but must be of type int"),
        ({"model": {"d_model": True}}, "must be of type int"),
        ({"train": {"num_steps": 1.5}}, "must be of type int"),
        ({"init_optimizer": True}, "init_from is not set, but init_step, init_optimizer and init_new need it"),
        ({"init_new": "router"}, "init_from is not set, but init_step, init_optimizer and init_new need it"),
        (
            {"init_new": "router", "init_from": "runs/a", "init_optimizer": True},
            "init_optimizer takes over the moments",
        ),
        ({"moe": {"router": "hash"}, "optim": {"train_only": "router"}}, "that of moe.router='hash' never changes"),
        ({"optim": {"schedule": "wsd", "warmup_fraction": 0.9}}, "optim.decay_fraction are 0.9, 0.2, but with"),
        ({"optim": {"clip_norm": 10**400}}, "optim.clip_norm is a number of 1329 bits, but must be finite"),
        ({"model": {"d_model": 2**20}, "moe": {"num_experts": 2**16, "expert_dim": 2**24}}, "less than 2**56"),
        ({"model": {"d_model": 2**20, "num_heads": 1024, "head_dim": 2**16, "num_layers": 4096}}, "less than 2**56"),
        ({"model": {3: 4}}, "no setting 'model.3'"),
        ([], "the config is [], but must be a group of settings"),
        ({"model": 3}, "must be a group of settings"),
    ],
)
def test_unknown_keys_and_wrong_types_in_a_stored_config_are_refused(mapping, words):
    with refused(re.escape(words)):
        Config.from_mapping(mapping)


def test_a_config_survives_json_and_config_dict():
    config = default_config()
    config.model.d_model = 64
    config.eval.batch_size = 3
    config.optim.peak_lr = 1
    config.moe.num_experts = 4
    built = Config.from_config_dict(config)
    assert (built.model.d_model, built.eval.batch_size, built.optim.peak_lr) == (64, 3, 1.0)
    assert MoEConfig.from_mapping(config.moe.to_dict()).num_experts == 4
    assert Config.from_mapping(json.loads(json.dumps(built.to_dict()))) == built
    assert Config.from_config_dict(to_config_dict(built)) == built


def test_sets_to_evaluate_are_one_text_or_in_a_config_file_a_mapping():
    sets = {"code": "a/*.md,./b:c.txt", "wiki-2.0": "./odd:name.md"}
    text = "code:a/*.md,./b:c.txt,wiki-2.0:./odd:name.md"
    config = default_config()
    config.eval.sets = sets
    built = Config.from_config_dict(config)
    assert built.eval.sets == config.eval.sets == to_config_dict(built).eval.sets == text
    assert built.eval.globs_by_set == Config.from_mapping({"eval": {"sets": text}}).eval.globs_by_set == sets
    assert Config.from_mapping({"eval": {"sets": "a: x.md , b:y.md,"}}).eval.globs_by_set == {"a": "x.md", "b": "y.md"}
    assert Config().eval.globs_by_set == Config.from_mapping({"eval": {"sets": ""}}).eval.globs_by_set == {}
    for odd in ({"a": "x.md,b:y.md"}, {"a": 3}, {"": "x.md"}):
        with refused("eval.sets "):
            config.eval.sets = odd
    assert default_config().eval.sets is None  # nothing of it is shared


def test_no_limit_is_larger_than_what_there_is():
    config = default_config()
    config.optim.clip_norm = math.inf
    assert Config.from_config_dict(config).optim.clip_norm == math.inf
    assert MoEConfig(capacity_factor=1e9).capacity(12) == 12


def test_a_misspelt_key_in_a_config_file_raises_where_it_stands():
    with pytest.raises(AttributeError, match="d_model"):
        default_config().model.d_modle = 3


def test_expert_compute_type_follows_the_model_unless_set():
    config = default_config()
    config.model.dtype = "bfloat16"
    assert Config.from_config_dict(config).moe.dtype == "bfloat16"
    config.moe.dtype = "float32"
    assert Config.from_config_dict(config).moe.dtype == "float32"
    assert MoEConfig(dtype=jnp.bfloat16).dtype == "bfloat16"


@pytest.mark.parametrize("arguments", ["8c1", "8c2", "32c1", "32c2", "32c4", "8c1,d_model=512", "32c4,d_model=2048"])
def test_the_papers_configs_are_valid(arguments):
    config = paper.get_config(arguments)
    config.data.files = "*.parquet"
    built = Config.from_config_dict(config)
    assert f"{built.moe.num_experts}c{built.moe.top_k}" == arguments.split(",")[0]


@pytest.mark.parametrize("arguments", ["9c1", "8c1,d_model=700", "8c1,layers=3", ""])
def test_a_config_that_is_not_the_papers_is_refused(arguments):
    with refused("is not"):
        paper.get_config(arguments)


def test_the_quickstart_is_valid():
    built = Config.from_config_dict(quickstart.get_config())
    assert (built.moe.method.name, built.data.name) == ("default", "python_stdlib")


# Settings of groups that have a mark as a whole are not listed one by one.
MARKED = {
    "MAY_CHANGE": "checkpoint.* data.dir data.files data.prefetch eval.* log.* mesh.* model.attention "
    "model.output_z_weight model.remat model.scan_unroll moe.coupling_margin moe.coupling_weight "
    "moe.expert_parallel moe.load_balance_over moe.load_balance_weight moe.matmul moe.plugin moe.router_z_weight "
    "moe.sequence_balance_weight moe.simbal_weight optim.* train.log_every_steps train.max_bad_steps "
    "train.num_steps train.profile_steps",
    "NO_EFFECT": "data.dir data.prefetch eval.prompt eval.sample_tokens eval.temperature log.* train.max_bad_steps "
    "train.profile_steps",
    "TUNED": "moe.bias.* moe.coupling_margin moe.coupling_weight moe.default.* moe.default_sampled.* "
    "moe.default_threshold.* moe.densemixer.* moe.expert_threshold.* moe.load_balance_weight moe.loss_free.* "
    "moe.quantile.* moe.remoe.* moe.router_init_std moe.router_noise_std moe.router_z_weight "
    "moe.sequence_balance_weight moe.simbal_weight moe.sparsemixer.* optim.*",
}


@pytest.mark.parametrize("mark", MARKED)
def test_which_settings_have_a_mark(mark):
    names = [name for name, _ in config.flat_items(default_config().to_dict())]
    found = {name for name in names if config.marked(name, getattr(config, mark))}
    groups = {f"{name.rpartition('.')[0]}." for name in names} - {"."}
    whole = [g for g in groups if all(name in found for name in names if name.startswith(g))]
    assert {next((f"{g}*" for g in whole if name.startswith(g)), name) for name in found} == {*MARKED[mark].split()}
    assert not config.marked("corpus_hash", config.MAY_CHANGE)


def test_none_is_no_name():
    """A flag can give no other value to a setting that may stay unset."""
    config = Config.from_mapping({"data": {"dir": "None"}, "init_from": "None"})
    assert config.data.dir is None and config.init_from is None
    assert Config.from_mapping({"eval": {"prompt": "None"}}).eval.prompt == "None"
