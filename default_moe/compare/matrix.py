"""What a comparison consists of: its runs, and which of them are held against each other."""

import ast
import copy
import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from ml_collections import ConfigDict

from default_moe.config import NO_EFFECT, TUNED, Config, flat_items, marked
from default_moe.errors import ConfigError, check, closest, quoted, shown
from default_moe.methods import METHODS

_MOST_RUNS = 1000
FEWEST_RUNGS = 3
_TAKEN = ("moe.router", "train.seed")
Settings = tuple[tuple[str, Any], ...]  # ("optim.peak_lr", 0.003), ... in the order in which they were given


@dataclass(frozen=True)
class Method:
    """A value of --methods: a name in `METHODS`, and settings that go with it, by the names they have in a config.

    label: what it is called, "default:substitute=backward" or "topk:moe.balancer=quantile" for instance.
    """

    label: str
    name: str
    settings: Settings = ()


@dataclass(frozen=True)
class Candidate:
    """A method with settings that were chosen for it, such as its learning rate.

    method: its label.  tuned: those of the varied settings that each method may have its own best value of.
    """

    method: str
    tuned: Settings = ()

    def __str__(self) -> str:
        return " ".join([self.method, *(f"{_short(name)}={value}" for name, value in self.tuned)])


@dataclass(frozen=True)
class Entry:
    """One run: a candidate, with a seed, in a task.

    task: the rung's settings, and the varied ones that say what is to be learnt and by what size of model. Losses of
      different tasks are not compared.  folder: below the comparison's, named by what differs from the config: so a run
      is found again when more is varied.
    """

    candidate: Candidate
    task: Settings
    seed: int
    config: Config
    folder: str


def parse_sets(texts: Sequence[str]) -> list[tuple[str, list[Any]]]:
    """[("optim.peak_lr", [0.003, 0.006])] of ["optim.peak_lr=3e-3,6e-3"]. Raises ConfigError."""
    sets: list[tuple[str, list[Any]]] = []
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.removeprefix("config.")
        parts = [part.strip() for part in values.split(",")]
        check(
            bool(equals and name) and all(parts),
            f"--set is {quoted(text)}, but must be a setting and its values, optim.peak_lr=3e-3,6e-3 for instance",
        )
        check(name not in dict(sets), f"--set gives {name} twice: put all of its values in one")
        check(name not in _TAKEN, f"--set gives {name}: that is what --methods and --seeds are for")
        check(len(set(parts)) == len(parts), f"--set is {quoted(text)}, but a value is given twice")
        sets.append((name, [_value(part) for part in parts]))
    return sets


def parse_seeds(texts: Sequence[str]) -> list[int]:
    """Raises ConfigError on anything but different whole numbers."""
    texts = [text.strip() for text in texts]
    seeds = [int(text) for text in texts if re.fullmatch("[0-9]{1,10}", text)]
    check(
        bool(texts) and len(set(seeds)) == len(texts),
        f"--seeds is {quoted(','.join(texts))}, but must be different whole numbers, 0,1,2,3 for instance",
    )
    return seeds


def parse_shard(text: str) -> tuple[int, int]:
    """(0, 4) of "0/4", the first of four. Raises ConfigError."""
    found = re.fullmatch("([0-9]{1,6})/([0-9]{1,6})", text.strip())
    index, count = (int(found[1]), int(found[2])) if found else (0, 0)
    check(index < count, f"--shard is {quoted(text)}, but must be 0/4, 1/4, 2/4 or 3/4 for instance, of four processes")
    return index, count


