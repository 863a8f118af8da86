"""Do experts specialise in kinds of text? Where the tokens of each domain go, against shuffled labels."""

import glob
import os
import random
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from default_moe.analysis import statistics
from default_moe.analysis.observation import Observation
from default_moe.analysis.pictures import Part, Picture, colors, finish, heat_maps
from default_moe.config import DataConfig
from default_moe.data.planted import LENGTH, LETTERS, Planted, is_planted
from default_moe.data.stdlib import decode_source, source_files
from default_moe.data.text_files import SUFFIXES, TextFiles
from default_moe.errors import ConfigError, check, quoted, shown
from default_moe.files import read_file
from default_moe.runs.pictures import new_figure

_PACKAGES = 6
_MOST_FILES = 200


def parse_domains(text: str) -> dict[str, str]:
    """{"mail": "mail/*.txt"} of "mail:mail/*.txt,...". Raises ConfigError."""
    domains: dict[str, str] = {}
    for part in text.split(","):
        name, colon, pattern = (piece.strip() for piece in part.partition(":"))
        check(
            bool(colon and name and pattern) and name not in domains,
            f"--domains has {quoted(part)}, but must be different names with a glob each, "
            "mail:mail/*.txt,code:src/**/*.py for instance",
        )
        domains[name] = pattern
    check(len(domains) > 1, f"--domains is {quoted(text)}, but one domain compares with nothing: give two or more")
    return domains


def read_domains(domains: Mapping[str, str] | None, data: DataConfig, characters: int) -> dict[str, list[str]]:
    """Documents of each domain in a random, fixed order, about so many characters of each.

    domains: a glob by name; None takes the generators of planted text, held-out documents of each, else the largest
      packages of Python's standard library.
    data: of the run; its `text_field` counts for .jsonl and .parquet files. Raises ConfigError if a glob names no
    file, or one that cannot be read.
    """
    if domains is None and is_planted(data.name):
        planted = Planted(data.name, data.validation_fraction)
        held_out = {LETTERS[i]: planted.documents_of(i, "validation") for i in range(planted.num_generators)}
        check(
            all(held_out.values()),
            f"data.validation_fraction is {data.validation_fraction}, which holds out no text of some generators: "
            "evaluate runs of a larger one, or give --domains",
        )
        return {name: texts[: characters // LENGTH + 1] for name, texts in held_out.items()}
    files = _packages() if domains is None else {name: _files(name, glob) for name, glob in domains.items()}
    texts: dict[str, list[str]] = {}
    for name, paths in files.items():
        random.Random(0).shuffle(paths)
        found = texts[name] = []
        for path in paths[:_MOST_FILES]:
            for text in _documents(path, data.text_field):
                found.append(text)
                if sum(map(len, found)) > characters:
                    break
            if sum(map(len, found)) > characters:
                break
        check(any(found), f"--domains: the files of {quoted(name)} hold no text")
    return texts


def part(seen: Mapping[str, Observation], layers: Sequence[int]) -> Part:
    """seen: the text of each domain by its name.  layers: numbers of the MoE layers."""
    names = list(seen)
    share = {  # of each domain's choices, in multiples of the mean over experts
        f"layer {layer}": np.stack([statistics.load(o.chosen[i : i + 1])[0] for o in seen.values()])
        for i, layer in enumerate(layers)
    }
    of_rows, choices = _by_row(list(seen.values()))
    found = [statistics.domain_information(of_rows, choices[i], len(names)) for i in range(len(layers))]
    bits = [information for information, _ in found]
    shuffled = np.array([by_chance for _, by_chance in found])
    least, most = np.quantile(shuffled, [0.025, 0.975], axis=1)
    said = [f"domains: {', '.join(f'{name} ({len(o.tokens):,} tokens)' for name, o in seen.items())}"]
    said += [
        f"layer {layer}: expert and domain share {bits[i]:.4f} bits of {np.log2(len(names)):.2f} at most; shuffled "
        f"labels {least[i]:.4f} to {most[i]:.4f}"
        for i, layer in enumerate(layers)
    ]

    def draw_share() -> Any:
        shades = {name: np.log2(np.clip(load, 0.25, 4)) for name, load in share.items()}
        figure = heat_maps(shades, "expert", "domain", "load / mean", (-2, 2), diverging=True, rows=names)
        figure.axes[-1].set_yticks([-2, -1, 0, 1, 2], ["≤1/4", "1/2", "1", "2", "≥4"])
        return figure

    def draw_information() -> Any:
        figure = new_figure(4.6, 3.0)
        axes = figure.add_subplot()
        line, band = colors(2)
        axes.plot(layers, bits, marker=".", color=line, label="domains")
        axes.fill_between(layers, least, most, color=band, alpha=0.5, label="shuffled labels")
        axes.set_ylim(bottom=0)
        finish(axes, "layer", "mutual information (bits)")
        return figure

    pictures = [
        Picture(
            "domains_share",
            "Experts by domain",
            "Load of each expert for the text of each domain, in multiples of the domain's mean: white is the mean, "
            "orange more, violet less. Rows that look alike are domains that are routed alike.",
            {"domains": names, "load": share},
            draw_share,
        ),
        Picture(
            "domains_information",
            "Information about the domain",
            "Mutual information of a token's domain and its expert, by layer. The band holds 95 % of what is found "
            "when the labels of whole rows are shuffled: a point inside it shows no specialisation.",
            {"layers": list(layers), "bits": bits, "shuffled": shuffled},
            draw_information,
        ),
    ]
    return Part("Domains", said, pictures)


def _by_row(seen: Sequence[Observation]) -> tuple[np.ndarray, np.ndarray]:
    """The domain of each row [R], and the choices of each expert in it, [Y, R, N]."""
    of_rows: list[int] = []
    choices = []
    for number, observation in enumerate(seen):
        for row in np.unique(observation.rows):
            of_rows.append(number)
            choices.append(observation.chosen[:, observation.rows == row].sum(axis=1))
    return np.array(of_rows), np.stack(choices, axis=1)


def _packages() -> dict[str, list[Path]]:
    """The files of the standard library's largest packages, by the package's name."""
    packages: dict[str, list[Path]] = {}
    for name, path in source_files(Path(sysconfig.get_paths()["stdlib"])):
        if "/" in name:
            packages.setdefault(name.split("/")[0], []).append(path)
    sizes = {name: sum(path.stat().st_size for path in paths) for name, paths in packages.items()}
    largest = sorted(sizes, key=lambda name: (-sizes[name], name))[:_PACKAGES]
    return {name: packages[name] for name in sorted(largest)}


def _files(name: str, pattern: str) -> list[Path]:
    paths = [Path(path) for path in sorted(glob.glob(os.path.expanduser(pattern), recursive=True))]
    paths = [path for path in paths if path.is_file()]
    check(bool(paths), f"--domains: {quoted(pattern)} of {quoted(name)} names no file")
    return paths


def _documents(path: Path, text_field: str) -> Any:
    if str(path).endswith(SUFFIXES):
        yield from TextFiles(glob.escape(str(path)), text_field, 0.0).documents("train")
        return
    try:
        yield decode_source(read_file(path))
    except OSError as error:
        raise ConfigError(f"--domains: {shown(str(path))} cannot be read: {error.strerror}") from None
