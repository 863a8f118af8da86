"""Generated text: the cached pass against the uncached one, draws, several prompts at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_runs import tiny_settings

from default_moe.config import Config
from default_moe.data.tokenizer import tokenizer_from_dict
from default_moe.runs.sampling import Sampling, generate, likeliest, sample_texts
from default_moe.training.program import Program

PROMPTS = [np.array(tokens) for tokens in ([256, 97, 98], [256], [256, 98, 97, 99, 97, 98])]


@pytest.fixture(scope="module")
def model(folder):
    """A program on one device, with a model that has not been trained."""
    settings = tiny_settings(folder, mesh={"data": 1})
    program = Program(Config.from_mapping(settings), 257, jax.devices()[:1])
    state = program.new_state()
    return program, state.params, state.variables


def test_greedy_generation_is_the_argmax_of_the_uncached_forward_pass(model):
    """For prompts of several lengths at once."""
    program, params, variables = model
    made, speed = generate(*model, PROMPTS, Sampling(8))
    forward = jax.jit(lambda tokens: program.model.apply({"params": params, **variables}, tokens, train=False))
    for prompt, added in zip(PROMPTS, made, strict=True):
        text = list(prompt)
        for _ in range(8):
            padded = np.zeros((1, 14), np.int32)
            padded[0, : len(text)] = text
            text.append(int(jnp.argmax(forward(padded)[0][0, len(text) - 1])))
        assert text[len(prompt) :] == list(added)
    assert speed > 0


def test_draws_depend_on_the_seed_and_the_row_alone(folder, model):
    drawn = Sampling(12, temperature=1.0)
    together, _ = generate(*model, PROMPTS, drawn)
    again, _ = generate(*model, PROMPTS, drawn)
    first, _ = generate(*model, PROMPTS[:1], drawn)
    other, _ = generate(*model, PROMPTS[:1], dataclasses.replace(drawn, seed=1))
    same, _ = generate(*model, [PROMPTS[0]] * 2, drawn)
    np.testing.assert_array_equal(together, again)
    np.testing.assert_array_equal(together[0], first[0])
    assert not np.array_equal(first, other)
    assert not np.array_equal(*same)
    eight = Program(Config.from_mapping(tiny_settings(folder)), 257)
    state = eight.new_state()
    np.testing.assert_array_equal(generate(eight, state.params, state.variables, PROMPTS, drawn)[0], together)


def test_a_batch_of_training_that_is_smaller_than_the_mesh(folder, model):
    """As when a run is evaluated on more devices than it trained on."""
    settings = tiny_settings(folder, train={"batch_size": 4}, eval={"batch_size": 8})
    eight = Program(Config.from_mapping(settings), 257, training=False)
    state = eight.new_state()
    made, _ = generate(eight, state.params, state.variables, PROMPTS, Sampling(4))
    np.testing.assert_array_equal(made, generate(*model, PROMPTS, Sampling(4))[0])


def test_more_prompts_than_rows_of_a_batch(model):
    program, params, variables = model
    rows = program.config.train.batch_size
    prompts = [PROMPTS[index % 3] for index in range(rows + 3)]
    made, _ = generate(program, params, variables, prompts, Sampling(4))
    for index, added in enumerate(made):
        np.testing.assert_array_equal(added, made[index % 3])


def test_the_likeliest_by_hand():
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]]))

    def kept(top_k, top_p):
        return np.isfinite(likeliest(logits, top_k, top_p)).tolist()

    assert kept(0, 1.0) == [[True] * 4] * 2
    assert kept(4, 1.0) == kept(9, 1.0) == kept(0, 1.0)
    assert kept(1, 1.0)[0] == [False, True, False, False]
    assert kept(2, 1.0)[0] == [False, True, False, True]
    assert kept(0, 0.3)[0] == [False, True, False, False]
    assert kept(0, 0.65)[0] == [False, True, False, True]
    assert kept(0, 0.75)[0] == [False, True, True, True]
    assert kept(2, 0.5)[0] == [False, True, False, False]  # of the two that are left it has 4/7
    assert kept(0, 1e-6)[1] == [True] * 4  # equals stay together


def test_text_ends_before_a_stop_and_at_the_end_of_the_document(model, monkeypatch):
    tokenizer = tokenizer_from_dict({"kind": "bytes"})
    tokens = np.array([*b"one, two; three", tokenizer.separator, *b"next"])
    monkeypatch.setattr("default_moe.runs.sampling.generate", lambda *args: ([tokens] * 2, 1.0))

    def texts(*stop):
        return sample_texts(*model, tokenizer, ["a ", "b "], Sampling(20), stop)[0]

    assert texts() == ["a one, two; three", "b one, two; three"]
    assert texts("none") == texts()
    assert texts("; ", ", ") == ["a one", "b one"]
    assert texts("o") == ["a ", "b "]
