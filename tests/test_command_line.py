"""Bad input on the command line: one line that says what is wrong, exit code 2, and nothing written."""

import json
import os
import signal
import sys

import jax
import pytest
from helpers.tiny_runs import REPOSITORY, as_flags, content, environment, run_commands, tiny_settings, write_corpus

from default_moe import cli
from default_moe.config import Config, default_config, flat_items
from default_moe.runs.checkpoint import CheckpointStore

# name: (flags added to a command that would train, words of the error)
TRAIN = {
    "a mistyped key": (["--config.model.d_modle=16"], "did you mean 'd_model'?"),
    "a mistyped section": (["--config.modle.d_model=16"], "did you mean 'model'?"),
    "a mistyped switch": (["--noconfig.optim.decay_al"], "did you mean 'decay_all'?"),
    "a setting below a setting": (["--config.train.num_steps.x=3"], "there is no setting 'train.num_steps.x'"),
    "a setting of no group": (
        ["--config.optim.zzz=1"],
        "no setting 'optim.zzz' (optim.* are b1, b2, clip_norm, ",
    ),
    "a group that is none": (["--config.zzz.b=1"], "no setting 'zzz' (there are checkpoint, data, eval, init_from, "),
    "a mistyped key in a config file": (["--config={here}/mistyped.py"], "line 5, 'config.model.d_modle = 16': "),
    "a wrong type in a config file": (["--config={here}/words.py"], "line 5, 'config.model.d_model = \"wide\"': "),
    "an unknown flag": (["--wrkdir=x"], "wrkdir"),
    "a word that is no flag": (["quickstart"], "'quickstart' is not a flag"),
    "a value of the wrong type": (["--config.train.num_steps=many"], "--config.train.num_steps=many"),
    "no such config file": (["--config=configs/none.py"], "configs/none.py"),
    "a config file without a config": (["--config={here}/records.jsonl"], "no get_config()"),
    "a config file that is not Python": (["--config={here}/broken.py"], "broken.py is not Python"),
    "no such paper config": (["--config=configs/paper.py:9c1"], "9c1 is not one of 8c1, 8c2, 32c1, 32c2, 32c4"),
    "top_k 0": (["--config.moe.top_k=0"], "moe.top_k is 0"),
    "top_k over num_experts": (["--config.moe.top_k=9"], "moe.num_experts = 8"),
    "ema_decay over 1": (["--config.moe.default.ema_decay=1.5"], "moe.default.ema_decay is 1.5, but must lie in"),
    "heads that do not divide the width": (["--config.model.num_heads=3"], "must divide model.d_model = 16"),
    "a mesh that does not fit": (["--config.mesh.data=3"], "does not fit 8 devices"),
    "a batch that does not divide": (["--config.train.batch_size=12"], "multiple of the 8 devices"),
    "experts that do not divide": (
        ["--config.mesh.expert=8", "--config.moe.num_experts=6"],
        "moe.num_experts is 6, but must be a multiple of the 8 devices",
    ),
    "a glob that matches nothing": (["--config.data.files={here}/none/*.txt"], "{here}/none/*.txt"),
    "an empty glob": (["--config.data.files="], "data.files is not set"),
    "a file without text": (["--config.data.files={here}/empty.txt"], "{here}/empty.txt"),
    "a text field that is not there": (["--config.data.files={here}/records.jsonl"], "body"),
    "a tokenizer that is none": (["--config.data.tokenizer={here}/records.jsonl"], "records.jsonl"),
    "a tokenizer that is not there": (["--config.data.tokenizer={here}/none.json"], "none.json"),
    "a data set that is not known": (["--config.data.files=", "--config.data.name=wikipedai"], "wikipedia"),
    "a workdir of something else": (["--workdir={here}/foreign"], "foreign"),
    "a workdir elsewhere": (["--workdir=gs://bucket/run"], "nothing is read from or written to an address"),
    "data elsewhere": (["--config.data.dir=s3://bucket/data"], "data.dir is 's3://bucket/data', but must be a path"),
    "a workdir below a file": (["--workdir={here}/records.jsonl/run"], "cannot be"),
}

EVAL = {
    "no workdir": ([], "--workdir"),
    "a workdir that is not there": (["--workdir={here}/none"], "there is no work directory"),
    "no checkpoint": (["--workdir={here}/foreign"], "no checkpoint"),
    "a step that is not there": (["--workdir={here}/trained", "--step=7"], "no checkpoint of step 7"),
    "a step that is no number": (["--workdir={here}/trained", "--step=last"], "--step=last"),
    "a setting of the checkpoint": (["--workdir={here}/trained", "--config.moe.top_k=3"], "moe.* is fixed"),
    "where the checkpoint's run began": (
        ["--workdir={here}/trained", "--config.init_from={here}"],
        "init_from is fixed by the checkpoint; only eval, mesh, data",
    ),
    "a bad value of a setting that was not set": (
        ["--workdir={here}/trained", "--config.eval.batch_size=0"],
        "eval.batch_size is 0, but must be at least 1",
    ),
    "a mistyped setting": (["--workdir={here}/trained", "--config.eval.promt=x"], "did you mean 'prompt'?"),
    "an unknown flag": (["--workdir={here}/trained", "--stp=3"], "stp"),
}


