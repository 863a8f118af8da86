"""Text whose generator is known: the law that it follows, found from the text itself."""

import hashlib
import itertools
from collections import Counter

import pytest
from helpers.refusals import refused

from default_moe.config import DataConfig
from default_moe.data import open_data
from default_moe.data.planted import Planted

FRACTION = 0.1


@pytest.fixture(scope="module")
def corpus() -> Planted:
    return Planted("planted/4", FRACTION)


def successors(texts: list[str]) -> dict[str, Counter[str]]:
    """How often each character follows each other, letters left out."""
    found: dict[str, Counter[str]] = {}
    for text in texts:
        plain = "".join(text[i] for i in range(len(text)) if i % 16)
        for before, after in itertools.pairwise(plain):
            found.setdefault(before, Counter())[after] += 1
    return found


def test_every_generator_has_a_permutation_of_its_own(corpus: Planted):
    permutations = []
    for generator, letter in enumerate("abcd"):
        texts = corpus.documents_of(generator, "train")
        assert {text[::16] for text in texts} == {64 * letter}
        found = successors(texts)
        permutation = {before: counts.most_common(1)[0][0] for before, counts in found.items()}
        assert len(found) == 64 and set(permutation.values()) == set(found)
        followed = sum(found[before][after] for before, after in permutation.items())
        assert followed / sum(map(Counter.total, found.values())) == pytest.approx(0.9 + 0.1 / 64, abs=0.002)
        others = [
            counts
            for before, counts in found.items()
            for after, counts in counts.items()
            if after != permutation[before]
        ]
        assert len(others) == 64 * 63 and max(others) < 3 * sum(others) / len(others)  # all of them, alike
        permutations.append(permutation)
    alike = [a[symbol] == b[symbol] for a in permutations for b in permutations if a is not b for symbol in a]
    assert sum(alike) / len(alike) < 0.1


def test_documents_are_held_out_by_chance_and_none_twice(corpus: Planted):
    train, validation = (list(corpus.documents(split)) for split in ("train", "validation"))
    assert len({*train, *validation}) == 3200
    assert 0.08 < len(validation) / 3200 < 0.12
    assert Counter(text[0] for text in validation).keys() == set("abcd")


def test_the_text_of_a_number_stays_what_it_is(corpus: Planted):
    text = "".join(corpus.documents_of(2, "train"))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "8d1b5e7704228e85"
    assert Planted("planted/4", 0.2).fingerprint() != corpus.fingerprint() != Planted("planted/5", 0.1).fingerprint()


def test_it_becomes_batches_and_is_prepared_once(tmp_path):
    config = DataConfig(name="planted/26", dir=str(tmp_path), validation_fraction=FRACTION)
    said: list[str] = []
    data = open_data(config, said.append)
    assert data.train.info.documents + data.validation.info.documents == 26 * (3200 // 26)
    assert data.train.info.tokens == 1025 * data.train.info.documents
    before = len(said)
    assert open_data(config, said.append).corpus_hash == data.corpus_hash
    assert len(said) == before


@pytest.mark.parametrize("name", ["planted", "planted/", "planted/1", "planted/27", "planted/07", "planted/x"])
def test_what_is_no_number_of_generators(name: str, tmp_path):
    with refused(f"data.name is '{name}', but must say .* from 2 to 26: 'planted/16' for instance"):
        open_data(DataConfig(name=name, dir=str(tmp_path)))
