"""The user's own text: .txt, .md, .jsonl, .jsonl.gz and .parquet files, read as a stream.

A line of .jsonl and a row of .parquet is a document. So is a .txt or .md file, unless it is large: then it is cut at
line ends into pieces, each a document of its own, so that memory does not grow with it. A corpus of a few such files
is cut into smaller pieces, so that some can be held out.
"""

import codecs
import errno
import glob
import gzip
import hashlib
import io
import json
import os
import re
import stat
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from default_moe.data.corpus import Split, decode_utf8, in_split
from default_moe.data.paths import expanded
from default_moe.data.sources import describe
from default_moe.errors import ConfigError, closest, shown
from default_moe.files import open_regular

PLAIN = (".txt", ".md")
JSON_LINES = (".jsonl", ".jsonl.gz")
SUFFIXES = (*PLAIN, *JSON_LINES, ".parquet")

LARGEST_PIECE = 4 << 20  # bytes of a plain file in one document
FEW_FILES = 32  # plain files; with fewer, the corpus is cut into about PIECES pieces
PIECES = 256
SMALLEST_PIECE = 1 << 10
LONGEST_LINE = 256 << 20  # bytes of one JSON document

# A UTF-32 file begins as a UTF-16 file may.
_MARKS = {"utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)}
Wanted = Callable[[int], bool]


class TextFiles:
    """The documents of the files that a glob (or several, separated by commas) names. See `Corpus`.

    A document's name, whose hash decides its split, is the file's name from the glob's fixed part on and the
    document's number in the file; the same files in another folder are split in the same way.
    """

    def __init__(self, patterns: str, text_field: str, validation_fraction: float) -> None:
        """Raises ConfigError if a glob names no file or one of an unknown kind.

        validation_fraction: 1 holds out all of them, and cuts few small files into no pieces.
        """
        self.name = "text_files"
        self.replaced: Counter[str] = Counter()
        self._text_field = text_field
        self._validation_fraction = validation_fraction
        self._files = _find_files(patterns)
        self._piece = LARGEST_PIECE if validation_fraction == 1 else _piece_size([path for _, path in self._files])

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr((1, self._text_field, self._validation_fraction, self._piece)).encode())
        for name, path in self._files:
            known = path.stat()
            digest.update(repr((name, str(path.resolve()), known.st_size, known.st_mtime_ns)).encode())
        return digest.hexdigest()

    def sources(self) -> dict[str, Any]:
        return describe(self._files)

    def documents(self, split: Split) -> Iterator[str]:
        for name, path in self._files:

            def wanted(index: int, name: str = name) -> bool:
                return in_split(f"{name}#{index}", split, self._validation_fraction)

            try:
                for text, replaced in self._read(path, wanted):
                    if replaced:
                        self.replaced[str(path)] += replaced
                    if text:
                        yield text
            except OSError as error:
                raise ConfigError(
                    f"data.files: {shown(path)} cannot be read: {shown(error.strerror or error)}"
                ) from error

    def _read(self, path: Path, wanted: Wanted) -> Iterator[tuple[str, int]]:
        suffix = _suffix(path)
        if suffix in PLAIN:
            return _read_plain(path, self._piece, wanted)
        if suffix in JSON_LINES:
            return _read_json_lines(path, self._text_field, wanted)
        return _read_parquet(path, self._text_field, wanted)


