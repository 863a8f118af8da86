"""The accelerator suite on a CPU: the whole of it on tiny work, and what becomes of parts that fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from default_moe.bench import accelerator
from default_moe.bench.accelerator import Part
from default_moe.errors import ConfigError

ROOT = Path(__file__).parents[2]

# Packages that only the data pipeline and pictures need.
WITHOUT = """
import sys
for name in "tensorflow_datasets tensorflow grain tokenizers pyarrow tensorboardX matplotlib tqdm".split():
    sys.modules[name] = None
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The folder that the command leaves, and what it printed."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "sitecustomize.py").write_text(WITHOUT)
    command = [sys.executable, "-m", "default_moe.bench", "--suite=accelerator", f"--out={folder / 'out'}"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "out", done.stdout


def test_every_part_leaves_text_and_numbers(found):
    folder, printed = found
    results = {}
    for part in accelerator.parts(on_cpu=True):
        assert f"\n{part.name}: done\n{(folder / f'{part.name}.txt').read_text()}" in printed
        written = json.loads((folder / f"{part.name}.json").read_text())
        assert written["machine"]["platform"] == "cpu" and written["machine"]["versions"]["jax"] == jax.__version__
        results[part.name] = written["results"]
    topk, default = results["step"]
    # 8 sequences of 16 tokens a step. One MoE layer of 8 experts, D 32: their default vectors, and [T, N].
    assert default["tokens/s"] == pytest.approx(128 / default["step ms"] * 1e3)
    assert (topk["router"], default["allowed bytes"]) == ("topk", 4 * 8 * (32 + 128))
    assert list(folder.glob("profile/**/*.trace.json.gz"))
    grouped = [row for row in results["products"] if row["work"].startswith("T128")]
    assert len(grouped) == 3 * 2 and all(row["/ matrix product"] > 0 for row in grouped)
    assert {"dense", "topk auto", "default auto"} == {row["candidate"] for row in results["layer"]}


def test_a_part_that_fails_or_hangs_loses_only_itself(tmp_path, monkeypatch, capsys):
    """Attempts are made until one succeeds."""
    wrong = "--suite=layer --shape=1"
    parts = [
        Part("wrong", 60, (wrong,)),
        Part("hanging", 0.2, ("--suite=layer",)),
        Part("late", 0, ("--suite=layer",)),
        Part("second", 100, (wrong, "--suite=products --shape=16,8,2,1,8 --rounds=1", wrong)),
    ]
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(accelerator, "parts", lambda on_cpu: parts)
    assert not accelerator.run(tmp_path / "out")
    printed = capsys.readouterr().out
    for line in ("wrong: ended with code 2", "error: --shape is '1'", "hanging: stopped after 0 s", "second: done"):
        assert f"\n{line}" in printed
    assert "late: no time was left for it" in printed and printed.count("error: --shape is '1'") == 2
    assert [path.name for path in (tmp_path / "out").glob("*.json")] == ["second.json"]


def test_results_are_never_overwritten(tmp_path):
    (tmp_path / "a file").write_text("")
    with pytest.raises(ConfigError, match="is not empty"):
        accelerator.run(tmp_path)
    with pytest.raises(ConfigError, match="cannot write to"):
        accelerator.run(tmp_path / "a file")


def test_the_parts_for_an_accelerator_take_less_than_nine_minutes():
    assert accelerator.SECONDS < 9 * 60
    first, *others = accelerator.parts(on_cpu=False)
    assert first.name == "step" and len(first.attempts) == 4
    assert first.seconds + sum(part.seconds for part in others if "torch" not in part.name) < accelerator.SECONDS