HUGE = f"1{'0' * 30}"
PATHS = {
    "a path with NUL": "a\0b",
    "a path that is no text": "a\udc80b",
    "the home of nobody": "~nosuchuser/x",
    "a name that is too long": "{here}/" + "n" * 300,
    "a path that is too long": "{here}" + "/n" * 3000,
}


def bad_paths(flag, *more):
    return {f"{name} in {flag}": ([*more, f"{flag}={path}"], f"{flag} is ") for name, path in PATHS.items()}


TRAIN |= bad_paths("--workdir") | {
    "a path with NUL in a setting": (["--config.data.dir=a\0b"], "data.dir is 'a\\x00b', but must be text without NUL"),
    "the home of nobody in a setting": (["--config.init_from=~nosuchuser/x"], "home directory of a known user"),
    "digits that are no ASCII": (["--config.data.tokenizer=bpe:\u0663\u0660\u0660"], "at least 257"),
    "a width that no compiler takes": ([f"--config.model.d_model={2**32}"], "at most 1048576"),
    "a huge number of steps": ([f"--config.train.num_steps={HUGE}"], f"is {HUGE}, but must be at most 2147483647"),
    "a wrong value of many characters": (["--config.train.num_steps=" + "x" * 5000], "invalid literal"),
    "a config file with a long name": (["--config=" + "n" * 5000], "there is no config file"),
    "a config file that takes no argument": (["--config=configs/quickstart.py:small"], "with the argument 'small'"),
    "a config file that returns something else": (["--config={here}/nothing.py"], "returns no ConfigDict: None"),
    "processes without end": (["--coordinator=localhost:1", f"--num_processes={HUGE}", "--process_id=0"], f"{HUGE}"),
}
EVAL |= bad_paths("--workdir") | {
    "a step before the first": (["--workdir={here}/trained", "--step=-1"], "--step=-1"),
    "a huge step": (["--workdir={here}/trained", f"--step={HUGE}"], f"--step={HUGE}"),
    "a workdir that is a file": (["--workdir={here}/empty.txt"], "empty.txt"),
    "a prompt that is no text": (["--workdir={here}/trained", "--prompt=a\udc80"], "prompt is 'a\\udc80'"),
    "prompts that are not there": (["--workdir={here}/trained", "--prompts={here}/none"], "No such file"),
    "prompts in no file": (["--workdir={here}/trained", "--prompts={here}/empty.txt"], "there is no text in it"),
    "prompts that are no text": (["--workdir={here}/trained", "--prompts={here}/latin"], "can't decode byte"),
    "a share above all": (["--workdir={here}/trained", "--top_p=1.5"], "--top_p is 1.5, but must be above 0"),
    "a share that is no number": (["--workdir={here}/trained", "--top_p=nan"], "--top_p is nan"),
    "fewer than no tokens": (["--workdir={here}/trained", "--top_k=-1"], "--top_k=-1"),
    "text beside tasks": (["--workdir={here}/trained", "--tasks=paper", "--prompt_only"], "--prompt_only does not go"),
    "questions of no task": (["--workdir={here}/trained", "--limit=3"], "--limit goes with --tasks"),
    "no question": (["--workdir={here}/trained", "--tasks=paper", "--limit=0"], "--limit=0"),
    "tasks without a name": (["--workdir={here}/trained", "--tasks=,"], "--tasks names no task"),
    "no folder of tasks": (
        ["--workdir={here}/trained", "--tasks=a", "--include_path={here}/none"],
        "--include_path is {here}/none, but there is no such folder",
    ),
}
ANALYSIS = {
    "no analysis": ([], "which analysis is not said"),
    "an analysis that is not there": (["gradient" * 1000], "there is no analysis"),
    "no workdir": (["gradients"], "--workdir is missing"),
    "a step before the first": (["gradients", "--workdir={here}/trained", "--step=-1"], "--step=-1"),
    "batches without end": (["gradients", "--workdir={here}/trained", f"--batches={HUGE}"], f"--batches={HUGE}"),
    "another reference": (["gradients", "--workdir={here}/trained", "--reference=true"], "--reference=true"),
    "a method that is none": (["gradients", "--workdir={here}/trained", "--methods=topk,x"], "--methods has 'x'"),
    "K in other digits": (["gradients", "--workdir={here}/trained", "--top_k=\u00b2"], "numbers from 1 to 7"),
    "K of many digits": (["gradients", "--workdir={here}/trained", "--top_k=" + "9" * 5000], "numbers from 1 to 7"),
    **bad_paths("--workdir", "gradients"),
}
BENCH = {
    "another suite": (["--suite=all"], "--suite=all"),
    "rounds without end": ([f"--rounds={HUGE}"], f"--rounds={HUGE}"),
    "a shape in words": (["--shape=large"], "five numbers"),
    "a shape without end": ([f"--shape={HUGE},256,8,1,704"], "below 2**31"),
    "another backend": (["--matmul=fast"], "--matmul is 'fast'"),
    "a method that is none": (["--suite=step", "--methods=x"], "--methods is 'x'"),
    "no folder for results": (["--json={here}/none/x.json"], "there is no directory"),
    "a folder as file of results": (["--json={here}"], "it is a directory"),
    "a picture of no kind": (["--plot={here}/x.doc"], "x.doc"),
    "a folder below a file": (["--suite=accelerator", "--out={here}/empty.txt/x"], "cannot write to"),
    **bad_paths("--json"),
    **bad_paths("--plot"),
    **bad_paths("--profile", "--suite=step"),
    **bad_paths("--out", "--suite=accelerator"),
}
PLAN = {
    "no topology": ([], "--topology is missing"),
    "a topology that is none": (["--topology=v9:4"], "--topology is 'v9:4'"),
    "a topology of many characters": (["--topology=" + "x" * 5000], "--topology is 'xxx"),
    "devices in other digits": (["--topology=cpu:\u00b2"], "must be one of"),
    "devices without end": ([f"--topology=cpu:{HUGE}"], "must be one of"),
    "candidates without end": (["--topology=cpu:1", f"--compile={HUGE}"], f"--compile={HUGE}"),
    **bad_paths("--json", "--topology=cpu:1"),
}
COMPARE = {
    "one seed left out": (["--seeds=1,,2"], "--seeds is '1,,2'"),
    "a huge seed": ([f"--seeds={HUGE}"], "different whole numbers"),
    "seeds in other digits": (["--seeds=\u0661"], "different whole numbers"),
    "thousands of seeds": (["--seeds=" + ",".join(map(str, range(5000)))], "make 10000 runs, but must at most 1000"),
    "a method that is none": (["--methods=topk,x"], "--methods has 'x'"),
    "a method twice": (["--methods=topk,topk"], "a method is given twice"),
    "brackets without end": (["--set=mesh.rules=" + "(" * 5000], "mesh.rules"),
    "a setting that is a huge number": ([f"--set=train.num_steps={HUGE}"], "must be at most 2147483647"),
    "a workdir that is a file": (["--workdir={here}/empty.txt"], "empty.txt"),
    **bad_paths("--workdir"),
}

