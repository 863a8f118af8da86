"""Text from a trained model, with a key-value cache."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from default_moe.data import Tokenizer
from default_moe.model.language_model import CACHE, LanguageModel
from default_moe.training.program import Program


def make_sampler(
    model: LanguageModel, num_tokens: int, temperature: float
) -> Callable[[Any, Any, Array, Array], Array]:
    """`sample(params, variables, prompt_BL, key) -> [B, num_tokens]`: tokens that follow each prompt, int32.

    At temperature 0 the likeliest token each time, else one drawn from softmax(logits / temperature).
    """

    def sample(params: Any, variables: Any, prompt_BL: Array, key: Array) -> Array:
        batch_size, prompt_length = prompt_BL.shape

        def predict(cache: Any, tokens_BL: Array, start: Array | int) -> tuple[Any, Array]:
            positions = jnp.broadcast_to(start + jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
            output, mutated = model.apply(
                {"params": params, **variables, **cache},
                tokens_BL,
                train=False,
                positions=positions,
                cache_length=prompt_length + num_tokens,
                mutable=[CACHE],
            )
            return dict(mutated), output[0][:, -1]

        def step(carry: tuple[Any, Array], index: Array) -> tuple[tuple[Any, Array], Array]:
            cache, logits_BV = carry
            if temperature == 0:
                token_B = jnp.argmax(logits_BV, axis=-1)
            else:
                token_B = jax.random.categorical(jax.random.fold_in(key, index), logits_BV / temperature)
            token_B = token_B.astype(jnp.int32)
            return predict(cache, token_B[:, None], prompt_length + index), token_B

        _, tokens_LB = jax.lax.scan(step, predict({}, prompt_BL, 0), jnp.arange(num_tokens))
        return tokens_LB.reshape(num_tokens, batch_size).T

    return sample


def sample_text(program: Program, params: Any, variables: Any, tokenizer: Tokenizer, prompt: str) -> str:
    """`prompt` as the beginning of a document, and what the model adds, up to the document's end."""
    start = np.concatenate([[tokenizer.separator], tokenizer.encode(prompt)])
    tokens = generate(program, params, variables, start)
    ends = np.flatnonzero(tokens == tokenizer.separator)
    return prompt + tokenizer.decode(tokens[: ends[0]] if ends.size else tokens)


def generate(program: Program, params: Any, variables: Any, prompt: np.ndarray, seed: int = 0) -> np.ndarray:
    """int32 tokens, eval.sample_tokens of them, that the model adds to `prompt`, a non-empty array of tokens."""
    settings = program.config.eval
    if settings.sample_tokens == 0:
        return np.zeros(0, np.int32)
    # Under a mesh each device needs a row: the prompt is repeated, and one row is kept.
    rows = program.num_batch_shards
    sampler = program.jit(
        make_sampler(program.model, settings.sample_tokens, settings.temperature), out_shardings=program.replicated
    )
    prompts = jnp.tile(jnp.asarray(prompt, jnp.int32)[None], (rows, 1))
    return np.asarray(sampler(params, variables, prompts, jax.random.key(seed)))[0]