def parse_rungs(texts: Sequence[str]) -> list[Settings]:
    """Read ["model.d_model=32:train.num_steps=300", ...], a ladder's rungs. Raises ConfigError."""
    rungs: list[Settings] = []
    for text in (text.strip() for text in texts):
        parts = [part.partition("=") for part in text.split(":")]
        check(
            all("." in name and equals and value for name, equals, value in parts),
            f"--rungs has {quoted(text)}, but must be settings, model.d_model=32:train.num_steps=300 for instance",
        )
        rungs.append(tuple((name.removeprefix("config."), _value(value)) for name, _, value in parts))
    names = [name for name, _ in rungs[0]]
    check(len(set(names)) == len(names), f"--rungs has {quoted(texts[0])}, which gives a setting twice")
    check(
        all([name for name, _ in rung] == names for rung in rungs),
        f"--rungs must give the same settings in each rung, in the same order: {', '.join(names)}",
    )
    for name in names:
        check(name not in _TAKEN, f"--rungs gives {name}: that is what --methods and --seeds are for")
    check(
        len(rungs) >= FEWEST_RUNGS and all(rungs.count(rung) == 1 for rung in rungs),
        f"--rungs is {quoted(','.join(texts))}, but must be at least {FEWEST_RUNGS} different rungs: with fewer "
        "nothing tells whether a line fits",
    )
    return rungs


def parse_methods(texts: Sequence[str]) -> list[Method]:
    """Read ["topk:optim.peak_lr=1e-2", "default:substitute=backward:ema_decay=0.5"]. Raises ConfigError."""
    labels = [text.strip() for text in texts]
    check(len(set(labels)) == len(labels), f"--methods is {quoted(','.join(labels))}, but a method is given twice")
    return [_method(label) for label in labels]


def _method(label: str) -> Method:
    name, *settings = label.split(":")
    known = sorted(METHODS)
    check(name in METHODS, f"--methods has {quoted(name)}, but there are {', '.join(known)}{closest(name, known)}")
    of_method = [f.name for f in dataclasses.fields(METHODS[name])]
    parts = [setting.partition("=") for setting in settings]
    for key, equals, value in parts:
        check(
            (key in of_method or "." in key) and bool(equals and value),
            f"--methods has {quoted(label)}, but what follows a method must be settings: any one, as "
            "optim.peak_lr=VALUE, or its own"
            + (
                f", {of_method[0]}=VALUE for instance{closest(key, of_method)}"
                if of_method
                else f", and {name} has none"
            ),
        )
        check(key not in _TAKEN, f"--methods has {quoted(label)}: {key} is what --methods and --seeds are for")
    check(
        len({key for key, _, _ in parts}) == len(parts), f"--methods has {quoted(label)}, which gives a setting twice"
    )
    of_config = (key if "." in key else f"moe.{name}.{key}" for key, _, _ in parts)
    return Method(label, name, tuple(zip(of_config, (_value(value) for _, _, value in parts), strict=True)))


def entries(
    base: ConfigDict,
    methods: Sequence[Method],
    seeds: Sequence[int],
    sets: Sequence[tuple[str, list[Any]]],
    rungs: Sequence[Settings] = ((),),
) -> list[Entry]:
    """Every combination, those with the same seed next to each other, so that their speeds compare.

    A method does not have a run for each value of another method's settings. Raises ConfigError on bad settings.
    rungs: settings that make a task of their own, whatever they are.
    """
    labels = ",".join(method.label for method in methods)
    check(
        len(methods) > 1 or any(len(to_try) > 1 for _, to_try in sets),
        f"--methods is {labels!r}, which has nothing to compare with: give another, or several values with --set",
    )
    for name, to_try in sets:
        for value in to_try:
            _assign(copy.deepcopy(base), name, value)
        check(
            any(_applies(name, method) for method in methods),
            f"--set gives {name}, but none of --methods={labels} leaves it open",
        )
        # Of a task's settings, one method's would make a table of its own.
        fixed = [method.label for method in methods if name in dict(method.settings) and not marked(name, TUNED)]
        check(not fixed, f"--set gives {name}, which {', '.join(fixed)} fixes: give one of the two")
    for name, _ in rungs[0]:
        elsewhere = [*dict(sets), *(name for method in methods for name, _ in method.settings)]
        check(name not in elsewhere, f"--rungs gives {name}, which --set or --methods gives too: give one of the two")
    number = len(methods) * len(seeds) * len(rungs) * math.prod(len(values) for _, values in sets)
    check(
        number <= _MOST_RUNS,
        f"--methods, --seeds, --set and --rungs make {number} runs, but must at most {_MOST_RUNS}",
    )
    found: dict[str, Entry] = {}
    for seed, rung in itertools.product(seeds, rungs):
        for values in itertools.product(*(values for _, values in sets)):
            chosen: Settings = tuple(zip((name for name, _ in sets), values, strict=True))
            for method in methods:
                entry = _entry(base, method, seed, chosen, rung)
                same = found.setdefault(entry.folder, entry)
                check(
                    same.candidate.method == method.label,
                    f"--methods has {same.candidate.method} and {method.label}, which are the same here",
                )
    return list(found.values())


