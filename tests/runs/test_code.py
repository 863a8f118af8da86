"""Which edits of the package make other code of a run."""

import shutil
from pathlib import Path

import pytest

from default_moe.config import MoEConfig
from default_moe.methods import METHODS
from default_moe.runs.code import read_code, running_code

PACKAGE = Path(__file__).parents[2] / "default_moe"
# A package of the fewest files; methods are known by the names of their modules.
TINY = {
    "methods/__init__.py": "from default_moe.methods.topk import TopK as TopK\n",
    "methods/routing.py": "def choose(x):\n    return x\n",
    "methods/topk.py": "from default_moe.methods.routing import choose\nclass TopK: pass\n",
    "methods/densemixer.py": "from default_moe.methods.topk import TopK\nclass DenseMixer(TopK): pass\n",
    "methods/default.py": "class DefaultMoE: pass\n",
    "methods/observed.py": "ONE = 1\n",
    "moe/layer.py": "from default_moe.methods import TopK\nfrom default_moe.methods.default import DefaultMoE\n",
    "training/step.py": "from default_moe.methods.observed import ONE\n",
}

LAYER = '''"""Module."""
@wrap
class A(B):
    """Class."""
    x: int = 1
    def f(self, a=None):
        """F."""
        return [a, {"b": self.x}, f"{a!r}"]
'''
SAME = """# A comment.
@wrap
class A( B ) :
    "Other."
    x:int=0x1  # one

    def f(
        self, a = None,
    ):
        return [a, {'b':
                    self.x}, f'{a!r}',]
"""
NONE = {"topk": [], "densemixer": [], "default": []}


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def edited(folder: Path, **files: str | None) -> dict[str, list[str]]:
    """What differs for some methods after files of the package in `folder` are written, or removed."""
    before = read_code(folder).digests
    for name, text in files.items():
        write(folder, **{name: text}) if text is not None else (folder / name).unlink()
    code = read_code(folder)
    names = ("topk", "densemixer", "default")
    return {name: [file[12:] for file in code.differences(before, MoEConfig(router=METHODS[name]()))] for name in names}


def everywhere(*files: str) -> dict[str, list[str]]:
    return {name: list(files) for name in NONE}


def test_comments_docstrings_and_formatting_do_not_count(tmp_path):
    write(tmp_path, **TINY, **{"moe/a.py": LAYER})
    assert edited(tmp_path, **{"moe/a.py": SAME}) == NONE
    for old, new in ("0x1", "2"), ("'b'", "'c'"), ("a!r", "a!s"), ("a = None", "a = 0"), ("@wrap", ""), ("[", "*["):
        other = SAME.replace(old, new)
        assert other != SAME and edited(tmp_path, **{"moe/a.py": other}) == everywhere("moe/a.py"), (old, new)
        assert edited(tmp_path, **{"moe/a.py": SAME}) == everywhere("moe/a.py")


def test_only_the_files_that_a_method_needs_count(tmp_path):
    write(tmp_path, **TINY)
    topk = {"topk": ["methods/topk.py"], "densemixer": ["methods/topk.py"], "default": []}
    assert edited(tmp_path, **{"methods/topk.py": TINY["methods/topk.py"] + "x = 1\n"}) == topk
    assert edited(tmp_path, **{"methods/default.py": "x = 1\n"}) == {**NONE, "default": ["methods/default.py"]}
    routing = {"topk": ["methods/routing.py"], "densemixer": ["methods/routing.py"], "default": []}
    assert edited(tmp_path, **{"methods/routing.py": "x = 1\n"}) == routing
    assert edited(tmp_path, **{"methods/observed.py": "ONE = 2\n"}) == everywhere("methods/observed.py")
    assert edited(tmp_path, **{"methods/alone.py": "x = 1\n"}) == NONE
    assert edited(tmp_path, **{"sharding.py": "x = 1\n", "moe/new.py": ""}) == everywhere("moe/new.py", "sharding.py")
    assert edited(tmp_path, **{"moe/new.py": None, "methods/alone.py": None}) == everywhere("moe/new.py")
    assert edited(tmp_path, **{"moe/layer.py": "def"}) == everywhere("moe/layer.py")  # as it may be while it is edited


