"""Text from a trained model, with a key-value cache."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from default_moe.config import EvalConfig
from default_moe.data import Tokenizer
from default_moe.errors import check
from default_moe.model.language_model import CACHE, LanguageModel
from default_moe.training.program import Program


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    num_tokens: that follow each prompt.  temperature: of the softmax; 0 takes the likeliest token each time.
    top_k: draw among so many likeliest tokens; 0: among all.  top_p: draw among the likeliest tokens whose
    probabilities, before the last of them, sum to less than this.  seed: of the draws.
    """

    num_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check(self.top_k >= 0, f"--top_k is {self.top_k}, but must be at least 0")
        check(0 < self.top_p <= 1, f"--top_p is {self.top_p}, but must be above 0 and at most 1")

    def of(self, settings: EvalConfig) -> Self:
        """Return the same with the number of tokens and the temperature of a config."""
        return dataclasses.replace(self, num_tokens=settings.sample_tokens, temperature=settings.temperature)


def likeliest(logits_BV: Array, top_k: int, top_p: float) -> Array:
    """Return the logits with minus infinity for the tokens that `Sampling` does not draw among."""
    if top_k and top_k < logits_BV.shape[-1]:
        least_B1 = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    if top_p < 1:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        probs_BV = jax.nn.softmax(sorted_BV)
        before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
        least_B1 = jnp.min(jnp.where(before_BV < top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    return logits_BV


def make_sampler(
    model: LanguageModel, sampling: Sampling, shortest: int
) -> Callable[[Any, Any, Array, Array, Array], Array]:
    """Return `sample(params, variables, prompts_BL, lengths_B, rows_B)`: prompts and what follows, [B, L + num_tokens].

    shortest: length of the shortest prompt; so much of all is read at once. The rest of longer ones is read token by
      token, while shorter ones are continued: no row ever holds padding.
    prompts_BL: filled up at their ends with anything.  rows_B: a number of each row, on which its draws depend.
    """

    def sample(params: Any, variables: Any, prompts_BL: Array, lengths_B: Array, rows_B: Array) -> Array:
        key = jax.random.key(sampling.seed)
        keys_B = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows_B)
        longest = prompts_BL.shape[1]
        given_BP = jnp.pad(prompts_BL, ((0, 0), (0, sampling.num_tokens)))

        def predict(cache: Any, tokens_BL: Array, start: Array | int) -> tuple[Any, Array]:
            positions = jnp.broadcast_to(start + jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
            output, mutated = model.apply(
                {"params": params, **variables, **cache},
                tokens_BL,
                train=False,
                positions=positions,
                cache_length=longest + sampling.num_tokens,
                mutable=[CACHE],
            )
            return dict(mutated), output[0][:, -1]

        def step(carry: tuple[Any, Array], position: Array) -> tuple[tuple[Any, Array], Array]:
            cache, logits_BV = carry
            if sampling.temperature == 0:
                token_B = jnp.argmax(logits_BV, axis=-1)
            else:
                logits_BV = likeliest(logits_BV / sampling.temperature, sampling.top_k, sampling.top_p)
                # Rows that still read their prompt draw nothing that is kept.
                draws_B = jax.vmap(jax.random.fold_in)(keys_B, jnp.maximum(position - lengths_B, 0))
                token_B = jax.vmap(jax.random.categorical)(draws_B, logits_BV)
            token_B = jnp.where(position < lengths_B, given_BP[:, position], token_B.astype(jnp.int32))
            return predict(cache, token_B[:, None], position), token_B

        positions = jnp.arange(shortest, longest + sampling.num_tokens)
        _, tokens_PB = jax.lax.scan(step, predict({}, prompts_BL[:, :shortest], 0), positions)
        return jnp.concatenate([prompts_BL[:, :shortest], tokens_PB.T], axis=1)

    return sample


def sample_texts(
    program: Program,
    params: Any,
    variables: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    stop: Sequence[str] = (),
) -> tuple[list[str], float | None]:
    """Return each prompt as the beginning of a document with what the model adds, and tokens/s, None if none were made.

    stop: texts, before the first of which what is added ends, as it does at the document's end.
    """
    starts = [np.concatenate([[tokenizer.separator], tokenizer.encode(prompt)]) for prompt in prompts]
    rows, speed = generate(program, params, variables, starts, sampling)
    texts = []
    for prompt, tokens in zip(prompts, rows, strict=True):
        ends = np.flatnonzero(tokens == tokenizer.separator)
        text = tokenizer.decode(tokens[: ends[0]] if ends.size else tokens)
        found = [text.find(word) for word in stop if word in text]
        texts.append(prompt + text[: min(found, default=len(text))])
    return texts, speed


def generate(
    program: Program, params: Any, variables: Any, prompts: Sequence[np.ndarray], sampling: Sampling
) -> tuple[list[np.ndarray], float | None]:
    """Return int32 tokens, `num_tokens` of them, that the model adds to each non-empty array of tokens, and tokens/s.

    A row's draws depend on the seed and the row's number, not on the other rows.
    """
    if sampling.num_tokens == 0:
        return [np.zeros(0, np.int32) for _ in prompts], None
    lengths = [len(prompt) for prompt in prompts]
    # As many rows at a time as a step has; under a mesh each device needs as many. The last prompt fills the others.
    shards = program.num_batch_shards
    size = -(-min(len(prompts), program.config.train.batch_size) // shards) * shards
    sampler: Any = None
    made, seconds = [], 0.0
    for first in range(0, len(prompts), size):
        chosen = [min(first + row, len(prompts) - 1) for row in range(size)]
        padded = [np.pad(prompts[row], (0, max(lengths) - lengths[row])) for row in chosen]
        rows = (padded, [lengths[row] for row in chosen], chosen)
        batch = (params, variables, *(np.array(array, np.int32) for array in rows))
        if sampler is None:
            function = make_sampler(program.model, sampling, min(lengths))
            sampler = program.jit(function, out_shardings=program.replicated).compile(*batch)
        began = time.perf_counter()
        tokens = np.asarray(sampler(*batch))
        seconds += time.perf_counter() - began
        for row in range(min(size, len(prompts) - first)):
            start = lengths[first + row]
            made.append(tokens[row, start : start + sampling.num_tokens])
    return made, len(prompts) * sampling.num_tokens / seconds
