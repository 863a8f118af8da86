"""A trained model as lm-evaluation-harness asks for it: how likely a text is after another, and what follows a text."""

import bisect
import hashlib
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self, TypeVar

import jax
import numpy as np
from jax import Array
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from default_moe.errors import TrainingFailed, check, quoted
from default_moe.model.splash_attention import LENGTH_MULTIPLE
from default_moe.processes import distributed
from default_moe.runs.progress import Progress
from default_moe.runs.sampling import Sampling, make_sampler
from default_moe.runs.trained_model import TrainedModel
from default_moe.training.losses import token_scores
from default_moe.training.memory import out_of_memory_in_one_line

_SECONDS_BETWEEN_LINES = 10.0
_MOST_NEW_TOKENS = 256  # where a task sets no other number, as lm_eval's own models do
T = TypeVar("T")


class Generation(NamedTuple):
    """How a task wants text to be continued. stop: texts, before the first of which it ends."""

    sampling: Sampling
    stop: list[str]


def parse_generation(task: str, settings: Mapping[str, Any], longest: int) -> Generation:
    """Return what the `generation_kwargs` of a task say. longest: sequence of the model, with what is generated.

    Raises ConfigError if that cannot be done here.
    """
    left = dict(normalize_gen_kwargs(dict(settings), _MOST_NEW_TOKENS))
    number, temperature = left.pop("max_gen_toks"), left.pop("temperature", 0.0)
    check(
        0 < number < longest,
        f"the task {quoted(task)} generates {number} tokens (max_gen_toks), but must leave at least one for the text "
        f"before: the model reads train.sequence_length = {longest} tokens",
    )
    drawn = {name: left.pop(name) for name in ("top_k", "top_p") if name in left}
    stop = [str(text) for text in left.pop("until")]
    sampling = Sampling(number, float(temperature) if left.pop("do_sample") else 0.0, **drawn)
    check(not left, f"the task {quoted(task)} sets generation_kwargs that are not known here: {', '.join(left)}")
    return Generation(sampling, stop)


