"""Bits that flip in any file of a run or of prepared data: each is noticed, or what is trained on is the same."""

import dataclasses
import random
import shutil
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.tiny_runs import tiny_config, trained

from default_moe.data import open_data, tokenizer_fingerprint
from default_moe.errors import CheckpointError, ConfigError
from default_moe.runs.checkpoint import CheckpointStore
from default_moe.runs.workdir import check_ours, open_run
from default_moe.training.program import Program

pytestmark = pytest.mark.campaign

FLIPS = 250  # in a work directory, and in prepared data


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def kinds(folder: Path) -> dict[str, list[Path]]:
    """The files of each kind, which are not of the same number: each kind is hit equally often."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.stat().st_size:
            name = path.name if path.suffix in (".json", ".jsonl", ".tokens") else path.parent.name + path.suffix
            found.setdefault(name, []).append(path.relative_to(folder))
    return found


def bits(state) -> list[bytes]:
    keys = jax.tree.map(
        lambda x: jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x, state
    )
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(keys)]


def test_flips_in_a_work_directory(folder, tmp_path):
    config = tiny_config(folder, train={"num_steps": 12})
    trained(config, folder / "run")
    data = open_data(config.data, lambda line: None)
    program = Program(config, data.tokenizer.vocab_size)
    identity = (data.corpus_hash, program.vocab_size, tokenizer_fingerprint(data.tokenizer))

    def outcome(workdir) -> str:
        """What a start of the run would meet."""
        lines = []
        try:
            check_ours(workdir)
            with (
                open_run(workdir, config, *identity) as run,
                CheckpointStore(workdir, config.checkpoint, report=lines.append) as store,
            ):
                state, _, step = store.restore_latest(program.abstract_state)
                lines += run.notes
        except (ConfigError, CheckpointError) as error:
            assert "\n" not in str(error)
            return "found"
        whole = {4: at_4, 8: at_8, 12: at_12}[step]
        assert bits(state) == whole, f"{workdir} gives another state, and says {lines}"
        assert step == 12 or lines, "an older step is used without a word"
        return "found" if lines else "harmless"

    with CheckpointStore(folder / "run", read_only=True) as store:
        at_4, at_8, at_12 = (bits(store.restore_for_eval(program.abstract_state, step)[0]) for step in (4, 8, 12))
    report(folder / "run", tmp_path, outcome)


def test_flips_in_prepared_data(folder, tmp_path):
    config = tiny_config(folder, data={"tokenizer": "bpe:300", "dir": str(folder / "bpe")}).data
    expected = open_data(config, lambda line: None)
    tokens = np.array(expected.train.tokens), np.array(expected.validation.tokens)

    def outcome(prepared) -> str:
        lines = []
        data = open_data(dataclasses.replace(config, dir=str(prepared)), lines.append)
        assert data.corpus_hash == expected.corpus_hash
        assert tokenizer_fingerprint(data.tokenizer) == tokenizer_fingerprint(expected.tokenizer)
        assert data.train.info == expected.train.info and data.validation.info == expected.validation.info
        np.testing.assert_array_equal(data.train.tokens, tokens[0])
        np.testing.assert_array_equal(data.validation.tokens, tokens[1])
        return "found" if lines else "harmless"

    report(folder / "bpe", tmp_path, outcome)


def report(original: Path, tmp_path: Path, outcome) -> None:
    """Flip bits in copies of a folder, one in each, and print what came of it by kind of file."""
    rng = random.Random(5)
    files = kinds(original)
    counts: dict[str, Counter] = {name: Counter() for name in files}
    for number in range(FLIPS):
        name = list(files)[number % len(files)]
        copy = shutil.copytree(original, tmp_path / str(number), symlinks=True)
        flip(copy / rng.choice(files[name]), rng)
        counts[name][outcome(copy)] += 1
        shutil.rmtree(copy)
    for name, count in counts.items():
        print(f"{name}: {dict(count)}")
    total = sum(counts.values(), Counter())
    print(f"{FLIPS} flips: {dict(total)}")
    assert total["found"] > FLIPS / 4
