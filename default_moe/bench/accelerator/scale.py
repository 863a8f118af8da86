"""How large the parts' work is: what an accelerator needs to show its speed, or next to nothing for a CPU."""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import jax

from default_moe.bench.workload import ACCELERATOR_SHAPES, LayerShape
from default_moe.config import Config
from default_moe.errors import ConfigError

PAPER = Path(__file__).parents[3] / "configs" / "paper.py"


class Scale(NamedTuple):
    """dtype: compute type.  copied_bytes, matrix: of the ceilings.  layers: shapes of the layer table, the first and
    last also of products and torch.  checked: shapes of the correctness checks.  rounds: times each thing is timed.
    attempts: (sequences, remat) of the training step, in the order in which they are tried.
    """

    dtype: str
    copied_bytes: int
    matrix: int
    layers: tuple[LayerShape, ...]
    checked: tuple[LayerShape, ...]
    rounds: int
    attempts: tuple[tuple[int, str], ...]


def scale() -> Scale:
    if jax.default_backend() == "cpu":
        tiny = LayerShape(128, 32, 4, 2, 16)
        return Scale("float32", 2**16, 64, (tiny,), (LayerShape(64, 16, 4, 2, 8),), 2, ((2, "dots"), (4, "none")))
    attempts = ((32, "dots"), (64, "dots"), (32, "none"), (64, "full"), (16, "none"))
    # Widths of whole tiles of 128, and not.
    checked = tuple(LayerShape(1024, 256, 8, 2, width) for width in (384, 320))
    return Scale("bfloat16", 2**31, 8192, ACCELERATOR_SHAPES, checked, 10, attempts)


def step_config(sequences: int, remat: str) -> Config:
    """`configs/paper.py:8c1` with that many sequences a step on one device; a tiny model of its kind on a CPU."""
    if not PAPER.is_file():
        raise ConfigError(f"there is no {PAPER}: run this in a clone of the repository")
    spec = importlib.util.spec_from_file_location("paper", PAPER)
    assert spec and spec.loader
    paper: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(paper)
    settings = paper.get_config("8c1")
    settings.data.name, settings.data.tokenizer = "python_stdlib", "bytes"  # not read: tokens are random
    config = Config.from_config_dict(settings)
    model = dataclasses.replace(config.model, remat=remat)
    moe = config.moe
    train = dataclasses.replace(config.train, batch_size=sequences, grad_accum_steps=1)
    if jax.default_backend() == "cpu":
        model = dataclasses.replace(
            model, d_model=32, num_heads=2, num_layers=2, vocab_size=64, dtype="float32", attention="auto"
        )
        moe = dataclasses.replace(moe, expert_dim=16, dtype="float32")
        train = dataclasses.replace(train, sequence_length=16)
    return dataclasses.replace(config, model=model, moe=moe, train=train)
