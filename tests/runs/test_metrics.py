"""Metrics on the disk and on the screen: exact after a resumption, and never the end of a run."""

import io
import json
import os
import re
import subprocess
import sys
import types

import matplotlib.image
import numpy as np
import pytest
from helpers.tiny_runs import read_events

from default_moe.hardware import peak_flops
from default_moe.runs.metrics import MetricsWriter
from default_moe.runs.pictures import load_heat_map, picture_file
from default_moe.runs.progress import Progress


def lines(workdir, name="metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


def write_losses(writer, steps) -> None:
    for step in steps:
        writer.write(step, {"train/loss": 1 / (step + 1)})
    writer.close()


def test_lines_and_scalars(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(10, {"train/loss": np.float32(2.5), "train/tokens": 7})
    assert lines(tmp_path) == [{"step": 10, "train/loss": 2.5, "train/tokens": 7}]  # flushed without close
    writer.write(20, {"train/loss": float("nan"), "eval/loss": np.inf})
    writer.close()
    assert lines(tmp_path)[1] == {"step": 20, "train/loss": None, "eval/loss": None}
    scalars = [(e.step, v.tag, v.simple_value) for e in read_events(tmp_path) for v in e.summary.value]
    assert scalars[:2] == [(10, "train/loss", 2.5), (10, "train/tokens", 7.0)]
    assert len(scalars) == 4 and np.isnan(scalars[2][2])


def test_a_resumed_run_leaves_the_file_of_an_uninterrupted_one(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
        write_losses(MetricsWriter(folder), range(0, 50, 10))
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2')  # a torn line whose step, cut off, would look old enough
    writer = MetricsWriter(killed, resume_step=20)
    assert [line["step"] for line in lines(killed)] == [0, 10, 20]
    write_losses(writer, (30, 40))
    assert (killed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    starts = [event.step for event in read_events(killed) if event.HasField("session_log")]
    assert starts == [0, 21]  # TensorBoard hides what older files hold from there on

    MetricsWriter(killed, resume_step=None).close()
    assert lines(killed) == []


def test_a_full_disk_is_reported_once_and_nothing_is_lost(tmp_path):
    code = """
import resource, signal, sys
from default_moe.runs.metrics import MetricsWriter
reports = []
writer = MetricsWriter(sys.argv[1], report=reports.append)
writer.write(1, {"loss": 1.5})
resource.setrlimit(resource.RLIMIT_FSIZE, (40, resource.RLIM_INFINITY))
for step in (2, 3, 4):
    writer.write(step, {"loss": 1.5})
print(open(sys.argv[1] + "/metrics.jsonl").read().count("\\n"), *reports, sep="|")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
writer.write(5, {"loss": 1.5})
writer.close()
"""
    child = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(child, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0 and done.stderr == "", done.stderr
    count, *reports = done.stdout.strip().split("|")
    assert int(count) == 1
    files = sorted(report.split(" cannot be written (File too large)")[0] for report in reports)
    assert files == ["metrics.jsonl", "tensorboard"]
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_place_that_cannot_be_written_does_not_end_the_run(tmp_path):
    (tmp_path / "tensorboard").write_text("in the way")
    for name in ("metrics.jsonl", "expert_load.jsonl"):
        (tmp_path / name).mkdir()
    reports = []
    writer = MetricsWriter(tmp_path, resume_step=3, report=reports.append)
    for step in range(3):
        writer.write(step, {"loss": 1.0})
        writer.write_load(step, "eval", np.ones((1, 2)), (1,))
    writer.close()
    assert sorted(report.split()[0] for report in reports) == ["expert_load.jsonl", "metrics.jsonl", "tensorboard"]


def test_load_is_numbers_in_a_file_and_the_newest_a_picture(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in (90, 100):
        writer.write_load(step, "train", np.float32([[3, 1], [0, 4]]), (1, 3))
    writer.write_load(100, "eval", np.array([[30, 10], [20, 20]]), (1, 3))
    writer.close()
    train, *_, evaluated = lines(tmp_path, "expert_load.jsonl")
    assert train == {"step": 90, "split": "train", "layers": [1, 3], "tokens_per_expert": [[3, 1], [0, 4]]}
    assert evaluated == {"step": 100, "split": "eval", "layers": [1, 3], "tokens_per_expert": [[30, 10], [20, 20]]}
    [image] = [v.image for e in read_events(tmp_path) for v in e.summary.value if v.tag == "expert_load"]
    picture = matplotlib.image.imread(io.BytesIO(image.encoded_image_string))
    assert picture.shape[:2] == (image.height, image.width)
    MetricsWriter(tmp_path, resume_step=90).close()
    assert [line["step"] for line in lines(tmp_path, "expert_load.jsonl")] == [90]


def test_heat_map_shows_load_relative_to_the_layers_mean():
    """One layer, loads 1.6, 0.4 of the mean: red is stronger on the left, blue on the right; balanced: both white."""

    def halves(counts):
        picture = matplotlib.image.imread(io.BytesIO(load_heat_map(np.array([counts]))))[..., :3]
        colors, number = np.unique(picture.reshape(-1, 3), axis=0, return_counts=True)
        common = colors[np.argsort(-number)][:3]
        return [color for color in common if not (color == 1).all()]

    unbalanced = halves([16, 4])
    assert any(red > blue + 0.2 for red, _, blue in unbalanced) and any(blue > red + 0.2 for red, _, blue in unbalanced)
    assert halves([3, 3])[0].min() > 0.9
    for shape in ((3, 8), (1, 1), (2, 128)):
        assert load_heat_map(np.zeros(shape)).startswith(b"\x89PNG")


def test_plain_lines_when_there_is_no_terminal():
    stream = io.StringIO()
    progress = Progress(400, stream)
    progress.start(0)
    metrics = {"train/loss": 2.34561, "train/bits_per_byte": 3.384, "train/learning_rate": 3e-3}
    progress.step(1)
    progress.log(1, {"train/loss": 5.0})
    progress._first = (1, progress._first[1] - 39.0)  # a second a step: 39 s for the 39 steps since
    progress.step(40)
    progress.log(40, {**metrics, "train/tokens_per_second": 20100.4, "train/other": 1.0})
    progress.message("saved")
    progress.close()
    first, second, third = stream.getvalue().splitlines()
    assert first == "step 1/400  loss 5.0000"
    assert second == "step 40/400  loss 2.3456  bits/byte 3.38  lr 3.0e-03  tokens/s 20,100  ETA 6:00"
    assert third == "saved"


def test_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    progress = Progress(10, stream)
    progress.message("before")
    progress.start(4)
    for step in (5, 6):
        progress.step(step)
    progress.log(6, {"train/loss": 2.5})
    progress.message("evaluated")
    progress.close()
    shown = stream.getvalue()
    assert re.search(r"60%\|.*\| step 6/10, loss 2\.5000  ETA 0:00", shown)
    assert shown.startswith("before\n") and "evaluated\n" in shown


PEAKS = {
    **{"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H200": 989e12, "NVIDIA B200": 2250e12},
    **{"NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA L40S": 362e12, "NVIDIA H20": None, "cpu": None},
    **{"TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5p": 459e12, "TPU v6 lite": 918e12, "TPU7x": 1153.5e12},
}


@pytest.mark.parametrize(("kind", "peak"), PEAKS.items())
def test_peak_flops(kind, peak):
    assert peak_flops(types.SimpleNamespace(device_kind=kind)) == peak


def test_importing_loads_neither_matplotlib_nor_tensorboard():
    imports = "import sys, default_moe.runs.metrics, default_moe.runs.progress"
    code = f"{imports}; print({{'matplotlib', 'tensorboardX', 'tqdm'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_a_picture_that_cannot_be_drawn_does_not_end_the_run(tmp_path, monkeypatch):
    def fail(*_args):
        raise ValueError("no such backend")

    monkeypatch.setattr("default_moe.runs.metrics.load_heat_map", fail)
    reports = []
    writer = MetricsWriter(tmp_path, report=reports.append)
    for step in range(2):
        writer.write_load(step, "eval", np.ones((1, 2)), (1,))
    writer.write(2, {"loss": 1.0})
    writer.close()
    assert [line["step"] for line in lines(tmp_path)] == [2]
    assert reports == [
        "pictures cannot be written (ValueError: no such backend): training continues, writing is retried"
    ]


def test_a_report_is_written_without_a_picture_that_cannot_be_drawn():
    said = []
    assert picture_file("report.png", lambda: b"drawn", said.append) == {"report.png": b"drawn"} and said == []
    assert picture_file("report.png", lambda: load_heat_map(np.zeros(3)), said.append) == {}
    [line] = said
    assert line.startswith("report.png cannot be drawn (ValueError: ") and line.endswith("are written without it")


def test_pictures_are_drawn_where_a_notebook_has_left_its_backend():
    code = """
import os, numpy as np
from default_moe.runs.pictures import load_heat_map, picture_file
assert load_heat_map(np.ones((1, 2))).startswith(b"\\x89PNG")
assert os.environ["MPLBACKEND"] == "module://nowhere"
"""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "MPLBACKEND": "module://nowhere"}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
