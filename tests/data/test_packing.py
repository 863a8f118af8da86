"""Rows: every token predicted once, documents numbered, the order a pure function of the seed and the row."""

import numpy as np
import pytest

from default_moe.data.packing import training_rows, validation_rows

SEPARATOR = 9
TOKEN_BYTES = np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 0], np.int32)
RANDOM = np.random.default_rng(0).integers(0, 10, 1000).astype(np.uint16)


def train(tokens, seed=0):
    return training_rows(tokens, 8, seed, SEPARATOR, TOKEN_BYTES)


def validation(tokens):
    return validation_rows(tokens, 8, SEPARATOR, TOKEN_BYTES)


def ascending(count, seed=None):
    """Rows of length 8 of the tokens 0 to count - 1, none of them a separator: for validation without a seed."""
    tokens, rest = np.arange(count, dtype=np.uint16), (60_000, np.ones(60_001, np.int32))
    return validation_rows(tokens, 8, *rest) if seed is None else training_rows(tokens, 8, seed, *rest)


def starts(rows, first, count):
    """The sequence numbers of rows of `ascending`."""
    return [int(tokens[0]) // 8 for tokens in rows.batch(first, count)["inputs"]]


def test_one_row_by_hand():
    row = validation(np.array([3, 4, SEPARATOR, SEPARATOR, 5, 6, SEPARATOR], np.uint16)).row(0)
    assert {name: array.tolist() for name, array in row.items()} == {
        "inputs": [3, 4, 9, 9, 5, 6, 0, 0],
        "targets": [4, 9, 9, 5, 6, 9, 0, 0],
        "loss_mask": [1, 1, 1, 1, 1, 1, 0, 0],
        "segment_ids": [1, 1, 2, 3, 3, 3, 0, 0],
        "positions": [0, 1, 2, 3, 4, 5, 6, 7],
        "target_bytes": [5, 0, 0, 6, 7, 0, 0, 0],
    }


@pytest.mark.parametrize("rows", [train(RANDOM), validation(RANDOM)])
def test_types_and_shapes(rows):
    batch = rows.batch(3, 5)
    types = {name: array.dtype.name for name, array in batch.items()}
    names = ("inputs", "targets", "segment_ids", "positions", "target_bytes")
    assert types == {"loss_mask": "float32", **dict.fromkeys(names, "int32")}
    assert {array.shape for array in batch.values()} == {(5, 8)}
    assert {array.shape for array in rows.row(3).values()} == {(8,)}


@pytest.mark.parametrize("count", [2, 8, 9, 10, 16, 17, 18, 100])
def test_evaluation_predicts_every_token_after_the_first_once(count):
    rows = ascending(count)
    batch = rows.batch(0, len(rows))
    real = batch["loss_mask"] == 1
    assert sorted(batch["targets"][real].tolist()) == list(range(1, count))
    np.testing.assert_array_equal(batch["inputs"][real] + 1, batch["targets"][real])
    assert batch["target_bytes"].sum() == count - 1


def test_evaluation_past_the_end_is_padding():
    rows = validation(RANDOM[:100])
    assert len(rows) == 13  # ceil(99 / 8)
    batch = rows.batch(12, 4)
    for name in ("loss_mask", "inputs", "targets", "segment_ids", "target_bytes"):
        assert not batch[name][1:].any()
    assert batch["positions"][3].tolist() == list(range(8))
    assert batch["loss_mask"][0].any()
    assert not rows.batch(50, 2)["loss_mask"].any()


def test_evaluation_order_is_fixed_and_mixed():
    rows = ascending(8001)
    order = starts(rows, 0, 1000)
    assert sorted(order) == list(range(1000))
    assert order == starts(rows, 0, 1000)
    assert 350 < np.mean(order[:50]) < 650  # the first rows come from the whole split


def test_every_epoch_of_every_seed_is_a_permutation_of_its_own():
    """Not even the second epoch of one seed is the first of the next."""
    epochs = {
        tuple(starts(ascending(1001, seed), epoch * 125, 125))
        for seed in (0, 1, 2, 5, 2**32 - 1, 2**40)
        for epoch in range(4)
    }
    assert len(epochs) == 24
    assert all(sorted(epoch) == list(range(125)) != list(epoch) for epoch in epochs)


@pytest.mark.parametrize(("count", "sequences"), [(9, 1), (16, 1), (17, 2), (24, 2), (25, 3)])
def test_training_drops_the_tail(count, sequences):
    rows = ascending(count, seed=0)
    assert sorted(starts(rows, 0, sequences)) == list(range(sequences))
    assert rows.batch(0, sequences)["loss_mask"].all()


def test_rows_are_a_pure_function_of_seed_and_number():
    whole = train(RANDOM, seed=3).batch(0, 400)
    fresh = train(RANDOM, seed=3)
    for first, count in ((392, 8), (0, 4), (4, 12), (100, 100), (0, 400)):  # any batch, in any order
        batch = fresh.batch(first, count)
        for name in whole:
            np.testing.assert_array_equal(batch[name], whole[name][first : first + count])
    for name, array in fresh.row(250).items():
        np.testing.assert_array_equal(array, whole[name][250])


def test_order_of_a_seed_stays_what_it_is():
    """A run resumed with a newer grain must read the same data."""
    assert starts(ascending(81, 0), 0, 20) == [1, 2, 4, 5, 9, 7, 8, 6, 0, 3, 9, 6, 1, 8, 2, 0, 3, 5, 4, 7]


def test_training_rows_have_no_length():
    with pytest.raises(TypeError, match="endless"):
        len(train(RANDOM))
