"""Every setting of a run: frozen dataclasses and their checks.

A config file starts from `default_config()` (a locked `ConfigDict`), changes fields and returns it. The program turns
the result into a `Config` once, with `Config.from_config_dict`, which checks every value; from there on settings are
immutable. A run stores its `Config` as JSON, never as Python.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from ml_collections import ConfigDict

from default_moe.config.eval_sets import split_sets
from default_moe.config.mappings import MAY_CHANGE, NO_EFFECT, TUNED, section_from_mapping
from default_moe.config.mesh import MeshConfig
from default_moe.config.model import ModelConfig
from default_moe.config.moe import MoEConfig
from default_moe.errors import check, quoted
from default_moe.methods.settings import (
    at_least,
    between,
    check_settings,
    names_of_files,
    one_of,
    path,
    positive,
    setting,
)


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes sequences."""

    name: str = setting(
        "python_stdlib",
        "'python_stdlib' (the standard library's sources), 'text_files' (what data.files names), 'planted/16' (text of "
        "16 random generators, see data/planted.py), or any TFDS text data set, 'c4/en' for instance.",
    )
    files: str | None = setting(
        None,
        "Glob or globs (separated by commas) of .txt, .md, .jsonl, .jsonl.gz or .parquet files, for 'text_files'.",
        names_of_files(),
        MAY_CHANGE,  # the corpus hash says whether the text is the same
    )
    text_field: str = setting("text", "The field that holds the text, in .jsonl, .parquet and TFDS data sets.")
    tokenizer: str = setting(
        "bytes", "'bytes', 'bpe:SIZE' (byte-level BPE trained on the corpus) or the path of a tokenizer.json.", path()
    )
    validation_fraction: float = setting(
        0.05, "Share of documents held out, above 0 and below 1; chosen by a hash of the document's name."
    )
    mask_documents: bool = setting(False, "No attention across document boundaries.")
    dir: str | None = setting(
        None,
        "Where prepared data is kept; None takes $DEFAULT_MOE_DATA or ~/.cache/default_moe.",
        path(),
        MAY_CHANGE,
        NO_EFFECT,
    )
    prefetch: int = setting(2, "Batches read ahead of the training step.", at_least(0, 1000), MAY_CHANGE, NO_EFFECT)

    def __post_init__(self) -> None:
        check_settings(self, "data")
        check(bool(self.name), "data.name is empty, but must name a corpus, 'python_stdlib' for instance")
        check(
            self.name != "text_files" or bool(self.files),
            "data.files is not set, but data.name='text_files' needs a glob there, 'texts/*.txt' for instance",
        )
        check(
            0 < self.validation_fraction < 1,
            f"data.validation_fraction is {self.validation_fraction}, but must lie between 0 and 1",
        )
        check(
            not self.files or self.name == "text_files",
            f"data.files is set, but data.name is {quoted(self.name)}: files are read with data.name='text_files'",
        )
        check(bool(self.tokenizer), "data.tokenizer is empty, but must be 'bytes', 'bpe:SIZE' or a tokenizer.json")
        kind, _, size = self.tokenizer.partition(":")
        check(
            kind != "bpe" or (re.fullmatch("[0-9]{1,7}", size) is not None and int(size) >= 257),
            f"data.tokenizer is {quoted(self.tokenizer)}, but a BPE's size must be a number of at least 257 (256 bytes "
            "and the document separator) and at most 9999999",
        )


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    num_steps: int = setting(400, "Steps of the run; the learning rate's schedule ends there.", at_least(1), MAY_CHANGE)
    batch_size: int = setting(32, "Sequences of a step, over all devices and microbatches.", at_least(1))
    sequence_length: int = setting(256, "Tokens of a sequence.", at_least(1, 2**20))
    grad_accum_steps: int = setting(1, "Microbatches that each batch is split into.", at_least(1))
    seed: int = setting(
        0, "Of the weights, the order of the data and all other random numbers.", at_least(0, 2**32 - 1)
    )
    log_every_steps: int = setting(10, "Steps from one line of metrics to the next.", at_least(1), MAY_CHANGE)
    max_bad_steps: int = setting(
        10,
        "How many steps with a non-finite loss or gradient may follow each other before the run stops.",
        at_least(1),
        MAY_CHANGE,
        NO_EFFECT,
    )
    logits_per_chunk: int = setting(
        2**28,
        "Logits that a device holds at a time in the loss; more tokens than that are taken in chunks, to the same "
        "result.",
        at_least(1),
    )
    profile_steps: str | None = setting(
        None,
        "'10:13' profiles steps 10, 11 and 12: where their time goes is written to profile/ in the work directory.",
        MAY_CHANGE,
        NO_EFFECT,
    )

    @property
    def profiled(self) -> range:
        """The steps to profile; none if they are not set."""
        first, _, end = (self.profile_steps or "0:0").partition(":")
        return range(int(first), min(int(end), self.num_steps + 1))

    def __post_init__(self) -> None:
        check_settings(self, "train")
        check(
            self.batch_size % self.grad_accum_steps == 0,
            f"train.batch_size is {self.batch_size}, but must be a multiple of train.grad_accum_steps = "
            f"{self.grad_accum_steps}",
        )
        match = re.fullmatch("([0-9]{1,10}):[0-9]{1,10}", self.profile_steps or "1:2")
        check(
            match is not None and int(match[1]) >= 1 and (not self.profile_steps or bool(self.profiled)),
            f"train.profile_steps is {quoted(self.profile_steps)}, but must be FIRST:END, '10:13' for steps 10, 11 and "
            f"12, with FIRST from 1 to train.num_steps = {self.num_steps} and END above FIRST",
        )