def _suffix(path: Path) -> str:
    """The kind of file: the suffix of SUFFIXES that the name ends in, or its own if it is none of them."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), path.suffix)


def _find_files(patterns: str) -> list[tuple[str, Path]]:
    """(name from the glob's fixed folder on, path), sorted, each file once."""
    found: dict[Path, str] = {}
    for pattern in filter(None, (part.strip() for part in patterns.split(","))):
        expanded("data.files", pattern)  # refuses what no file can be called
        wanted = os.path.expanduser(pattern)
        literal = os.path.exists(wanted)
        paths = [Path(wanted)] if literal else [Path(path) for path in glob.glob(wanted, recursive=True)]
        files = [path for path in paths if path.is_file()]
        for path in paths:
            if fault := _fault(path):
                raise ConfigError(f"data.files: {shown(path)} {fault}")
        if not files:
            hint = f"it is a folder; try '{pattern.rstrip('/')}/**/*.txt'" if literal else f"looked from {os.getcwd()}"
            raise ConfigError(f"data.files: {shown(repr(pattern))} names no file ({shown(hint)})")
        folder = Path(wanted).parent if literal else _fixed_folder(wanted)
        if not literal:
            _check_readable(folder, recursive="**" in wanted)
        for path in files:
            found.setdefault(Path(os.path.abspath(path)), path.relative_to(folder).as_posix())
    if not found:
        raise ConfigError("data.files is empty, but needs a glob, 'texts/*.txt' for instance")
    for path in found:
        if _suffix(path) not in SUFFIXES:
            raise ConfigError(
                f"data.files: {shown(path)} is no {', '.join(SUFFIXES)} file; narrow the glob to one of these"
            )
    once: dict[tuple[int, int], tuple[str, Path]] = {}  # by what they are: links may lead to a file in many ways
    for name, path in sorted(
        ((name, path) for path, name in found.items()), key=lambda file: (os.fsencode(file[0]), file[1])
    ):
        once.setdefault((path.stat().st_dev, path.stat().st_ino), (name, path))
    return list(once.values())


def _fault(path: Path) -> str | None:
    """Return why what a glob has found cannot be read; None for files and folders."""
    try:
        mode = path.stat().st_mode
    except OSError as error:  # a link that leads around in circles adds nothing
        return None if error.errno == errno.ELOOP else "is a link to nothing"
    return None if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else "is not a regular file, but must be"


def _check_readable(folder: Path, recursive: bool) -> None:
    """Raises ConfigError if a glob leaves out a folder because it may not be read."""

    def fail(error: OSError) -> None:
        raise ConfigError(f"data.files: {shown(error.filename)} cannot be read: {error.strerror}")

    for _, folders, _ in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if recursive and not name.startswith(".")]


def _fixed_folder(pattern: str) -> Path:
    """The folders of a glob that come before its first wildcard."""
    parts = Path(pattern).parts
    magic = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:magic])


