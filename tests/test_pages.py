"""Every page can be followed: its links lead somewhere, its commands are read by the programs they name."""

import importlib.util
import itertools
import re
import shlex
import sys
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags

from default_moe import cli
from default_moe.compare import runs as comparison_runs
from default_moe.config import Config, default_config, flat_items
from default_moe.methods import METHODS
from default_moe.plan import topologies
from default_moe.processes import distributed
from default_moe.runs import benchmarks, saved_run, trainer

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(p for d in ("configs", "default_moe") for p in (ROOT / d).rglob("README.md"))]
LANGUAGES = ("sh", "text", "python", "bibtex")  # of fenced blocks: commands are in "sh" only
MANY_PROCESSES = ("train.py", "eval.py")
SECTIONS = tuple(default_config())
SETTINGS = dict(flat_items(default_config().to_dict()))
PYTHONS = (".venv/bin/python", ".venv-plan/bin/python", "python")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


class Read(Exception):
    """A program has read its command line and is about to work."""


def blocks(page: Path) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.S | re.M)


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.S | re.M)


def inline_code(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


def commands(page: Path) -> list[list[str]]:
    """Every simple command of the page's shell blocks, and those in its text, as words."""
    found = []
    for language, text in blocks(page):
        if language == "sh":
            for line in text.replace("\\\n", " ").splitlines():
                found += [] if line.startswith("#") else split(line)
    for code in inline_code(page):
        if code.startswith(("train.py ", "eval.py ", "-m ")):
            found.append(["python", *shlex.split(code)])
        elif code.startswith(tuple(f"{python} " for python in PYTHONS)):
            found.append(shlex.split(code))
    return found


def split(line: str) -> list[list[str]]:
    """The commands of a line. One that another machine runs is a command too, and so is a job of an array."""
    found = []
    line = line.replace("$SLURM_ARRAY_TASK_ID", "0")
    for words in (shlex.split(part) for part in re.split(r" && (?=[^']*(?:'[^']*'[^']*)*$)", line) if part):
        if words[0] == "srun":
            words = words[1:]
        if words[0] == "gcloud":
            remote = next(word for word in words if word.startswith("--command="))
            found += split(remote.removeprefix("--command="))
        else:
            found.append(words)
    return found


def slugs(page: Path) -> list[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.fixture
def own_flags():
    """absl's flags without those of programs that other tests have loaded."""
    before = {name: flags.FLAGS[name] for name in flags.FLAGS}
    absl_own = {
        flag.name for module, of in flags.FLAGS.flags_by_module_dict().items() for flag in of if "absl" in module
    }

    def remove():
        for module in flags.FLAGS.flags_by_module_dict():
            if module.startswith("default_moe.") and module != cli.__name__:
                package, _, name = module.rpartition(".")  # a program that imports it is to have its flags
                sys.modules.pop(module, None)
                vars(sys.modules[package]).pop(name, None)
        for name in list(flags.FLAGS):
            if name not in absl_own and name in flags.FLAGS:
                delattr(flags.FLAGS, name)

    remove()
    yield remove
    remove()
    for name, flag in before.items():
        if name not in flags.FLAGS:
            flags.FLAGS[name] = flag


@pytest.fixture
def read_command(own_flags, monkeypatch, capfd):
    """Has the program that a command names read it: returns what is wrong, "" if nothing. Nothing is run."""

    def stop(*args, **kwargs):
        raise Read

    class Checkpoint(dict):
        __missing__ = stop

    class Store:
        def __init__(self, *args, **kwargs):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

        def newest_whole(self):
            return 1

        def read_meta(self, step):
            return Checkpoint(config=Config().to_dict())

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(distributed, "start", lambda *args: None)
    monkeypatch.setattr(trainer, "train", stop)
    monkeypatch.setattr(benchmarks, "require_lm_eval", lambda: None)
    monkeypatch.setattr(saved_run, "CheckpointStore", Store)
    monkeypatch.setattr(comparison_runs, "do_runs", stop)
    for name in ("_tpu_devices", "_gpu_devices"):
        monkeypatch.setattr(topologies, name, stop)

    def read(path, arguments):
        own_flags()
        source = ROOT / "default_moe" / path if path in MANY_PROCESSES else ROOT / path  # where its flags are
        spec = importlib.util.spec_from_file_location("program_of_a_page", source)
        program = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(program)
        if path.startswith("default_moe/bench/"):
            for suite in ("layer", "step", "scaling"):
                monkeypatch.setattr(getattr(program, suite), "run", stop)
            monkeypatch.setattr(program, "_accelerator", stop)
        if path.startswith("default_moe/convert/"):
            for name in ("import_model", "export_model", "read_model", "read_checkpoint"):
                monkeypatch.setattr(program, name, stop)
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        capfd.readouterr()
        try:
            cli.run(program.main, many_processes=path in MANY_PROCESSES)
        except Read:
            return ""
        except SystemExit as error:
            if arguments == ["--help"] and error.code == 0:
                return ""
            return f"exit code {error.code}: {capfd.readouterr().err}"
        raise AssertionError("the program ended without reading its command line to the end")

    return read


def problem_of(words: list[str], read) -> str:
    """What is wrong with a command, "" if nothing."""
    program, *arguments = words
    if words[:2] == ["cd", "default_moe"]:
        return ""
    if words[:3] == ["python3", "-m", "venv"]:
        return "" if len(words) == 4 and words[3].startswith(".venv") else "not an environment of ours"
    if program.endswith("/bin/pip"):
        files = [word for before, word in itertools.pairwise(arguments) if before == "-r"]
        missing = [file for file in files if not (ROOT / file).is_file()]
        return f"no {missing[0]}" if missing else ""
    if program not in PYTHONS:
        return f"{program} is not a program that pages start"
    if arguments[:2] == ["-m", "pytest"]:
        return problem_of_pytest(arguments[2:])
    if arguments[0] == "-m":
        module, arguments = arguments[1].replace(".", "/"), arguments[2:]
        path = Path(f"{module}.py").name if (ROOT / f"{module}.py").is_file() else f"{module}/__main__.py"
    else:
        path, arguments = arguments[0], arguments[1:]
    return read(path, arguments) if (ROOT / path).is_file() else f"there is no {path}"


def problem_of_pytest(arguments: list[str]) -> str:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    known = [marker.split(":")[0].split("(")[0] for marker in settings["markers"]]
    if not arguments:
        return ""
    if arguments[0] != "-m" or len(arguments) != 2:
        return f"{arguments} is more than a choice of marked tests"
    unknown = [word for word in re.findall(r"\w+", arguments[1]) if word not in ("not", "and", "or", *known)]
    return f"there is no marker {unknown[0]!r}" if unknown else ""


def problem_of_link(page: Path, link: str) -> str:
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    if not target.is_relative_to(ROOT) or not target.exists():
        return f"{link}: there is no such file"
    if anchor and (target.suffix != ".md" or anchor not in slugs(target)):
        return f"{link}: there is no such heading"
    return ""


def problem_of_setting(code: str) -> str:
    """What is wrong with the settings that a piece of inline code names, "" if nothing."""
    setting = re.match(rf"(?:--config\.)?((?:{'|'.join(SECTIONS)})\.[\w.]*\w)(?=$|=)", code)
    if setting and not setting[1].endswith(".py") and setting[1] not in SETTINGS:
        return f"there is no setting {setting[1]}"
    if re.match(rf"({'|'.join(METHODS)}):\w+=", code):
        method, *own = code.split(":")
        names = [f"moe.{method}.{setting.split('=')[0]}" for setting in own]
        return next((f"there is no setting {name}" for name in names if name not in SETTINGS), "")
    return ""


@each_page
def test_links_lead_to_files_and_headings(page):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    problems = [problem_of_link(page, link) for link in links if not link.startswith("https://")]
    assert not [problem for problem in problems if problem]


@each_page
def test_programs_read_the_commands(page, read_command):
    for words in commands(page):
        problem = problem_of(words, read_command)
        assert not problem, f"{shlex.join(words)}\n{problem}"


@each_page
def test_blocks_say_what_they_hold(page):
    assert page.read_text().count("```") == 2 * len(blocks(page))
    assert {language for language, _ in blocks(page)} <= set(LANGUAGES)


@each_page
def test_settings_in_the_text_exist(page):
    problems = [problem_of_setting(code) for code in inline_code(page)]
    assert not [problem for problem in problems if problem]


def test_flags_in_the_text_exist(read_command):
    known = {"requeue"}  # SLURM's
    for path in (
        "train.py",
        "eval.py",
        *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("default_moe/*/__main__.py")),
    ):
        read_command(path, [])
        known |= set(flags.FLAGS)
    named = {
        (page, flag) for page in PAGES for code in inline_code(page) for flag in re.findall(r"^--(\w[\w-]*)", code)
    }
    assert len(named) > 30
    assert not [(str(page), flag) for page, flag in named if flag not in known]


def test_rows_of_the_comparisons_page_are_flags_of_compare(read_command):
    page = ROOT / "default_moe" / "compare" / "README.md"
    rows = [code for code in inline_code(page) if code.startswith("--") and "=" in code and "key=value" not in code]
    assert len(rows) > 15
    for row in rows:
        arguments = ["--config=configs/compare_small.py", "--seeds=0", *shlex.split(row)]
        problem = read_command("default_moe/compare/__main__.py", arguments)
        assert not problem, f"{row}\n{problem}"


@pytest.mark.parametrize("page", ["README.md", "default_moe/moe/README.md"])
def test_the_layer_in_code_can_be_traced(page):
    code = next(text for language, text in blocks(ROOT / page) if language == "python")
    names: dict = {}
    jax.eval_shape(lambda: exec(compile(code, page, "exec"), names))
    assert names["y"].shape == names["x"].shape


def test_the_layer_under_a_mesh_in_code_trains_as_on_one_device():
    page = ROOT / "default_moe" / "moe" / "README.md"
    _, code = (text for language, text in blocks(page) if language == "python")
    names: dict = {}
    exec(compile(code, page, "exec"), names)
    experts = names["state"]["variables"]["params"]["experts"]["up"]
    assert {shard.data.shape for shard in experts.addressable_shards} == {(2, 32, 64)}  # of 8 experts
    assert len(experts.sharding.device_set) == 8
    state, step = names["init"](jax.random.key(0)), jax.jit(names["train_step"])
    for index in range(5):
        state, loss = step(state, *names["batch"](index))
    assert names["loss"] == pytest.approx(float(loss), rel=1e-5)
    for ours, alone in zip(jax.tree.leaves(names["state"]), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(ours, alone, rtol=1e-3, atol=1e-6)
    assert np.any(names["state"]["variables"]["default_vectors"]["ema"], axis=1).all()


def test_the_config_file_in_code_is_one():
    (code,) = (text for language, text in blocks(ROOT / "configs" / "README.md") if language == "python")
    names: dict = {}
    exec(compile(code, "configs/README.md", "exec"), names)
    assert Config.from_config_dict(names["get_config"]()).moe.num_experts == 16


def test_the_readme_is_short_and_has_the_test_command_once():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert len([line for line in lines if re.match(r"\.venv/bin/pip install .*pytest", line)]) == 1
