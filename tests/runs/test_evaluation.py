"""Evaluation adds up batches to what the whole split is, however unequal they are."""

from types import SimpleNamespace

import numpy as np
import pytest

from default_moe.model.language_model import LayerStats
from default_moe.runs.evaluation import evaluate
from default_moe.training.losses import TokenSums

# Of 5 sequences of 3 tokens, some of which are padding: what a model with one MoE layer of 2 experts would find.
RNG = np.random.default_rng(0)
COUNTED = np.array([[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 1]], bool)
NLL, ENTROPY = RNG.uniform(1, 3, (2, 5, 3))
PROBS = RNG.dirichlet([1, 3], (5, 3))


class Split:
    """Rows, of which a batch is their numbers, -1 past the last one."""

    def __len__(self):
        return 5

    def batch(self, first, count):
        return np.array([row if row < 5 else -1 for row in range(first, first + count)])


def program(batch_size):
    """Reports the statistics of each batch, means over its tokens."""

    def eval_step(params, variables, rows):
        rows = rows[rows >= 0]
        counted = COUNTED[rows]
        tokens, probs = counted.sum(), PROBS[rows][counted]
        chosen = np.bincount(probs.argmax(axis=-1), minlength=2)

        def mean(values):
            return np.sum(values, axis=0, keepdims=True) / max(tokens, 1)

        balance = 2 * (chosen / max(tokens, 1) * mean(probs)).sum(axis=-1)
        more = {"default_vector_norm": np.array([7.0])}
        zero, entropy = np.zeros(1), mean(ENTROPY[rows][counted])
        stats = LayerStats(zero, balance, zero, entropy, mean(probs), chosen[None], np.array([tokens]), {}, more)
        return TokenSums(NLL[rows][counted].sum(), tokens, 2 * tokens, tokens), stats

    config = SimpleNamespace(eval=SimpleNamespace(batch_size=batch_size))
    parts = {"eval_step": eval_step, "put_batch": lambda load, count: load(0, count)}
    return SimpleNamespace(config=config, num_batch_shards=1, **parts)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 8])
def test_batches_of_any_size_give_the_means_over_all_tokens(batch_size):
    """Among batches of one sequence 9 tokens are 3, 1, 2, 0 and 3. Balance is 2 sum_e f_e P_e of all of them."""
    found = evaluate(program(batch_size), None, None, Split(), 0)
    assert (found.tokens, found.text_bytes) == (9, 18)
    assert found.loss == pytest.approx(NLL[COUNTED].mean())
    (layer,) = found.layers
    chosen = np.bincount(PROBS[COUNTED].argmax(axis=-1), minlength=2)
    assert layer["load_balance_loss"] == pytest.approx(2 * (chosen / 9) @ PROBS[COUNTED].mean(axis=0), rel=1e-6)
    assert layer["router_entropy"] == pytest.approx(ENTROPY[COUNTED].mean())
    assert layer["default_vector_norm"] == pytest.approx(7)
    assert layer["tokens_per_expert"] == chosen.tolist()
    assert layer["max_load"] == pytest.approx(chosen.max() / 4.5)


def test_only_the_first_batches_are_taken_where_a_number_is_asked_for():
    found = evaluate(program(2), None, None, Split(), 1)
    assert (found.tokens, found.loss) == (4, pytest.approx(NLL[:2][COUNTED[:2]].mean()))
