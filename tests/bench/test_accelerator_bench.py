"""The accelerator suite on a CPU: the whole of it on tiny work, and what becomes of parts that fail."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags

from default_moe.bench.accelerator import PARTS, correctness, results
from default_moe.bench.accelerator import parts as suite
from default_moe.bench.accelerator.results import Results
from default_moe.bench.workload import LayerShape
from default_moe.errors import ConfigError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The folder that the command leaves, and what it printed."""
    folder = tmp_path_factory.mktemp("suite") / "out"
    command = [sys.executable, "-m", "default_moe.bench", "--suite=accelerator", f"--out={folder}"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def rows_of(folder: Path, part: str) -> list[dict]:
    return [row for row in results.read(folder) if row["part"] == part]


def test_every_part_finds_what_it_should(found):
    folder, _ = found
    (machine,) = rows_of(folder, "machine")
    assert machine["platform"] == "cpu" and machine["versions"]["jax"] == jax.__version__
    assert {row["part"] for row in results.read(folder)} == {"machine", *PARTS}

    ceilings = rows_of(folder, "ceilings")
    assert ceilings[0]["GB/s"] > 0 and ceilings[1]["TFLOP/s"] > 0
    checks = rows_of(folder, "correctness")
    assert len([row for row in checks if row.get("ok")]) == 2 * 3  # blocks and ragged, three routes each
    assert [row["error"].split(",")[0] for row in checks if "error" in row] == [
        f"moe.matmul is {name!r}" for name in ("mosaic", "tokamax")
    ]
    products = rows_of(folder, "products")
    assert len(products) == 3 * 2 and all(row["/ matrix product"] > 0 for row in products)
    layers = rows_of(folder, "layers")
    assert {"dense", "topk auto", "default auto"} <= {row.get("candidate") for row in layers}
    assert all(row["/ matrix product"] > 0 for row in layers if "candidate" in row)


def test_the_training_part_has_batches_a_comparison_and_a_profile(found):
    rows = rows_of(found[0], "training")
    attempts = [row for row in rows if "tokens/s" in row]
    assert [row["name"] for row in attempts] == ["2 sequences, remat=dots", "4 sequences, remat=none"]
    # 2 sequences of 16 tokens a step.
    assert attempts[0]["tokens/s"] == pytest.approx(32 / attempts[0]["step ms"] * 1e3)
    (versus,) = (row for row in rows if "/ top-k" in row)
    # One MoE layer of 8 experts, D 32: their default vectors, and [T, N] of 32 tokens.
    assert versus["allowed bytes"] == 4 * 8 * (32 + 32)
    kernels = [row for row in rows if "share" in row]
    (profiled,) = (row for row in rows if "kernels" in row)
    assert profiled["kernels"] == len(kernels)
    assert len(kernels) > 3 and 0 < sum(row["share"] for row in kernels) <= 1
    assert not [row for row in rows if "error" in row]


def test_the_report_is_what_was_printed(found):
    folder, printed = found
    assert (folder / "report.txt").read_text().strip() == printed.strip()
    assert all(f"\n{part} (" in "\n" + printed for part in PARTS)


def test_results_are_never_overwritten(found):
    before = (found[0] / results.FILE).read_bytes()
    with pytest.raises(ConfigError, match="is not empty"):
        suite.run(found[0])
    assert (found[0] / results.FILE).read_bytes() == before
    (found[0] / "a file").write_text("")
    with pytest.raises(ConfigError, match="cannot write to"):
        suite.run(found[0] / "a file")


def test_a_part_that_fails_or_hangs_is_told_in_a_line(tmp_path, monkeypatch):
    assert suite._run_in_process("no such part", tmp_path, 60, 0.5).startswith(
        "ended with code 2: error: --part is 'no"
    )
    assert suite._run_in_process("layers", tmp_path, 0.3, 0.5) == "stopped after 0 s"
    assert suite._run_in_process("layers", tmp_path, 0, 0.5) == "no time was left for it"
    assert "--- layers" in (tmp_path / "log.txt").read_text()


def test_all_parts_run_though_each_one_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suite, "_machine", lambda: {"platform": "cpu"})
    monkeypatch.setattr(suite, "_run_in_process", lambda name, *_: f"{name} broke")
    rows = suite.run(tmp_path / "out")
    broken = [{"part": part, "name": suite.FAILED, "error": f"{part} broke"} for part in PARTS]
    assert rows == [{"part": "machine", "platform": "cpu"}, *broken]
    report = (tmp_path / "out" / "report.txt").read_text()
    assert all(f"{part} broke" in report for part in PARTS)
    assert capsys.readouterr().out.strip() == report.strip()