def same_run(ours: Config, saved: Config) -> list[str]:
    """One line for each setting in which they differ, of those on which a run's result depends."""
    now, before = (dict(flat_items(config.to_dict())) for config in (ours, saved))
    return [
        f"{name}: {before.get(name)} there, {now.get(name)} here"
        for name in dict.fromkeys([*now, *before])
        if now.get(name) != before.get(name) and not marked(name, NO_EFFECT)
    ]


def _entry(base: ConfigDict, method: Method, seed: int, chosen: Settings, rung: Settings) -> Entry:
    config = copy.deepcopy(base)
    config.moe.router = method.name
    config.train.seed = seed
    changed, own, of_rung = [], [], []
    for name, value in rung:
        before, now = _assign(config, name, value, "--rungs")
        changed += [f"{name}={now}"] if now != before else []
        of_rung.append((name, now))
    for name, value in method.settings:
        before, now = _assign(config, name, value, "--methods")
        changed += [f"{name}={now}"] if now != before else []
    for name, value in chosen:
        if _applies(name, method):
            before, now = _assign(config, name, value)
            changed += [f"{name}={now}"] if now != before else []
            own.append((name, now))
    tuned = tuple(item for item in own if marked(item[0], TUNED))
    task = (*of_rung, *(item for item in own if item not in tuned))
    folder = "/".join([method.name, *(quote(text, safe="=,+*") for text in sorted(changed)), f"seed_{seed}"])
    return Entry(Candidate(method.label, tuned), task, seed, Config.from_config_dict(config), folder)


def _applies(name: str, method: Method) -> bool:
    """Whether a setting that is varied is one of this method's, or of none, and is not fixed with the method."""
    return _group(name) in (None, method.name) and name not in dict(method.settings)


def _group(name: str) -> str | None:
    """The method whose setting this is, if it is one's."""
    parts = name.split(".")
    return parts[1] if len(parts) == 3 and parts[0] == "moe" and parts[1] in METHODS else None


def _assign(config: ConfigDict, name: str, value: Any, where: str = "--set") -> tuple[Any, Any]:
    """Set a setting that the flag `where` gives. Returns its values before and after."""
    *groups, key = name.split(".")
    section: Any = config
    for part in groups:
        section = section[part] if isinstance(section, ConfigDict) and part in section else None
    if not isinstance(section, ConfigDict) or key not in section or isinstance(section[key], ConfigDict):
        known = [name for name, _ in flat_items(config.to_dict())]
        raise ConfigError(f"{where} gives {quoted(name)}, but there is no such setting{closest(name, known)}")
    before = section[key]
    try:
        section[key] = value
    except (TypeError, OverflowError):
        kind = section.get_type(key).__name__
        raise ConfigError(f"{where} gives {shown(name)}={shown(value)}, but it must be of type {kind}") from None
    return before, section[key]


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # too many brackets
        return text


def _short(name: str) -> str:
    return name.rsplit(".", 1)[-1]
