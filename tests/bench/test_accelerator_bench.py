"""The accelerator suite on a CPU: the whole of it on tiny work, and what becomes of parts that fail."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
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
    for part in accelerator.parts("cpu"):
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
    monkeypatch.setattr(accelerator, "parts", lambda platform: parts)
    assert not accelerator.run(tmp_path / "out")
    printed = capsys.readouterr().out
    for line in ("wrong: ended with code 2", "error: --shape is '1'", "hanging: stopped after 0 s", "second: done"):
        assert f"\n{line}" in printed
    assert "late: no time was left for it" in printed and printed.count("error: --shape is '1'") == 2
    assert [path.name for path in (tmp_path / "out").glob("*.json")] == ["second.json"]


def wait_for(condition):
    """What it gives, once that is true."""
    end = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def has_gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


# A part that starts another process, whose number it prints, and waits for it.
PARENT = "import subprocess; child = subprocess.Popen(['sleep', '600']); print(child.pid, flush=True); child.wait()"


def test_what_a_part_started_is_stopped_with_it(tmp_path):
    assert accelerator._run(["-c", PARENT], tmp_path / "out.txt", 5) == "stopped after 5 s"
    child = int((tmp_path / "out.txt").read_text())
    wait_for(lambda: has_gone(child))


def test_a_suite_that_is_told_to_end_leaves_nothing_running(tmp_path):
    code = f"""
        from pathlib import Path
        from default_moe.bench import accelerator
        accelerator.parts = lambda platform: [accelerator.Part("part", 400, ("unused",))]
        run = accelerator._run
        accelerator._run = lambda arguments, *rest: run(arguments if "-c" in arguments else ["-c", {PARENT!r}], *rest)
        accelerator.run(Path({str(tmp_path / "out")!r}))
    """
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    suite = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], env=environment, cwd=ROOT)
    text = tmp_path / "out" / "part.txt"
    child = int(wait_for(lambda: text.exists() and text.read_text()))
    suite.terminate()
    assert suite.wait(60) == 128 + signal.SIGTERM
    wait_for(lambda: has_gone(child))


def test_what_an_attempt_has_found_is_not_written_over(tmp_path, monkeypatch):
    tried = []

    def run(arguments, output, seconds, memory=0):
        tried.append(arguments)
        output.write_text("cpu")
        if "--suite=layer" in arguments:
            (tmp_path / "out" / "layer.json").write_text("{}")
        return "ended with code 1" if len(tried) > 1 else None

    monkeypatch.setattr(accelerator, "_run", run)
    attempts = ("--suite=layer", "--suite=step")
    monkeypatch.setattr(
        accelerator, "parts", lambda platform: [Part("layer", 60, attempts), Part("none", 60, ("a", "b"))]
    )
    assert not accelerator.run(tmp_path / "out")
    assert [arguments[2] for arguments in tried[1:]] == ["--suite=layer", "a", "b"]


def test_results_are_never_overwritten(tmp_path):
    (tmp_path / "a file").write_text("")
    with pytest.raises(ConfigError, match="is not empty"):
        accelerator.run(tmp_path)
    with pytest.raises(ConfigError, match="cannot write to"):
        accelerator.run(tmp_path / "a file")


def test_the_parts_for_an_accelerator_take_as_long_as_is_said(tmp_path, monkeypatch):
    on_accelerator = accelerator.parts("gpu")
    ours = [part for part in on_accelerator if "torch" not in part.name]
    assert [part.name for part in ours[:2]] == ["ceilings", "correctness"] and len(ours) == 6
    assert 60 * accelerator.MINUTES - 15 < sum(part.seconds for part in ours) <= 60 * accelerator.MINUTES
    limits = []

    def run(arguments, output, seconds, memory=0):
        limits.append(seconds)
        output.write_text("gpu")

    monkeypatch.setattr(accelerator, "_run", run)
    monkeypatch.setattr(accelerator, "parts", lambda platform: on_accelerator)
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
