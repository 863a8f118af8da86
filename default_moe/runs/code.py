"""The code that trains a run: a digest of every file that its result can depend on, and which of them matter to it.

Comments, docstrings and formatting do not count. Nor does another method's file: imports tell which files of `methods/`
a run needs, and that `methods/__init__.py` imports all of them means nothing.
"""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from default_moe.config import MoEConfig
from default_moe.methods import METHODS
from default_moe.runs.syntax import digest, plugin_paths, read_source

_PACKAGE = Path(__file__).parents[1]
_METHODS = f"{_PACKAGE.name}/methods/"
_REGISTRY = f"{_METHODS}__init__.py"
# What computes weights and figures. `processes` only starts and ends a run; the rest of `runs` writes and shows.
_ROOMS = ("config", "data", "methods", "model", "moe", "training")
_FILES = (
    "hardware",
    "sharding",
    *(f"runs/{name}" for name in ("evaluation", "fine_tuning", "measurements", "trainer", "warm_up")),
)


@dataclass(frozen=True)
class Code:
    """The files that count.

    digests: by file, "default_moe/moe/layer.py" for instance.  imports: by file, the files of methods and of the plugin
    that it needs.  plugin: the files of the plugin.
    """

    digests: Mapping[str, str]
    imports: Mapping[str, frozenset[str]]
    plugin: frozenset[str]

    @property
    def digest(self) -> str:
        """One of all files."""
        return digest(repr(sorted(self.digests.items())))

    def differences(self, before: Mapping[str, str], moe: MoEConfig) -> list[str]:
        """Return the files that matter to a run with these settings and are not as they were.

        before: their digests.
        """
        gone = {file for file in before if file not in self.digests and not file.startswith(_METHODS)}
        return sorted(gone | {file for file in self.that_matters(moe) if self.digests[file] != before.get(file)})

    def that_matters(self, moe: MoEConfig) -> set[str]:
        """Return the files that a run with these settings depends on."""
        own = self._closure(self._files_of([type(moe.method)]) | self.plugin)
        others = self._files_of(METHODS.values()) - own
        rest = {file for file in self.digests if not file.startswith(_METHODS)}
        return rest | own | self._closure({needed for file in rest for needed in self.imports[file]} - others)

    def _files_of(self, methods: Iterable[type]) -> set[str]:
        """Return the files in which the methods are defined."""
        names = [method.__module__.replace(".", "/") for method in methods]
        return {file for name in names for file in (f"{name}.py", f"{name}/__init__.py") if file in self.digests}

    def _closure(self, files: Iterable[str]) -> set[str]:
        """Return the files, and what they need, directly or not."""
        found, waiting = set[str](), list(files)
        while waiting:
            if (file := waiting.pop()) not in found:
                found.add(file)
                waiting += self.imports[file]
        return found


@functools.cache
def running_code(plugin: str | None) -> Code:
    """Return the code of this process, as it was on the disk when this was first called.

    plugin: what `moe.plugin` names. It has been imported.
    """
    return read_code(_PACKAGE, plugin)


def read_code(package: Path, plugin: str | None = None) -> Code:
    """Return the code of the package in that folder, and of a plugin that has been imported."""
    paths = [path for room in _ROOMS for path in sorted((package / room).rglob("*.py"))]
    paths += [package / f"{name}.py" for name in _FILES]
    places = {f"{_PACKAGE.name}/{path.relative_to(package).as_posix()}": path for path in paths}
    plugins = plugin_paths(plugin) if plugin else {}
    found = {file: read_source(path, file, file == _REGISTRY) for file, path in {**places, **plugins}.items()}
    sources = {file: source for file, source in found.items() if source}

    methods = frozenset(file for file in sources if file.startswith(_METHODS))
    by_module = {_module(file): file for file in methods.union(plugins) & sources.keys()}
    exports = {name: by_module.get(module) for module, name in sources[_REGISTRY].imports}

    def needs(module: str, name: str) -> frozenset[str]:
        """The files of methods and of the plugin that `from module import name` needs; all, where that is not known."""
        files = {by_module[each] for each in (module, f"{module}.{name}") if each in by_module}
        if module == _module(_REGISTRY) and f"{module}.{name}" not in by_module:
            origin = exports.get(name)
            return frozenset(files | {origin}) if origin else methods
        return methods if f"{module}.{name}" == _module(_REGISTRY) else frozenset(files)

    imports = {
        file: frozenset[str]().union(*(needs(*each) for each in source.imports)) for file, source in sources.items()
    }
    return Code(
        digests={file: source.digest for file, source in sources.items()},
        imports={**imports, _REGISTRY: frozenset()},
        plugin=frozenset(plugins) & sources.keys(),
    )


def _module(file: str) -> str:
    """Return "a.b" of "a/b.py" and of "a/b/__init__.py"."""
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