OPTIMIZERS = ("adamw", "muon")
OPTIMIZER_KINDS = ("optim.name", "optim.moment_dtype", "optim.factored")  # decide of what its state consists


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, and a learning rate that rises linearly, then follows a schedule."""

    name: str = setting(
        "adamw",
        "'adamw', or 'muon' (Jordan 2024, its updates as large as AdamW's) for attention's projections and the "
        "matrices of experts and dense networks, each by itself, and AdamW for all other parameters.",
        one_of(*OPTIMIZERS),
    )
    peak_lr: float = setting(
        3e-3, "The largest learning rate.", positive(1e38, 1e-12)
    )  # below, no float32 weight moves
    warmup_fraction: float = setting(0.01, "Share of the steps over which the learning rate rises.", between(0, 1))
    schedule: str = setting(
        "cosine",
        "The learning rate after it has risen: it falls along a cosine ('cosine') or a line ('linear'), stays "
        "('constant'), or stays and then falls along a line ('wsd': warm-up, stable, decay).",
        one_of("cosine", "linear", "constant", "wsd"),
    )
    decay_fraction: float = setting(0.2, "Share of the steps, the last ones, over which 'wsd' falls.", between(0, 1))
    final_lr_fraction: float = setting(
        0.1, "The last learning rate, as a share of the largest; 'constant' has no use for it.", between(0, 1)
    )
    momentum: float = setting(0.95, "Of Muon: decay of its Nesterov momentum.", between(0, 1))
    b1: float = setting(0.9, "Decay of the first moment.", between(0, 1))
    b2: float = setting(0.95, "Decay of the second moment.", between(0, 1))
    eps: float = setting(1e-8, "What is added to the root of the second moment.", positive(1))
    weight_decay: float = setting(0.1, "Decoupled weight decay, times the learning rate.", at_least(0))
    decay_all: bool = setting(
        False, "Apply weight decay to norms, biases, embeddings and the router too, not only to the other matrices."
    )
    clip_norm: float = setting(1.0, "Norm of all gradients above which they are scaled down.", positive(math.inf))
    router_lr_multiplier: float = setting(1.0, "What the learning rate of the routers is multiplied by.", at_least(0))
    train_only: str | None = setting(
        None,
        "The only parameters that are trained, by parts of their names as checkpoints have them: 'router' or "
        "'experts,router' for instance. None: all.",
    )
    moment_dtype: str = setting(
        "float32", "What moments and momentum are kept in; they are computed in float32.", one_of("float32", "bfloat16")
    )
    factored: bool = setting(
        False,
        "Keep of each matrix's second moment its means along rows and along columns (Adafactor: Shazeer and Stern "
        "2018, with its decay 1 - t^-0.8 in the place of b2 and its clipping of updates). With b1 = 0 there is no "
        "first. Matrices that Muon moves have no second.",
    )

    def __post_init__(self) -> None:
        check_settings(self, "optim")
        check(
            self.schedule != "wsd" or self.warmup_fraction + self.decay_fraction < 1 + 1e-9,
            f"optim.warmup_fraction, optim.decay_fraction are {self.warmup_fraction}, {self.decay_fraction}, but with "
            "optim.schedule='wsd' their sum must be at most 1",
        )
        check(
            max(self.b1, self.b2, self.momentum) < 1 - 2**-24,
            f"optim.b1, optim.b2, optim.momentum are {self.b1}, {self.b2}, {self.momentum}, but must be below 1, in "
            "float32 too",
        )
        check(
            self.moment_dtype == "float32" or (max(self.b1, self.momentum) <= 0.99 and self.b2 <= 0.985),
            f"optim.b1, optim.b2, optim.momentum are {self.b1}, {self.b2}, {self.momentum}, but with "
            "optim.moment_dtype='bfloat16' they must be at most 0.99, 0.985 and 0.99: above, rounding makes the "
            "moments wrong by more than 1 %",
        )
        check(
            self.peak_lr * self.weight_decay < 1,
            f"optim.weight_decay is {self.weight_decay}, but must be below 1 / optim.peak_lr = {1 / self.peak_lr:.3g}: "
            "a step takes the learning rate times the decay off each weight",
        )
        check(
            self.clip_norm >= self.eps,
            f"optim.clip_norm is {self.clip_norm}, but must not be below optim.eps = {self.eps}, beside which no "
            "gradient would count",
        )


@dataclass(frozen=True)
class CheckpointConfig:
    """When a run is saved; it is at its end too."""

    every_steps: int = setting(100, "Steps from one save to the next.", at_least(1))
    every_minutes: float = setting(
        0.0,
        "Minutes from one save to the next; 0: not by the clock. With several processes the clock is looked at when a "
        "step is logged.",
        at_least(0),
    )
    keep_last: int = setting(
        2,
        "How many of the newest steps stay, beside the one with the lowest held-out loss of those steps that were both "
        "evaluated and saved.",
        at_least(1),
    )

    def __post_init__(self) -> None:
        check_settings(self, "checkpoint")


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out text, and the sample generated after training and by eval.py."""

    every_steps: int = setting(100, "Steps from one evaluation to the next; there is one at the end too.", at_least(1))
    num_batches: int = setting(8, "Batches of an evaluation; 0: the whole split.", at_least(0))
    batch_size: int | None = setting(None, "Sequences of such a batch; None takes train.batch_size.", at_least(1))
    sets: str | None = setting(
        None,
        "More text to evaluate, 'notes:texts/**/*.md,wiki:wiki/*.jsonl' for instance: globs of files as data.files "
        "takes them, by name.",
        names_of_files(),
    )
    prompt: str = setting("def ", "The text that the sample continues.", NO_EFFECT)
    sample_tokens: int = setting(200, "Tokens of the sample; 0: none is made.", at_least(0, 10**6), NO_EFFECT)
    temperature: float = setting(0.7, "Of the sample; 0 takes the likeliest token each time.", at_least(0), NO_EFFECT)

    @property
    def globs_by_set(self) -> dict[str, str]:
        """The globs of `sets` by name."""
        return split_sets(self.sets or "")

    def __post_init__(self) -> None:
        check_settings(self, "eval")
        _ = self.globs_by_set  # refuses what cannot be read
        check(
            self.temperature == 0 or self.temperature >= 1e-6,
            f"eval.temperature is {self.temperature}, but must be 0 or not below 1e-6",
        )


