"""Work directories: a run continues only as the run it was, and nothing is written where it may not."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.refusals import refused

from default_moe.config import Config
from default_moe.data import HeldOutSet
from default_moe.runs.identity import RUN_FILE, mark_saved
from default_moe.runs.workdir import open_run


def changed(**sections) -> Config:
    return Config.from_mapping(sections)


def start(workdir: Path, config: Config | None = None, **identity):
    return open_run(workdir, config or Config(), **{"corpus_hash": "abc", "vocab_size": 257, **identity})


def begin(workdir: Path, config: Config | None = None, **identity):
    """A run that has been started, has saved a checkpoint, and was left."""
    with start(workdir, config, **identity) as run:
        mark_saved(workdir)
        return run


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_new_run_is_written_and_goes_on(tmp_path):
    workdir = tmp_path / "runs" / "first"
    with start(workdir) as run:
        assert not run.resumed and run.notes == []
        assert run.workdir == workdir
    saved = json.loads((workdir / RUN_FILE).read_text())
    assert Config.from_mapping(saved["config"]) == Config()
    assert (saved["corpus_hash"], saved["vocab_size"], saved["format"]) == ("abc", 257, 1)
    assert [path.name for path in workdir.iterdir()] == [RUN_FILE]
    first = begin(workdir).id
    with start(workdir) as run:
        assert run.resumed and run.notes == []
        assert run.id == first == json.loads((workdir / RUN_FILE).read_text())["run_id"]


def test_sets_whose_text_has_changed_are_noted(tmp_path):
    def of(content_hash, *differences):
        return HeldOutSet(
            None, content_hash, lambda before: [f"{difference} since {before}" for difference in differences]
        )

    begin(tmp_path, sets={"a": of("1"), "b": of("1"), "c": of("1")})
    with start(tmp_path, sets={"a": of("1"), "b": of("2"), "c": of("2", "x"), "d": of("2", "y")}) as run:
        noted = ["the text of the set 'b' of eval.sets", "the text of the set 'c' of eval.sets (x since 1)"]
        assert run.resumed and run.notes == noted
    saved = json.loads((tmp_path / RUN_FILE).read_text())
    assert saved["history"][0]["changed"] == noted and saved["eval_sets"]["d"] == "2"
    del saved["eval_sets"]  # as earlier versions wrote it
    (tmp_path / RUN_FILE).write_text(json.dumps(saved))
    with start(tmp_path, sets={"a": of("5")}) as run:
        assert run.resumed and run.notes == []


def test_settings_that_may_change_are_noted(tmp_path):
    begin(tmp_path, changed(data={"name": "text_files", "files": "texts/*.txt"}))
    other = changed(
        train={"num_steps": 900},
        optim={"peak_lr": 1e-3, "clip_norm": float("inf")},
        mesh={"data": 1},
        model={"remat": "full"},
        moe={"load_balance_weight": 0.02, "matmul": "ragged"},
        data={"dir": "/elsewhere", "name": "text_files", "files": "other/*.txt"},
    )
    with start(tmp_path, other) as run:
        assert run.resumed
        assert "train.num_steps was 400, is now 900" in run.notes
        assert len(run.notes) == 9
    with start(tmp_path, other) as run:
        assert run.notes == []
    [change] = json.loads((tmp_path / RUN_FILE).read_text())["history"]
    assert "train.num_steps was 400, is now 900" in change["changed"] and len(change["changed"]) == 9
    with start(tmp_path, changed(data={"name": "text_files", "files": "texts/*.txt"})) as run:
        assert "train.num_steps was 900, is now 400" in run.notes
    begin(tmp_path, changed(data={"name": "text_files", "files": "texts/*.txt"}, train={"num_steps": 500}))
    history = json.loads((tmp_path / RUN_FILE).read_text())["history"]
    steps = [note for entry in history for note in entry["changed"] if "num_steps" in note]
    assert steps == [f"train.num_steps was {a}, is now {b}" for a, b in ((400, 900), (900, 400), (400, 500))]
    assert history[0] == change


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"d_model": 256}}, "model.d_model: 128 there, 256 here"),
        ({"moe": {"top_k": 2}}, "moe.top_k: 1 there, 2 here"),
        ({"moe": {"default": {"ema_decay": 0.5}}}, "moe.default.ema_decay: 0.9 there, 0.5 here"),
        ({"data": {"tokenizer": "bpe:512"}}, "data.tokenizer: bytes there, bpe:512 here"),
        ({"data": {"mask_documents": True}}, "data.mask_documents: False there, True here"),
        ({"train": {"batch_size": 64}}, "train.batch_size: 32 there, 64 here"),
        ({"train": {"seed": 1}}, "train.seed: 0 there, 1 here"),
    ],
)
def test_settings_that_may_not_change_are_refused(tmp_path, sections, words):
    begin(tmp_path)
    before = content(tmp_path)
    with refused(f"{words}.*--workdir"):
        begin(tmp_path, changed(**sections))
    assert content(tmp_path) == before


def test_all_differences_are_listed_in_one_line(tmp_path):
    begin(tmp_path)
    other = changed(model={"d_model": 256, "num_layers": 2}, optim={"peak_lr": 1.0})
    with refused("cannot continue") as error:
        begin(tmp_path, other, corpus_hash="def", vocab_size=512)
    listed = str(error.value).split("(")[1].split(")")[0].split("; ")
    assert listed == [
        "model.d_model: 128 there, 256 here",
        "model.num_layers: 4 there, 2 here",
        "corpus_hash: abc there, def here",
        "vocab_size: 257 there, 512 here",
    ]


def test_the_kind_of_optimizer_must_stay(tmp_path):
    """Its state is in the checkpoints. Whatever else is set in optim may change."""
    begin(tmp_path)
    with start(tmp_path, changed(optim={"schedule": "wsd", "b2": 0.9})) as run:
        assert run.notes == ["optim.schedule was cosine, is now wsd", "optim.b2 was 0.95, is now 0.9"]
    for name, value in (("name", "muon"), ("moment_dtype", "bfloat16"), ("factored", True)):
        with refused(f"optim.{name}: "):
            begin(tmp_path, changed(optim={name: value}))


def test_a_tokenizer_file_may_move_but_not_change(tmp_path):
    here, there = changed(data={"tokenizer": "a/t.json"}), changed(data={"tokenizer": "b/t.json"})
    begin(tmp_path, here, tokenizer_hash="1")
    with start(tmp_path, there, tokenizer_hash="1") as run:
        assert run.notes == ["data.tokenizer was a/t.json, is now b/t.json"]
    with refused("tokenizer_hash: 1 there, 2 here"):
        begin(tmp_path, there, tokenizer_hash="2")


def test_the_run_that_another_starts_from_is_known_by_its_id(tmp_path, monkeypatch):
    """However it is spelt, wherever it is moved; by its place where it is gone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    begin(tmp_path / "runs" / "a")
    begin(tmp_path / "runs" / "other")
    run, recorded = tmp_path / "run", None
    begin(run, changed(init_from="runs/a"))
    for spelt in ("./runs/a", "runs/a/", "~/runs/a", str(tmp_path / "runs" / "a"), "link", "moved", "moved/", "runs/a"):
        if spelt == "link":
            Path("link").symlink_to("runs/a")
        if spelt == "moved":
            Path("runs/a").rename("moved")
        if spelt == "moved/":
            shutil.rmtree("moved")
        begin(run, changed(init_from=spelt))
        source = json.loads((run / RUN_FILE).read_text())["source"]
        assert source == (recorded := recorded or source) and source["run_id"]
    begin(tmp_path / "runs" / "a")  # a new run in its place
    for spelt in ("runs/other", "./runs/a", "nowhere", None):
        with refused(rf"init_from: runs/a there, {spelt} here"):
            begin(run, changed(init_from=spelt))
    begin(run, changed(init_from="runs/a"))  # the same command continues, for which no source is read
    saved = json.loads((run / RUN_FILE).read_text())
    (run / RUN_FILE).write_text(json.dumps({**saved, "source": "runs/a"}))  # or none, as in runs of before
    begin(run, changed(init_from="./runs/a"))