def test_one_measurement_that_fails_leaves_the_others(tmp_path):
    found = Results(tmp_path, "some")

    def out_of_memory():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte\nmore")

    def wrong():
        raise ValueError("no\nkernel")

    def refused():
        raise ConfigError("not here")

    assert found.guarded("a", out_of_memory) is None
    assert found.guarded("b", wrong) is None
    assert found.guarded("c", refused) is None
    assert found.guarded("d", lambda: {"ms": np.float32(1.5), "bad": float("nan")}) is not None
    with (tmp_path / results.FILE).open("a") as file:
        file.write('\n{"part": "some", "na')  # cut off
    found.add({"name": "e", "bad": np.float32("nan")})
    assert results.read(tmp_path) == [
        {"part": "some", "name": "a", "error": "out of memory"},
        {"part": "some", "name": "b", "error": "ValueError: no kernel"},
        {"part": "some", "name": "c", "error": "not here"},
        {"part": "some", "name": "d", "ms": 1.5, "bad": "nan"},
        {"part": "some", "name": "e", "bad": "nan"},
    ]


@pytest.mark.parametrize("wrong", ["y", "sums", "d_x", "d_weight", "d_down"])
def test_a_wrong_result_is_found(wrong, monkeypatch):
    """The check cannot but fail if one value of one array is off by a tenth of the largest."""
    exact = correctness.reference

    def off(*args):
        found = exact(*args)
        found[wrong].flat[3] += 0.1 * np.abs(found[wrong]).max()
        return found

    shape = LayerShape(tokens=32, d_model=16, num_experts=4, top_k=2, expert_dim=8)
    assert correctness._check(shape, "blocks", "float32", seed=1)["ok"]
    monkeypatch.setattr(correctness, "reference", off)
    row = correctness._check(shape, "blocks", "float32", seed=1)
    assert not row["ok"] and row["of"] == wrong and row["largest error"] > 0.05


def test_it_needs_no_packages_of_the_data_pipeline(tmp_path):
    code = f"""
import sys
for name in "tensorflow_datasets tensorflow grain tokenizers pyarrow tensorboardX matplotlib tqdm".split():
    sys.modules[name] = None
from default_moe.bench import __main__ as program
sys.argv = ["bench", "--suite=accelerator", "--part=ceilings", "--out={tmp_path}"]
sys.exit(program.main(sys.argv))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert [row["part"] for row in results.read(tmp_path)] == ["ceilings"] * 2


def test_bad_flags(tmp_path):
    from default_moe.bench import __main__ as program

    def error_of(*args: str) -> str:
        flags.FLAGS.unparse_flags()
        for name in ("out", "part", "rounds", "suite", "config", "shape", "matmul", "json"):
            flags.FLAGS[name].unparse()
        with pytest.raises(ConfigError) as caught:
            program.main(["bench", *args])
        return str(caught.value)

    assert "--suite=accelerator needs --out=DIR" in error_of("--suite=accelerator")
    assert "--part is 'x', but must be one of ceilings" in error_of("--suite=accelerator", "--out=o", "--part=x")
    assert "there is no directory" in error_of("--suite=accelerator", "--part=torch", f"--out={tmp_path}/none")
    assert "there is no directory" in error_of("--suite=layer", f"--json={tmp_path}/none/a.json")
    assert "--out goes with --suite=accelerator" in error_of("--suite=layer", f"--out={tmp_path}")
    assert "--rounds goes with --suite=layer and" in error_of("--suite=accelerator", "--out=o", "--rounds=3")