@dataclass(frozen=True)
class LogConfig:
    """Where metrics go, beside metrics.jsonl and TensorBoard."""

    wandb: str | None = setting(None, "The project of Weights & Biases that gets them; the package must be installed.")

    def __post_init__(self) -> None:
        check_settings(self, "log")
        check(
            not self.wandb
            or (len(self.wandb) <= 128 and self.wandb.isprintable() and not set(self.wandb) & set("/\\#?%:")),
            f"log.wandb is {quoted(self.wandb)}, but a project's name has at most 128 characters, and none of /\\#?%:",
        )


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    init_from: str | None = setting(
        None,
        "The work directory of a run with the same model and tokenizer, from whose weights this one starts, "
        "with another router for instance.",
        path(),
    )
    init_step: int | None = setting(None, "The step of that run's checkpoint; None takes the newest.", at_least(1))
    init_optimizer: bool = setting(
        False,
        "Branch off that run: take over the optimizer's state and the number of steps done too, and with that the "
        "places in the schedule and in the data.",
    )
    init_new: str | None = setting(
        None,
        "Parameters that begin anew all the same, by parts of their names as checkpoints have them: 'router' for "
        "instance. Then default vectors and the router's state begin anew too.",
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig, metadata=MAY_CHANGE | TUNED)
    mesh: MeshConfig = field(default_factory=MeshConfig, metadata=MAY_CHANGE)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig, metadata=MAY_CHANGE)
    eval: EvalConfig = field(default_factory=EvalConfig, metadata=MAY_CHANGE)
    log: LogConfig = field(default_factory=LogConfig, metadata=MAY_CHANGE | NO_EFFECT)

    def __post_init__(self) -> None:
        check_settings(self, "")
        check(
            self.init_from is not None
            or (self.init_step is None and not self.init_optimizer and self.init_new is None),
            "init_from is not set, but init_step, init_optimizer and init_new need it: they say what is taken from "
            "that run",
        )
        for name, batch_size in (("train", self.train.batch_size), ("eval", self.eval.batch_size or 1)):
            check(
                batch_size * self.train.sequence_length < 2**31,
                f"{name}.batch_size * train.sequence_length is {batch_size * self.train.sequence_length}, but a batch "
                "must have less than 2**31 tokens",
            )
        for name, default in (("decay_all", False), ("router_lr_multiplier", 1.0)):
            value = getattr(self.optim, name)
            check(
                self.moe.method.learns or value == default,
                f"optim.{name} is {value}, which makes no sense with moe.router={self.moe.method.name!r}: its router "
                "never changes",
            )
        check(
            self.moe.method.learns or self.optim.train_only != "router",
            f"optim.train_only is 'router', but that of moe.router={self.moe.method.name!r} never changes",
        )
        check(
            self.init_new is None or not self.init_optimizer,
            f"init_new is {quoted(self.init_new)}, but init_optimizer takes over the moments of all parameters",
        )
        self._check_sizes()
        if self.moe.dtype is None:
            object.__setattr__(self, "moe", dataclasses.replace(self.moe, dtype=self.model.dtype))

    def _check_sizes(self) -> None:
        """XLA ends the process where the bytes of arrays do not fit 64 bits: no message could follow."""
        model, moe, length = self.model, self.moe, self.train.sequence_length
        tokens = self.train.batch_size * length
        width = max(model.d_model, moe.expert_dim, model.dense_dim or 1, model.num_heads * model.head_size)
        experts = moe.num_experts + moe.num_shared_experts
        for what, size in (
            ("model.d_model, moe.expert_dim, moe.num_experts", model.num_layers * experts * model.d_model * width),
            ("train.batch_size, model.d_model, moe.top_k", model.num_layers * tokens * moe.top_k * width),
            ("train.batch_size, train.sequence_length, model.num_heads", tokens * length * model.num_heads),
        ):
            check(size < 2**56, f"{what} make an array of {size} numbers, but there must be less than 2**56")

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Self:
        """The checked Config of a nested mapping, such as `to_dict` gives. Missing fields get defaults.

        Raises ConfigError on an unknown key, a value of the wrong type, or one that cannot work.
        """
        return section_from_mapping(cls, "", mapping)

    @classmethod
    def from_config_dict(cls, config: ConfigDict) -> Self:
        """`from_mapping` of what a config file's `get_config` returned."""
        return cls.from_mapping(config.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as JSON can hold them."""
        return {**dataclasses.asdict(self), "moe": self.moe.to_dict()}


def marked(name: str, mark: Mapping[str, bool]) -> bool:
    """Whether a setting ("optim.peak_lr") or its group has that mark. Those of methods and balancers are TUNED."""
    section: Any = Config
    for part in name.split("."):
        known = {f.name: f for f in dataclasses.fields(section)}
        if part not in known:
            return section is MoEConfig and mark == TUNED
        if mark.items() <= known[part].metadata.items():
            return True
        section = known[part].type
    return False