def test_other_peoples_directories_are_left_alone(tmp_path):
    for name in ("thesis.tex", "photos", "a", "b"):
        (tmp_path / name).write_text(name)
    before = content(tmp_path)
    with refused(r"holds a, b, photos and 1 more, but no run\.json"):
        begin(tmp_path)
    assert content(tmp_path) == before
    for below in ("a", "a/below"):
        with refused("Not a directory"):
            begin(tmp_path / below)


def test_what_a_kill_while_writing_leaves_does_not_block_the_next_start(tmp_path):
    (tmp_path / f".{RUN_FILE}.123.tmp").write_text("{")
    with start(tmp_path) as run:
        assert not run.resumed


def test_what_nobody_put_there_is_no_reason_to_refuse_a_directory(tmp_path):
    for name in (".DS_Store", ".nfs0001", "train.log", "slurm-17.out", "job.err"):
        (tmp_path / name).write_text("x")
    (tmp_path / "lost+found").mkdir()
    assert not begin(tmp_path).resumed


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is damaged .it is not JSON"),
        ("[]", "is damaged .it is not a JSON object"),
        ('{"format": 2, "saved": true}', "its format is 2, not 1"),
        ('{"format": 1, "saved": true, "config": {"model": {"wings": 2}}}', r"there is no setting 'model\.wings'"),
        ('{"format": 1, "saved": true, "config": {}}', "it has no 'corpus_hash'"),
    ],
)
def test_a_broken_run_file_is_named(tmp_path, text, words):
    (tmp_path / RUN_FILE).write_text(text)
    with refused(f"{RUN_FILE}.*{words}"):
        begin(tmp_path)
    assert (tmp_path / RUN_FILE).read_text() == text


def test_one_process_at_a_time(tmp_path):
    code = (
        "import sys; from default_moe.config import Config, ConfigError\n"
        "from default_moe.runs.workdir import open_run\n"
        "try: open_run(sys.argv[1], Config(), 'abc', 257).__enter__()\n"
        "except ConfigError as error: print(error)"
    )
    child = [sys.executable, "-c", code, str(tmp_path)]
    with start(tmp_path):
        refused = subprocess.run(child, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert refused.stdout.startswith(f"another process is training in the work directory {tmp_path}: "), refused.stderr
    with start(tmp_path):  # the lock goes with its process
        pass


def test_an_unwritable_place_is_named(tmp_path, monkeypatch):
    def fail(*_args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("default_moe.runs.workdir.write_run", fail)
    with refused(r"cannot be written \(Permission denied\)"):
        begin(tmp_path)
    monkeypatch.undo()
    begin(tmp_path)