class BenchmarkModel(TemplateLM):
    """Answers requests in batches of sequences of about the same length; each length is compiled once.

    A batch holds at most as many tokens as one of the evaluation on held-out text, however long its sequences are.
    Texts are scored as they stand; the separator comes first where there is nothing before them. What is longer than
    `max_length`, the length of the training sequences, loses its beginning.
    """

    def __init__(self, model: TrainedModel):
        super().__init__()
        self._model = model
        config, program = model.config, model.program
        self.max_length = config.train.sequence_length
        self._tokens_per_batch = (config.eval.batch_size or config.train.batch_size) * self.max_length
        self._lengths = _lengths(self.max_length, LENGTH_MULTIPLE if program.attention == "splash" else 1)
        self._samplers: dict[tuple[int, Sampling], Any] = {}

        def score(params: Any, variables: Any, tokens_BL: Array, mask_BL: Array, target_BQ: Array, at_BQ: Array) -> Any:
            output: Any = program.model.apply(
                {"params": params, **variables}, tokens_BL, train=False, mask=mask_BL, project=False
            )
            return token_scores(output[0], target_BQ, at_BQ, config.train.logits_per_chunk)

        self._score = program.jit(score, out_shardings=program.replicated)

    def check_task(self, task: Any) -> None:
        """Raises ConfigError if a task, of lm_eval's, asks for what is not done here."""
        name = quoted(task.task_name)
        check(not getattr(task, "UNSAFE_CODE", False), f"the task {name} runs code that the model writes")
        check(not getattr(task, "MULTIMODAL", False), f"the task {name} shows pictures, but the model reads text")
        if task.OUTPUT_TYPE == "generate_until":
            parse_generation(task.task_name, task.config.generation_kwargs or {}, self.max_length)

    @property
    def eot_token_id(self) -> int:
        return self._model.tokenizer.separator

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self._model.tokenizer.encode(string).tolist()

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether it is the likeliest, token by token."""
        pairs = []
        for request in requests:
            context, continuation = request.args
            start, end = self._encode_pair(context, continuation) if context else ([], self.tok_encode(continuation))
            asked = f"the task {quoted(request.task_name)} asks how likely {quoted(continuation)} is"
            check(bool(end), f"{asked}, which adds no token to the text before")
            check(
                len(end) <= self.max_length,
                f"{asked}, of {len(end)} tokens, but the model reads train.sequence_length = {self.max_length}",
            )
            pairs.append((None, start or [self.prefix_token_id], end))
        return self._loglikelihood_tokens(pairs)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each text. Of a long one each token is predicted once, from as many before as possible."""
        windows, texts = [], []
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(pair)))
                texts.append(index)
        totals = [0.0] * len(requests)
        for text, (log_prob, _) in zip(texts, self._loglikelihood_tokens(windows), strict=True):
            totals[text] += log_prob
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        answered: dict[tuple[int, ...], list[int]] = {}  # requests, by what the model reads for them
        for index, (_, context, continuation) in enumerate(requests):
            answered.setdefault(tuple((context + continuation)[-(self.max_length + 1) : -1]), []).append(index)
        inputs = list(answered)
        queries = [
            [
                (token, len(row) - len(requests[index][2]) + place)
                for index in answered[row]
                for place, token in enumerate(requests[index][2])
            ]
            for row in inputs
        ]
        plan = list(self._plan([len(row) for row in inputs]))
        widths: dict[int, int] = {}  # queries of a row, by the length of rows
        for batch in plan:
            widths[batch.length] = max(widths.get(batch.length, 1), *(len(queries[row]) for row in batch.chosen))

        def dispatch(batch: _Batch) -> tuple[_Batch, Any]:
            shape = batch.num_rows, batch.length
            tokens_BL, mask_BL = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
            query_BQ2 = np.zeros((batch.num_rows, _rounded(widths[batch.length]), 2), np.int32)
            for place, row in enumerate(batch.chosen):
                tokens_BL[place, : len(inputs[row])] = inputs[row]
                mask_BL[place, : len(inputs[row])] = 1
                query_BQ2[place, : len(queries[row])] = queries[row]
            arrays = tokens_BL, mask_BL, query_BQ2[..., 0], query_BQ2[..., 1]
            return batch, self._score(self._model.params, self._model.variables, *arrays)

        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        with self._running("loglikelihood", requests, plan) as meter:
            for batch, scores in _one_ahead(map(dispatch, plan)):
                log_prob_BQ, likeliest_BQ = jax.device_get(scores)
                for place, row in enumerate(batch.chosen):
                    end = 0
                    for index in answered[inputs[row]]:
                        start, end = end, end + len(requests[index][2])
                        total = log_prob_BQ[place, start:end].sum(dtype=np.float64)
                        answers[index] = float(total), bool(likeliest_BQ[place, start:end].all())
                meter.add(sum(len(inputs[row]) for row in batch.chosen))
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model adds to each text, up to the first of the texts that end it, or the document's end."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(index)
        texts = [""] * len(requests)
        for members in groups.values():
            first = requests[members[0]]
            sampling, stop = parse_generation(first.task_name, first.args[1], self.max_length)
            room = self.max_length - sampling.num_tokens
            prompts = [(self.tok_encode(requests[i].args[0]) or [self.prefix_token_id])[-room:] for i in members]
            for index, tokens in zip(members, self._generate(prompts, sampling), strict=True):
                ends = np.flatnonzero(tokens == self.eot_token_id)
                text = self._model.tokenizer.decode(tokens[: ends[0]] if ends.size else tokens)
                texts[index] = postprocess_generated_text(text, stop, think_end_token=None)
        return texts

    def _generate(self, prompts: list[list[int]], sampling: Sampling) -> list[np.ndarray]:
        """int32 [num_tokens] that the model adds to each prompt."""
        program = self._model.program
        added: list[Any] = [None] * len(prompts)
        plan = list(self._plan([len(prompt) for prompt in prompts], sampling.num_tokens))
        with self._running("generation", [repr(sampling), prompts], plan) as meter:
            for batch in plan:
                if (batch.length, sampling) not in self._samplers:
                    shorter = [length for length in self._lengths if length < batch.length]
                    function = make_sampler(program.model, sampling, max(shorter, default=0) + 1)
                    self._samplers[batch.length, sampling] = program.jit(function, out_shardings=program.replicated)
                rows = (batch.chosen + batch.chosen[-1:] * batch.num_rows)[: batch.num_rows]  # the last one fills it up
                tokens_BL = np.zeros((batch.num_rows, batch.length), np.int32)
                for place, row in enumerate(rows):
                    tokens_BL[place, : len(prompts[row])] = prompts[row]
                lengths_B = np.array([len(prompts[row]) for row in rows], np.int32)
                made = self._samplers[batch.length, sampling](
                    self._model.params, self._model.variables, tokens_BL, lengths_B, np.array(rows, np.int32)
                )
                for row, tokens in zip(batch.chosen, np.asarray(made), strict=False):
                    added[row] = tokens[len(prompts[row]) :][: sampling.num_tokens]
                meter.add(sum(len(prompts[row]) + sampling.num_tokens for row in batch.chosen))
        return added

    def _plan(self, lengths: Sequence[int], num_new: int = 0) -> Iterator["_Batch"]:
        """Batches of rows of these lengths, the longest first. num_new: tokens that each row gets."""
        by_length: dict[int, list[int]] = {}
        for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
            length = self._lengths[bisect.bisect_left(self._lengths, lengths[row])]
            by_length.setdefault(length, []).append(row)
        shards = self._model.program.num_batch_shards
        for length, rows in by_length.items():
            most = self._tokens_per_batch // (min(length + num_new, self.max_length) * shards) * shards
            size = min(most, -(-len(rows) // shards) * shards)
            for first in range(0, len(rows), size):
                yield _Batch(length, size, rows[first : first + size])

    def _running(self, name: str, requests: Any, plan: Sequence["_Batch"]) -> "_Meter":
        if distributed.several():
            digest = hashlib.sha256(json.dumps(requests).encode()).hexdigest()
            distributed.check_same(
                {f"requests ({name})": digest}, "tasks and their data must be the same on every host"
            )
        return _Meter(name, len(plan), self._model)


class _Batch(NamedTuple):
    """chosen: rows that are computed together, at most num_rows.  length: to which they are filled up."""

    length: int
    num_rows: int
    chosen: list[int]


class _Meter:
    """Tells how many of a plan's batches are done, and their tokens/s. A device's lack of memory is one line."""

    def __init__(self, name: str, num_batches: int, model: TrainedModel):
        self._total, self._done, self._tokens = num_batches, 0, 0
        self._progress = Progress(num_batches)
        self._progress.message(f"{name} in {num_batches:,} batches")
        self._memory = out_of_memory_in_one_line(
            TrainingFailed, "evaluating", model.config, model.program.num_batch_shards, evaluation=True
        )

    def __enter__(self) -> Self:
        self._began = self._told = time.monotonic()
        self._progress.start(0)
        self._memory.__enter__()
        return self

    def __exit__(self, *error: Any) -> bool | None:
        self._progress.close()
        return self._memory.__exit__(*error)

    def add(self, tokens: int) -> None:
        """To be called after each batch."""
        self._done += 1
        self._tokens += tokens
        self._progress.step(self._done)
        now = time.monotonic()
        if now - self._told >= _SECONDS_BETWEEN_LINES or self._done == self._total:
            self._progress.log(self._done, {"train/tokens_per_second": self._tokens / (now - self._began)})
            self._told = now


def _lengths(longest: int, multiple: int) -> list[int]:
    """The lengths to which sequences are filled up: 24, 32, 48, 64, 96 and so on, and the longest."""
    sizes = [part << power for power in range(3, longest.bit_length()) for part in (3, 4)]
    return sorted({min(-(-size // multiple) * multiple, longest) for size in sizes} | {longest})


def _rounded(number: int) -> int:
    """The next number that is a power of two, or three quarters of one."""
    power = 1 << (number - 1).bit_length()
    return power * 3 // 4 if number <= power * 3 // 4 else power


def _one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, each when the next one has been made already: devices work while results are read."""
    for item, _ in itertools.pairwise(itertools.chain(items, [None])):
        yield item  # type: ignore[misc]
