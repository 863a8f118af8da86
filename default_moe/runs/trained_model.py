"""A trained model to work with from Python: logits, text, and where its tokens go."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from default_moe.config import Config
from default_moe.data import Tokenizer
from default_moe.errors import check
from default_moe.moe.layer import ROUTING
from default_moe.runs.sampling import Sampling, sample_texts
from default_moe.training.program import Program


class Routing(NamedTuple):
    """Where the tokens of a text go in each MoE layer. Y layers, L tokens, N experts, C choices of a token.

    tokens: int32 [L], of which the first begins a document.  pieces: the text of each.
    layers: [Y], numbers of the layers in the model.
    router_probs: float32 [Y, L, N].  combine_weights: float32 [Y, L, N], what an expert's output counts.
    expert_index: int32 [Y, L, C], the experts that run; N stands for none.
    """

    tokens: np.ndarray
    pieces: list[str]
    layers: tuple[int, ...]
    router_probs: np.ndarray
    combine_weights: np.ndarray
    expert_index: np.ndarray


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint's model, on the devices of its program.

    step: of the checkpoint.  params, variables: the model's, the latter its collections beside `params`.
    """

    step: int
    program: Program
    tokenizer: Tokenizer
    params: Any
    variables: Mapping[str, Any]

    @property
    def config(self) -> Config:
        return self.program.config

    def logits(self, tokens: Any) -> np.ndarray:
        """Logits of the token after each token: float32 [..., L, V] for integers [L] or [rows, L].

        Raises ConfigError if these are no tokens of the model.
        """
        return self._run(tokens)[0]

    def generate(
        self,
        prompts: str | Sequence[str],
        num_tokens: int = 100,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """Return each prompt, as the beginning of a document, with what the model adds: see `sampling.Sampling`.

        stop: texts, before the first of which what is added ends.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        return self.sample(prompts, Sampling(num_tokens, temperature, top_k, top_p, seed), stop)[0]

    def sample(
        self, prompts: Sequence[str], sampling: Sampling, stop: Sequence[str] = ()
    ) -> tuple[list[str], float | None]:
        """`generate`, and how many tokens a second were made."""
        return sample_texts(self.program, self.params, self.variables, self.tokenizer, prompts, sampling, stop)

    def routing(self, text: str) -> Routing:
        """Where the tokens of a text go, as the beginning of a document. Raises ConfigError without MoE layers."""
        layers = self.config.model.moe_layers
        check(bool(layers), "the model has no MoE layers: model.num_dense_layers is model.num_layers")
        tokens = np.concatenate([[self.tokenizer.separator], self.tokenizer.encode(text)]).astype(np.int32)
        sown = self._run(tokens)[1]
        pieces = [self.tokenizer.decode([token]) for token in tokens]
        return Routing(tokens, pieces, layers, *(sown[name] for name in Routing._fields[3:]))

    def _run(self, tokens: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        tokens = np.asarray(tokens)
        vocab_size = self.program.vocab_size
        check(
            tokens.ndim in (1, 2) and tokens.size > 0 and np.issubdtype(tokens.dtype, np.integer),
            f"tokens are {tokens.dtype} {list(tokens.shape)}, but must be integers [L] or [rows, L]",
        )
        check(
            tokens.min() >= 0 and tokens.max() < vocab_size,
            f"tokens run from {tokens.min()} to {tokens.max()}, but the model's are 0 to {vocab_size - 1}",
        )
        rows = np.atleast_2d(tokens).astype(np.int32)
        missing = -len(rows) % self.program.num_batch_shards  # each device takes as many
        batch = np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)])
        logits, sown = jax.device_get(self._forward(self.params, self.variables, batch))
        only = (slice(len(rows)),) if tokens.ndim == 2 else (0,)
        return logits[only], {name: value[:, *only] for name, value in sown.items()}

    @functools.cached_property
    def _forward(self) -> Any:
        def forward(params: Any, variables: Any, tokens_BL: Any) -> Any:
            output, sown = self.program.model.apply(
                {"params": params, **variables}, tokens_BL, train=False, mutable=[ROUTING]
            )
            layers = sown.get(ROUTING, {}).get("moe_layers", {}).get("moe", {})
            return output[0], layers

        return self.program.jit(forward, out_shardings=self.program.replicated)
