"""Rows: every token predicted once, documents numbered, the order a pure function of the seed and the row."""

import numpy as np
import pytest

from default_moe.data.packing import Rows, training_rows, validation_rows

SEPARATOR = 9
TOKEN_BYTES = np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 0], np.int32)


def stream(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 10, count).astype(np.uint16)


def train(tokens: np.ndarray, length: int = 8, seed: int = 0) -> Rows:
    return training_rows(tokens, length, seed, SEPARATOR, TOKEN_BYTES)


def validation(tokens: np.ndarray, length: int = 8) -> Rows:
    return validation_rows(tokens, length, SEPARATOR, TOKEN_BYTES)


def starts(rows: Rows, first: int, count: int) -> list[int]:
    """The sequence numbers of rows of an ascending stream of length-8 sequences."""
    return [int(tokens[0]) // 8 for tokens in rows.batch(first, count)["inputs"]]


def test_one_row_by_hand() -> None:
    tokens = np.array([3, 4, SEPARATOR, SEPARATOR, 5, 6, SEPARATOR], np.uint16)
    row = validation(tokens).row(0)
    assert row["inputs"].tolist() == [3, 4, 9, 9, 5, 6, 0, 0]
    assert row["targets"].tolist() == [4, 9, 9, 5, 6, 9, 0, 0]
    assert row["loss_mask"].tolist() == [1, 1, 1, 1, 1, 1, 0, 0]
    assert row["segment_ids"].tolist() == [1, 1, 2, 3, 3, 3, 0, 0]
    assert row["positions"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert row["target_bytes"].tolist() == [5, 0, 0, 6, 7, 0, 0, 0]


def test_types_and_shapes() -> None:
    for rows in (train(stream(100)), validation(stream(100))):
        batch = rows.batch(3, 5)
        types = {name: array.dtype.name for name, array in batch.items()}
        assert types.pop("loss_mask") == "float32"
        assert set(types) == {"inputs", "targets", "segment_ids", "positions", "target_bytes"}
        assert set(types.values()) == {"int32"}
        assert {array.shape for array in batch.values()} == {(5, 8)}
        assert {array.shape for array in rows.row(3).values()} == {(8,)}


@pytest.mark.parametrize("count", [2, 8, 9, 10, 16, 17, 18, 100])
def test_evaluation_predicts_every_token_after_the_first_once(count: int) -> None:
    tokens = np.arange(count, dtype=np.uint16)
    rows = validation_rows(tokens, 8, 60_000, np.ones(60_001, np.int32))
    batch = rows.batch(0, len(rows))
    real = batch["loss_mask"] == 1
    assert sorted(batch["targets"][real].tolist()) == list(range(1, count))
    np.testing.assert_array_equal(batch["inputs"][real] + 1, batch["targets"][real])
    assert batch["target_bytes"].sum() == count - 1


def test_evaluation_past_the_end_is_padding() -> None:
    rows = validation(stream(100))
    assert len(rows) == 13  # ceil(99 / 8)
    batch = rows.batch(12, 4)
    for name in ("loss_mask", "inputs", "targets", "segment_ids", "target_bytes"):
        assert not batch[name][1:].any()
    assert batch["positions"][3].tolist() == list(range(8))
    assert batch["loss_mask"][0].any()
    assert not rows.batch(50, 2)["loss_mask"].any()


def test_evaluation_order_is_fixed_and_mixed() -> None:
    tokens = np.arange(8001, dtype=np.uint16)
    rows = validation_rows(tokens, 8, 60_000, np.ones(60_001, np.int32))
    order = starts(rows, 0, 1000)
    assert sorted(order) == list(range(1000))
    assert order == starts(rows, 0, 1000)
    assert 350 < np.mean(order[:50]) < 650  # the first rows come from the whole split


def test_each_epoch_is_a_permutation_of_its_own() -> None:
    tokens = np.arange(1001, dtype=np.uint16)
    rows = training_rows(tokens, 8, 5, 60_000, np.ones(60_001, np.int32))
    epochs = [starts(rows, epoch * 125, 125) for epoch in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(125))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert epochs[0] != list(range(125))


def test_seeds_differ_in_every_epoch() -> None:
    """Not even the second epoch of one seed is the first of the next."""
    tokens = np.arange(1001, dtype=np.uint16)
    epochs = set()
    for seed in (0, 1, 2, 2**32 - 1, 2**40):
        rows = training_rows(tokens, 8, seed, 60_000, np.ones(60_001, np.int32))
        epochs |= {tuple(starts(rows, epoch * 125, 125)) for epoch in range(3)}
    assert len(epochs) == 15


def test_training_drops_the_tail() -> None:
    for count, sequences in ((9, 1), (16, 1), (17, 2), (24, 2), (25, 3)):
        tokens = np.arange(count, dtype=np.uint16)
        rows = training_rows(tokens, 8, 0, 60_000, np.ones(60_001, np.int32))
        assert sorted(starts(rows, 0, sequences)) == list(range(sequences))
        assert rows.batch(0, sequences)["loss_mask"].all()


def test_rows_are_a_pure_function_of_seed_and_number() -> None:
    tokens = stream(1000)
    whole = train(tokens, seed=3).batch(0, 400)
    fresh = train(tokens, seed=3)
    for first, count in ((392, 8), (0, 4), (4, 12), (100, 100), (0, 400)):  # any batch, in any order
        batch = fresh.batch(first, count)
        for name in whole:
            np.testing.assert_array_equal(batch[name], whole[name][first : first + count])
    row = fresh.row(250)
    for name in whole:
        np.testing.assert_array_equal(row[name], whole[name][250])


def test_order_of_a_seed_stays_what_it_is() -> None:
    """A run resumed with a newer grain must read the same data."""
    tokens = np.arange(81, dtype=np.uint16)
    rows = training_rows(tokens, 8, 0, 60_000, np.ones(60_001, np.int32))
    assert starts(rows, 0, 20) == [1, 2, 4, 5, 9, 7, 8, 6, 0, 3, 9, 6, 1, 8, 2, 0, 3, 5, 4, 7]


def test_training_rows_have_no_length() -> None:
    with pytest.raises(TypeError, match="for ever"):
        len(train(stream(100)))