CONVERT = {
    "nothing to do": ([], "what to do is not said"),
    "something else to do": (["upload"], "there is no 'upload'"),
    "no model": (["import", "--workdir={here}/new"], "--model is missing"),
    "no place": (["import", "--model={here}/foreign"], "--workdir is missing"),
    "a folder of something else": (
        ["import", "--model={here}/foreign", "--workdir={here}/new"],
        "config.json cannot be",
    ),
    "a flag of the other": (["import", "--model=a", "--workdir=b", "--out=c"], "--out does not go with import"),
    "nowhere to go": (["export", "--workdir={here}/trained"], "--out is missing"),
    "no run": (["export", "--workdir={here}/none", "--out={here}/new"], "there is no work directory"),
    "a run without weights": (["export", "--workdir={here}/trained", "--out={here}/new"], "does not fit this model"),
    "two to upcycle": (["upcycle", "--model=a", "--workdir=b", "--out=c"], "either --model or --workdir"),
    "nowhere to upcycle to": (["upcycle", "--model=a"], "--out is missing"),
    "experts already": (["upcycle", "--workdir={here}/trained", "--out={here}/new"], "have experts already"),
    "a flag of upcycle": (["export", "--workdir=a", "--out=b", "--noise=0.1"], "--noise does not go with export"),
    "too much to draw": (["upcycle", "--model=a", "--out=b", "--redraw=1.5"], "--redraw is 1.5, but must lie between"),
    "a type that is none": (["export", "--workdir=a", "--out=b", "--dtype=int8"], "--dtype=int8"),
    **bad_paths("--workdir", "import", "--model={here}"),
    **bad_paths("--out", "export", "--workdir={here}/trained"),
}