def _piece_size(paths: list[Path]) -> int:
    """Bytes of a plain file that make one document, at most."""
    if len(paths) >= FEW_FILES or any(_suffix(path) not in PLAIN for path in paths):
        return LARGEST_PIECE
    total = sum(path.stat().st_size for path in paths)
    return min(max(total // PIECES, SMALLEST_PIECE), LARGEST_PIECE)


def _read_plain(path: Path, piece: int, wanted: Wanted) -> Iterator[tuple[str, int]]:
    """(text, replaced places) of each wanted piece of a text file, cut after a line's end where there is one."""
    with open_regular(path) as bytes_of_file:
        file = _as_utf8(bytes_of_file, path)
        index, rest = 0, b""
        while data := rest + file.read(piece - len(rest)):
            cut = len(data) if len(data) < piece else data.rfind(b"\n") + 1 or _character_end(data)
            if wanted(index):
                yield decode_utf8(data[:cut].removeprefix(b"\xef\xbb\xbf" if index == 0 else b""))
            index, rest = index + 1, data[cut:]


class _Recoded:
    """A text file that is read as the bytes of its UTF-8."""

    def __init__(self, text: IO[str]) -> None:
        self._text, self._rest = text, b""

    def read(self, size: int) -> bytes:
        while len(self._rest) < size and (more := self._text.read(1 << 16)):
            self._rest += more.encode("utf-8", "replace")
        data, self._rest = self._rest[:size], self._rest[size:]
        return data


def _as_utf8(file: IO[bytes], path: Path) -> IO[bytes] | _Recoded:
    """The file's text in UTF-8, whatever its byte order mark says. Raises ConfigError if it looks like other text."""
    start = file.read(1 << 16)
    file.seek(0)
    for encoding, marks in _MARKS.items():
        if start.startswith(marks):
            return _Recoded(io.TextIOWrapper(file, encoding, errors="replace", newline=""))
    if start.count(0) > len(start) // 8:
        likely = "UTF-16 without a byte order mark" if start.count(0) > len(start) // 3 else "no text"
        raise ConfigError(f"data.files: {shown(path)} is full of NUL, so it may be {likely}: convert it to UTF-8")
    return file


def _character_end(data: bytes) -> int:
    """Length of `data` without a UTF-8 character cut short at its end."""
    for back in range(1, min(4, len(data))):
        if data[-back] >= 0xC0:  # a lead byte; its continuation bytes are 0x80 to 0xBF
            return len(data) - back
        if data[-back] < 0x80:
            break
    return len(data)


def _read_json_lines(path: Path, field: str, wanted: Wanted) -> Iterator[tuple[str, int]]:
    """(text, replaced places) of each wanted line's text field."""
    compressed = path.name.lower().endswith(".gz")
    try:
        with open_regular(path) as file, gzip.open(file) if compressed else file as lines:
            yield from _read_lines(lines, path, field, wanted)
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ConfigError(f"data.files: {shown(path)} is not a gzip file, or damaged ({shown(error)})") from error
    except EOFError as error:
        raise ConfigError(f"data.files: {shown(path)} is cut short: its gzip stream has no end") from error


def _read_lines(file: IO[bytes] | gzip.GzipFile, path: Path, field: str, wanted: Wanted) -> Iterator[tuple[str, int]]:
    for index, data in enumerate(iter(lambda: file.readline(LONGEST_LINE), b"")):
        where = f"{shown(path)}:{index + 1}"
        if len(data) == LONGEST_LINE:
            raise ConfigError(f"data.files: {where} has {len(data):,} bytes or more, too many for one document")
        if not wanted(index) or not data.strip():
            continue
        line, replaced = decode_utf8(data.removeprefix(b"\xef\xbb\xbf" if index == 0 else b""))
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"data.files: {where} is not valid JSON ({shown(error)}); each line must be one object"
            ) from error
        if not isinstance(record, dict):
            raise ConfigError(
                f"data.files: {where} is not a JSON object, but must be, {{{shown(repr(field))}: ...}} for instance"
            )
        if field not in record:
            raise _no_field(field, where, list(record))
        text = record[field]
        if text is not None and not isinstance(text, str):
            raise ConfigError(
                f"data.text_field is {shown(repr(field))}, but at {where} it holds {type(text).__name__}, not text"
            )
        text, surrogates = re.subn("[\ud800-\udfff]", "\ufffd", text or "")
        yield text, replaced + surrogates


def _read_parquet(path: Path, field: str, wanted: Wanted) -> Iterator[tuple[str, int]]:
    """(text, replaced places) of each wanted row's text field, a few rows in memory at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    where = f"data.files: {shown(path)}"
    unreadable = (pa.ArrowException, OSError, MemoryError, ValueError)  # UnicodeDecodeError, of names, among the last
    with open_regular(path) as source:
        try:
            file = pq.ParquetFile(source)  # which takes a path only if that is UTF-8
            schema = file.schema_arrow
            names = schema.names
        except unreadable as error:
            raise ConfigError(f"{where} is not a parquet file, or damaged ({_first_line(error)})") from error
        if field not in names:
            raise _no_field(field, shown(path), names)
        if names.count(field) > 1:
            raise ConfigError(f"{where} has more than one column {shown(repr(field))}: rename one")
        kind = schema.field(names.index(field)).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if kind not in (pa.string(), pa.large_string(), pa.string_view()):
            raise ConfigError(
                f"data.text_field is {shown(repr(field))}, but in {shown(path)} it holds {shown(kind)}, not text"
            )
        index = 0
        try:
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                for value in batch.column(0):
                    if wanted(index):
                        yield _parquet_text(value)
                    index += 1
        except unreadable as error:
            raise ConfigError(f"{where} is damaged ({_first_line(error)})") from error


def _parquet_text(value: Any) -> tuple[str, int]:
    """The text of a pyarrow scalar. Parquet files may hold invalid UTF-8 in string columns."""
    try:
        return value.as_py() or "", 0
    except UnicodeDecodeError:
        value = getattr(value, "value", value)  # of a dictionary
        return decode_utf8(value.as_buffer().to_pybytes())


def _no_field(field: str, where: str, fields: list[str]) -> ConfigError:
    names = shown(", ".join(map(repr, fields[:50])) or "none")
    return ConfigError(
        f"data.text_field is {shown(repr(field))}, but the fields at {where} are {names}{closest(field, fields[:50])}"
    )


def _first_line(error: BaseException) -> str:
    return shown(str(error).partition("\n")[0] or type(error).__name__)
