"""What a Python file does and needs: a digest of its code without comments and docstrings, and its imports."""

import ast
import hashlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

_INSTALLED = {"site-packages", "dist-packages"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


class Source(NamedTuple):
    """A file. imports: module and name, ("a.b", "c") of `from a.b import c` and ("a.b", "*") of `import a.b`."""

    digest: str
    imports: tuple[tuple[str, str], ...]


def read_source(path: Path, name: str, registry: bool = False) -> Source | None:
    """Return what the file at `path` does; None if it cannot be read.

    name: below the folder that Python finds it in, "a/b.py" for the module a.b.  registry: leave imports out of the
    digest.
    """
    try:
        content = path.read_bytes()
    except OSError:
        return None
    try:
        tree = ast.parse(content)
        nodes = list(ast.walk(tree))
        imports = tuple(_imports(nodes, name))
        for node in nodes:
            if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
                del node.body[0]
        if registry:
            tree.body = [part for part in tree.body if not isinstance(part, ast.Import | ast.ImportFrom)]
        return Source(digest(_text(tree)), imports)
    except (SyntaxError, ValueError, RecursionError):  # what runs was another file
        return Source(digest(content.hex()), ())


def digest(text: str) -> str:
    """Return 12 hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def plugin_paths(name: str) -> dict[str, Path]:
    """Return the files of a plugin, by name: the module, its packages, and what they import that belongs to it.

    That is what lies in the same package, or beside it and is not installed. All of it has been imported.
    """
    top, home = name.split(".")[0], _path(name)
    found, waiting = dict[str, Path](), [name]
    while waiting:
        module = waiting.pop()
        path = _path(module)
        if home is None or path is None:
            continue
        beside = path.is_relative_to(home.parent) and not _INSTALLED & set(path.parts)
        file = f"{module.replace('.', '/')}{'/__init__' if path.name == '__init__.py' else ''}.py"
        if file not in found and (module.split(".")[0] == top or (beside and not _is_ours(module))):
            found[file] = path
            source = read_source(path, file)
            waiting.append(module.rpartition(".")[0])  # its package
            waiting += [each for base, what in (source.imports if source else ()) for each in (base, f"{base}.{what}")]
    return found


def _is_ours(module: str) -> bool:
    return module.split(".")[0] == __name__.split(".")[0]


def _path(module: str) -> Path | None:
    """Where the source of a module that has been imported is."""
    file = getattr(sys.modules.get(module), "__file__", None)
    return Path(file) if file and file.endswith(".py") else None


def _imports(nodes: Iterable[ast.AST], name: str) -> Iterator[tuple[str, str]]:
    package = name.split("/")[:-1]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, "*") for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((module, alias.name) for alias in node.names)


def _text(value: Any) -> str:
    """Return a syntax tree as text, without what its nodes lack, which differs between versions of Python."""
    if isinstance(value, ast.AST):
        fields = [
            f"{name}={_text(field)}" for name, field in ast.iter_fields(value) if field is not None and field != []
        ]
        return f"{type(value).__name__}({','.join(fields)})"
    return f"[{','.join(map(_text, value))}]" if isinstance(value, list) else repr(value)