CASES = {
    "train.py": TRAIN,
    "eval.py": EVAL,
    "default_moe/analysis/__main__.py": ANALYSIS,
    "default_moe/bench/__main__.py": BENCH,
    "default_moe/plan/__main__.py": PLAN,
    "default_moe/compare/__main__.py": COMPARE,
    "default_moe/convert/__main__.py": CONVERT,
}
WORDS = {f"{program}: {name}": words for program, cases in CASES.items() for name, (_, words) in cases.items()}
MISTYPED = """from default_moe.config import default_config

def get_config():
    config = default_config()
    config.model.d_modle = 16
    return config
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Exit code, output and errors of every command, and what changed on the disk but for prepared data."""
    here = tmp_path_factory.mktemp("bad")
    write_corpus(here / "text")
    (here / "records.jsonl").write_text(json.dumps({"body": "some text"}) + "\n")
    (here / "empty.txt").touch()
    (here / "latin").write_bytes("caf\u00e9".encode("latin-1"))
    (here / "broken.py").write_text("def get_config(:\n")
    (here / "mistyped.py").write_text(MISTYPED)
    (here / "words.py").write_text(MISTYPED.replace("d_modle = 16", 'd_model = "wide"'))
    (here / "nothing.py").write_text("def get_config():\n    pass\n")
    (here / "foreign").mkdir()
    (here / "foreign" / "thesis.tex").write_text("years of work")
    settings = tiny_settings(here)
    with CheckpointStore(here / "trained") as store:
        store.save(
            4,
            {"params": {}, "step": jax.numpy.zeros(())},
            {"config": Config.from_mapping(settings).to_dict(), "tokenizer": {"kind": "bytes"}},
        )
    base = as_flags(settings)
    before_flags = {"train.py": [*base, f"--workdir={here}/new"]}
    commands = [
        [program, *before_flags.get(program, []), *flags]
        for program, cases in CASES.items()
        for flags, _ in cases.values()
    ]
    commands = [[word.replace("{here}", str(here)) for word in command] for command in commands]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8", "DEFAULT_MOE_DATA": str(here / "prepared")}
    repository = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

    def state():
        return {path: digest for path, digest in content(here).items() if "prepared" not in path}

    before = state()
    results = run_commands(commands, cwd=repository, env=env)
    assert state() == before
    return here, dict(zip(WORDS, results, strict=True))


@pytest.mark.parametrize(("name", "words"), WORDS.items())
def test_bad_input_gets_one_line_and_exit_code_2(answers, name, words):
    here, results = answers
    code, _, errors = results[name]
    assert code == 2, errors
    assert errors.startswith("error: ") and errors.count("\n") == 1, errors
    assert words.replace("{here}", str(here)) in errors
    assert len(errors) < 1500


def test_help_tells_flags_and_settings_from_any_folder(tmp_path):
    results = run_commands([[program, "--help"] for program in CASES], tmp_path, environment())
    texts = dict(zip(CASES, (out for _, out, _ in results), strict=True))
    for code, out, err in results:
        assert (code, err) == (0, "")
        assert "\nFlags:\n  --" in out
        assert "/work" not in out and str(REPOSITORY) not in out
        assert max(map(len, out.splitlines())) <= 120
    for program in ("train.py", "default_moe/compare/__main__.py"):
        for name in dict(flat_items(default_config().to_dict())):
            assert f"\n  --config.{name}=" in texts[program]
    assert "  --step\n      Step to evaluate" in texts["eval.py"]
    assert "--compilation_cache" not in texts["default_moe/bench/__main__.py"]  # it times compilations


def test_our_config_files_are_found_from_any_folder(tmp_path):
    commands = [["train.py", f"--config={name}:9c1"] for name in ("configs/paper.py", "paper.py")]
    for code, _, err in run_commands(commands, tmp_path, environment()):
        assert code == 2 and "9c1 is not one of" in err
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "paper.py").write_text("own = 1")
    [(_, _, err)] = run_commands(commands[:1], tmp_path, environment())
    assert "configs/paper.py has no get_config()" in err
    [(_, _, err)] = run_commands([["train.py", "--config=config/run.py"]], tmp_path, environment())
    assert "there is no config file 'config/run.py'" in err


def test_a_platform_that_is_not_there_is_named():
    env = {**environment(), "JAX_PLATFORMS": "nonsense"}
    [(code, _, err)] = run_commands([["train.py", "--workdir=/nowhere/run"]], REPOSITORY, env)
    assert code == 2
    assert err.startswith("error: JAX finds no device with JAX_PLATFORMS='nonsense': ") and err.count("\n") == 1


def test_help_that_nobody_reads_ends_quietly():
    """As in `train.py --help | head -1`."""
    results = run_commands([[program, "--help"] for program in CASES], REPOSITORY, environment(), "pipe")
    assert {(code, errors) for code, _, errors in results} == {(128 + signal.SIGPIPE, "")}


def test_what_nobody_reads_is_lost_when_a_program_ends(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        print("a line", end="")  # stays in the stream
        cli._flush_streams()
        print("and more", flush=True)
        monkeypatch.undo()
