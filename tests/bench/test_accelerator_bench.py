"""The accelerator suite on a CPU: the whole of it on tiny work, and what becomes of parts that fail."""

import json
import os
import re
import subprocess
import sys
import time
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
        if part.name != "correctness":
            written = json.loads((folder / f"{part.name}.json").read_text())
            assert written["machine"]["platform"] == "cpu" and written["machine"]["versions"]["jax"] == jax.__version__
            results[part.name] = written["results"]
    assert list(results) == ["ceilings", "products", "layer", "step"]
    assert len(results["ceilings"]) == 2 and re.search(r"^8 passed", (folder / "correctness.txt").read_text(), re.M)
    topk, default = results["step"]
    # 8 sequences of 16 tokens a step. One MoE layer of 8 experts, D 32: their default vectors, and [T, N].
    assert default["tokens/s"] == pytest.approx(128 / default["step ms"] * 1e3)
    assert (topk["router"], default["allowed bytes"]) == ("topk", 4 * 8 * (32 + 128))
    for name in ("topk", "default"):
        assert list(folder.glob(f"step.profile/{name}_adamw/**/*.trace.json.gz"))
    grouped = [row for row in results["products"] if row["work"].startswith("T128")]
    assert len(grouped) == 3 * 2 + 2 and all(row["/ matrix product"] > 0 for row in grouped)
    assert {"dense", "topk auto", "default auto"} == {row["candidate"] for row in results["layer"]}
    assert printed.count("kernel ") == 2 and accelerator.fastest_backends(folder / "layer.json") == ["auto"]


def test_a_part_that_fails_or_hangs_loses_only_itself(tmp_path, monkeypatch, capsys):
    """Attempts are made until one succeeds."""
    wrong = "--suite=layer --shape=1"
    parts = [
        Part("wrong", 60, (wrong,)),
        Part("hanging", 0.2, ("--suite=layer",)),
        Part("late", 0, ("--suite=layer",)),
        Part("of a backend that is not there", 60, ("--suite=layer",), rank=1),
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


def test_what_a_part_started_is_stopped_with_it(tmp_path):
    child = f"import time, pathlib; time.sleep(1.5); pathlib.Path({str(tmp_path / 'alive')!r}).touch()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert accelerator._run(["-c", parent], tmp_path / "out.txt", 0.7) == "stopped after 1 s"
    time.sleep(1.5)
    assert not (tmp_path / "alive").exists()


def test_results_are_never_overwritten(tmp_path):
    (tmp_path / "a file").write_text("")
    with pytest.raises(ConfigError, match="is not empty"):
        accelerator.run(tmp_path)
    with pytest.raises(ConfigError, match="cannot write to"):
        accelerator.run(tmp_path / "a file")


def test_the_parts_for_an_accelerator_take_as_long_as_is_said(tmp_path, monkeypatch):
    on_accelerator = accelerator.parts(on_cpu=False)
    ours = [part for part in on_accelerator if "torch" not in part.name]
    assert [part.name for part in ours[:2]] == ["ceilings", "correctness"] and len(ours) == 6
    assert 60 * accelerator.MINUTES - 15 < sum(part.seconds for part in ours) <= 60 * accelerator.MINUTES
    limits = []

    def run(arguments, output, seconds, memory=0):
        limits.append(seconds)
        output.write_text("gpu")

    monkeypatch.setattr(accelerator, "_run", run)
    monkeypatch.setattr(accelerator, "parts", lambda on_cpu: on_accelerator)
    assert accelerator.run(tmp_path / "out", minutes=4)
    assert limits[1] == pytest.approx(ours[0].seconds / 2, abs=0.1)  # the first is for asking where this runs


def test_the_step_is_done_by_the_fastest_backend(tmp_path):
    def row(candidate, ms, **other):
        return {
            "shape": "T1",
            "pass": "forward+backward",
            "routing": "balanced",
            "candidate": candidate,
            "ms": ms,
        } | other

    rows = [row("dense", 1), row("topk a", 1), row("default a", 3), row("default b", 2), row("default c", 4)]
    rows += [row("default c", 1, **{name: "other"}) for name in ("shape", "pass", "routing")]
    (tmp_path / "layer.json").write_text(json.dumps({"results": rows}))
    assert accelerator.fastest_backends(tmp_path / "layer.json") == ["b", "a", "c"]
    assert accelerator.fastest_backends(tmp_path / "not there.json") == ["auto"]