def test_that_a_method_is_registered_does_not_count(tmp_path):
    write(tmp_path, **TINY)
    registry = TINY["methods/__init__.py"] + "from default_moe.methods.new import New as New\n"
    assert edited(tmp_path, **{"methods/__init__.py": registry, "methods/new.py": "class New: pass\n"}) == NONE
    patched = registry + "TopK.top_k = 2\n"
    assert edited(tmp_path, **{"methods/__init__.py": patched}) == everywhere("methods/__init__.py")


@pytest.mark.parametrize(
    "imported",
    [
        "from default_moe.methods.helper import f",
        "from default_moe.methods import helper",
        "from default_moe.methods import f",
        "from default_moe.methods import *",
        "from default_moe import methods",
        "import default_moe.methods",
        "import default_moe.methods.helper as h",
        "from . import helper",
        "from .helper import f",
        "from ..methods.helper import f",
        "def g():\n    from .helper import f",
        "from default_moe.methods.other import g",
    ],
)
def test_what_a_method_imports_counts_however_it_is_written(tmp_path, imported):
    write(tmp_path, **{**TINY, "methods/helper.py": "f = 1\n", "methods/other.py": "from .helper import f as g\n"})
    registry = TINY["methods/__init__.py"] + "from default_moe.methods.helper import f as f\n"
    write(tmp_path, **{"methods/__init__.py": registry, "methods/topk.py": f"{imported}\nclass TopK: pass\n"})
    found = edited(tmp_path, **{"methods/helper.py": "f = 2\n"})
    assert found == {"topk": ["methods/helper.py"], "densemixer": ["methods/helper.py"], "default": []}


def test_of_the_package_itself(tmp_path):
    copy = shutil.copytree(PACKAGE, tmp_path / "default_moe", ignore=shutil.ignore_patterns("__pycache__"))
    assert read_code(copy) == running_code(None)

    def more(*names: str) -> dict[str, str]:
        return {name: (copy / name).read_text() + "\nX = 1\n" for name in names}

    left_out = ("compare/plot.py", "bench/step.py", "runs/metrics.py", "cli.py", "methods/hash.py", "methods/remoe.py")
    assert edited(copy, **more(*left_out)) == NONE
    rooms = ("config/moe.py", "data/packing.py", "methods/decision.py", "model/attention.py", "moe/experts/blocks.py")
    rooms += ("moe/layer.py", "runs/trainer.py", "sharding.py", "training/step.py")
    assert edited(copy, **more(*rooms)) == everywhere(*rooms)


def test_a_plugin_counts_with_what_lies_beside_it(tmp_path, monkeypatch):
    files = {
        "my_plugin.py": "import json\nimport my_helper\nfrom my_package.part import x\n",
        "my_helper.py": "y = 1\n",
        "my_package/__init__.py": "",
        "my_package/part.py": "import my_package.rest\nx = 1\n",
        "my_package/rest.py": "",
        "my_package/alone.py": "",
        "site-packages/installed.py": "",
    }
    write(tmp_path / "here", **files)
    monkeypatch.syspath_prepend(str(tmp_path / "here" / "site-packages"))
    monkeypatch.syspath_prepend(str(tmp_path / "here"))
    moe = MoEConfig.from_mapping({"plugin": "my_plugin", "router": "topk"})
    package = write(tmp_path / "package", **TINY)
    before = read_code(package, "my_plugin")
    assert sorted(before.plugin) == [
        *("my_helper.py", "my_package/__init__.py", "my_package/part.py", "my_package/rest.py", "my_plugin.py")
    ]
    write(tmp_path / "here", **{"my_package/rest.py": "z = 1\n", "my_plugin.py": "import installed, my_helper\n"})
    import installed  # noqa: F401

    after = read_code(package, "my_plugin")
    gone = ["my_package/__init__.py", "my_package/part.py", "my_package/rest.py"]
    assert after.differences(before.digests, moe) == [*gone, "my_plugin.py"]
    write(tmp_path / "here", **{"my_plugin.py": "from default_moe.methods.default import DefaultMoE\n"})
    assert "default_moe/methods/default.py" in read_code(package, "my_plugin").that_matters(moe)
    assert "default_moe/methods/default.py" not in after.that_matters(moe)
