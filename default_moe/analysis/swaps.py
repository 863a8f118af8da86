"""What would another expert have done? The true change of the loss, beside what the router's gradient says of it.

For some tokens the expert that counts most in one layer, a, changes places with an inactive expert i: i runs, a does
not, and their gates are exchanged. The loss of the whole row falls by a gain. A router that learns from slopes is told
-dL/dp_i instead: -<g, E_i(x)> exactly, or what its method has in the place of that. How well do these rank experts?
All is as at evaluation, also the slopes of a method that draws in training.

Dimension key: Y MoE layers, B rows, L length, N experts, C choices, S tokens that were looked at.
"""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy import stats

from default_moe.analysis.any_k import as_class, made
from default_moe.config import Config
from default_moe.data import Batch
from default_moe.errors import ConfigError, check
from default_moe.methods import Decision, RouterInputs
from default_moe.methods.decision import State
from default_moe.moe.layer import ROUTER_STATE, ROUTING
from default_moe.runs.saved_run import SavedRun
from default_moe.training.program import Program
from default_moe.training.step import model_inputs

SIGNALS = ("exact slope", "method's slope", "probability")


@dataclass(frozen=True)
class Swaps:
    """What was found of S tokens in each layer.

    gain: float64 [Y, S, N], by how much the loss of the row (nats, summed) falls if that expert runs in the place of
      the one that counts most; 0 for those that run.
    inactive: bool [Y, S, N].
    signals: by name, float64 [Y, S, N], what tells the router that an expert is good.
    first: int [Y, S], the expert that counts most.
    """

    gain: np.ndarray
    inactive: np.ndarray
    signals: dict[str, np.ndarray]
    first: np.ndarray


@dataclass(frozen=True)
class Summary:
    """Means over tokens of one layer and their standard errors, as pairs; NaN where there are none.

    correlation: by signal, the rank correlation with the gain over a token's inactive experts.
    best: the gain of the best of the experts, 0 if that is the one that runs.  random: of an inactive one.
    advised: by signal, the gain if each token takes the expert whose signal is largest.
    """

    correlation: dict[str, tuple[float, float]]
    best: tuple[float, float]
    random: tuple[float, float]
    advised: dict[str, tuple[float, float]]


def check_swappable(config: Config) -> None:
    """Raises ConfigError if tokens do not run K of at least K + 2 experts."""
    moe = config.moe
    check(bool(config.model.num_moe_layers), "the run has no MoE layers: there are no experts to exchange")
    check(
        moe.most_experts_per_token == moe.top_k <= moe.num_experts - 2,
        f"moe.router={moe.method.name!r} runs {moe.most_experts_per_token} of {moe.num_experts} experts, but to rank "
        "those that do not run there must be two of them, of a fixed number",
    )


def measure(run: SavedRun, num_batches: int) -> Swaps:
    """Exchange experts of a token in each row of the first held-out batches, in one layer after the other.

    Raises ConfigError if the text has not so many rows.
    """
    config = run.program.config
    own, exact = (_Swapping(config, run.program.vocab_size, exact) for exact in (False, True))
    rows = run.data.validation_rows(config.train.sequence_length)
    batch_size = config.eval.batch_size or config.train.batch_size
    if len(rows) < num_batches * batch_size:
        raise ConfigError(f"--batches is {num_batches}, but the held-out text has {len(rows) // batch_size} batches")
    layers, num_experts = len(config.model.moe_layers), config.moe.num_experts
    found: list[dict[str, np.ndarray]] = []
    for index in range(num_batches):

        def load(first: int, count: int, start: int = index * batch_size) -> Batch:
            return rows.batch(start + first, count)

        batch = run.program.put_batch(load, batch_size)
        real_BL = jax.device_get(batch["loss_mask"]) != 0
        rng = np.random.default_rng(index)
        place_B = np.array([rng.choice(np.flatnonzero(real)) if real.any() else 0 for real in real_BL], np.int32)
        counted = real_BL.any(axis=1)
        nobody = np.full(layers, num_experts, np.int32)
        before_B = own.losses(run, place_B, nobody, batch)
        gain_YBN = np.zeros((layers, len(place_B), num_experts))
        for layer, expert in np.ndindex(layers, num_experts):
            swapped = np.where(np.arange(layers) == layer, expert, num_experts).astype(np.int32)
            gain_YBN[layer, :, expert] = before_B - own.losses(run, place_B, swapped, batch)
        part = {"gain": gain_YBN, **own.routing(run, place_B, batch)}
        part |= {"exact slope": -exact.slopes(run, place_B, batch), "method's slope": -own.slopes(run, place_B, batch)}
        found.append({name: values[:, counted] for name, values in part.items()})
    whole = {name: np.concatenate([part[name] for part in found], axis=1).astype(np.float64) for name in found[0]}
    inactive = whole["inactive"] > 0
    gain = np.where(inactive, whole["gain"], 0)
    return Swaps(gain, inactive, {name: whole[name] for name in SIGNALS}, whole["first"].astype(int))


def summary(swaps: Swaps, layer: int) -> Summary:
    gain_SN, inactive_SN, first_S = swaps.gain[layer], swaps.inactive[layer], swaps.first[layer]
    num_inactive_S = inactive_SN.sum(axis=1)
    correlation, advised = {}, {}
    for name, signal_YSN in swaps.signals.items():
        signal_SN = signal_YSN[layer]
        pairs = [(g[i], s[i]) for g, s, i in zip(gain_SN, signal_SN, inactive_SN, strict=True)]
        correlation[name] = _mean([_rank_correlation(g, s) for g, s in pairs])
        allowed_SN = inactive_SN | (np.arange(inactive_SN.shape[1]) == first_S[:, None])
        choice_S = np.where(allowed_SN, signal_SN, -np.inf).argmax(axis=1)
        told_S = np.array([np.ptp(s) > 0 for _, s in pairs])  # else the choice is by number
        advised[name] = _mean(np.where(told_S, gain_SN[np.arange(len(gain_SN)), choice_S], np.nan))
    return Summary(
        correlation,
        _mean(np.maximum(np.where(inactive_SN, gain_SN, -np.inf).max(axis=1), 0)),
        _mean(gain_SN.sum(axis=1) / num_inactive_S),
        advised,
    )


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's; NaN if all of one are equal."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1])


def _mean(values: Any) -> tuple[float, float]:
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return float("nan"), float("nan")
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)


class _Swapping:
    """A run's model in which experts can be exchanged, and whose gates can be moved; as at evaluation.

    exact: whether the gates of experts that do not run get their exact slopes, or those of the method.
    """

    def __init__(self, config: Config, vocab_size: int, exact: bool):
        method = config.moe.method
        plain = {"product_form": False} if exact else {}
        moe = dataclasses.replace(config.moe, router=as_class(method, _class_for(type(method), exact), **plain))
        self._config = dataclasses.replace(config, moe=moe)
        self._program = program = Program(self._config, vocab_size, training=False)
        self._losses, self._routing, self._slopes = (
            program.jit(function, out_shardings=program.replicated)
            for function in (self._losses_of, self._routing_of, self._slopes_of)
        )

    def losses(self, run: SavedRun, place_B: np.ndarray, expert_Y: np.ndarray, batch: Batch) -> np.ndarray:
        """The loss of each row [B], if in each layer that expert changes places with the first of the token."""
        return np.asarray(self._losses(run.params, run.variables, place_B, expert_Y, batch), np.float64)

    def routing(self, run: SavedRun, place_B: np.ndarray, batch: Batch) -> dict[str, np.ndarray]:
        """Of those tokens: which experts are inactive and how likely each is [Y, B, N], and the first one [Y, B]."""
        return jax.device_get(self._routing(run.params, run.variables, place_B, batch))

    def slopes(self, run: SavedRun, place_B: np.ndarray, batch: Batch) -> np.ndarray:
        """dL/dp of those tokens [Y, B, N], L the sum over all of the batch."""
        return np.asarray(self._slopes(run.params, run.variables, place_B, batch), np.float64)

    def _apply(self, params: Any, variables: Any, place_B: Array, expert_Y: Array, offset: Array, batch: Batch) -> Any:
        """The loss of each row, and where tokens went."""
        of_layers = {"swap_place": jnp.broadcast_to(place_B, (len(expert_Y), len(place_B))), "swap_expert": expert_Y}
        kept = dict(variables.get(ROUTER_STATE, {}).get("moe_layers", {}).get("moe", {}))
        state = {ROUTER_STATE: {"moe_layers": {"moe": kept | of_layers | {"gate_offset": offset}}}}
        inputs = model_inputs(batch, self._config) | {"project": True}
        output: Any = self._program.model.apply(
            {"params": params, **variables, **state}, train=False, mutable=[ROUTING], **inputs
        )
        (logits_BLV, _), sown = output
        nll_BL = -jnp.take_along_axis(jax.nn.log_softmax(logits_BLV), batch["targets"][..., None], axis=-1)[..., 0]
        return jnp.where(batch["loss_mask"] != 0, nll_BL, 0).sum(axis=1), sown[ROUTING]["moe_layers"]["moe"]

    def _nothing(self, batch: Batch) -> tuple[Array, Array]:
        """No expert exchanged, no gate moved."""
        layers, num_experts = self._config.model.num_moe_layers, self._config.moe.num_experts
        return jnp.full(layers, num_experts), jnp.zeros((layers, *batch["inputs"].shape, num_experts))

    def _losses_of(self, params: Any, variables: Any, place_B: Array, expert_Y: Array, batch: Batch) -> Array:
        return self._apply(params, variables, place_B, expert_Y, self._nothing(batch)[1], batch)[0]

    def _routing_of(self, params: Any, variables: Any, place_B: Array, batch: Batch) -> dict[str, Array]:
        _, sown = self._apply(params, variables, place_B, *self._nothing(batch), batch)
        index_YBC, gates_YBN, probs_YBN = (
            _at(sown[name], place_B) for name in ("expert_index", "combine_weights", "router_probs")
        )
        runs_YBN = (index_YBC[..., None] == jnp.arange(gates_YBN.shape[-1])).any(axis=2)
        first_YB = jnp.where(runs_YBN, gates_YBN, -jnp.inf).argmax(axis=-1)
        return {"inactive": ~runs_YBN, "probability": probs_YBN, "first": first_YB}

    def _slopes_of(self, params: Any, variables: Any, place_B: Array, batch: Batch) -> Array:
        nobody, nothing = self._nothing(batch)
        offset_slopes = jax.grad(lambda o: self._apply(params, variables, place_B, nobody, o, batch)[0].sum())(nothing)
        return _at(offset_slopes, place_B)


def _at(values_YBLX: Array, place_B: Array) -> Array:
    """[Y, B, ...] at one place of each row."""
    return jnp.take_along_axis(values_YBLX, place_B[None, :, None, None], axis=2)[:, :, 0]


@functools.cache
def _class_for(method: Any, exact: bool) -> Any:
    class Swapping(method):
        name = f"{method.name} with experts exchanged"
        dense_gradient = method.dense_gradient or exact

        def route(self, inputs: RouterInputs, config: Any) -> Decision:
            return _swapped(super().route(inputs, config), inputs.state)

        def initial_state(self, config: Any) -> State:
            nothing = {
                "swap_place": jnp.zeros(1, jnp.int32),
                "swap_expert": jnp.int32(config.num_experts),
                "gate_offset": jnp.zeros((1, 1, config.num_experts)),
            }
            return super().initial_state(config) | nothing

    return made(Swapping)


def _swapped(decision: Decision, state: State) -> Decision:
    """The decision with the gates moved, and one token's first expert in the place of another and the other way."""
    gates_BLN, index_BLC, expert = decision.gates, decision.expert_index, state["swap_expert"]
    num_experts = gates_BLN.shape[-1]
    of_choices_BLC = jnp.take_along_axis(gates_BLN, jnp.minimum(index_BLC, num_experts - 1), axis=-1)
    choice_BL1 = jnp.where(index_BLC < num_experts, of_choices_BLC, -jnp.inf).argmax(axis=-1, keepdims=True)
    first_BL1 = jnp.take_along_axis(index_BLC, choice_BL1, axis=-1)
    here_BL1 = (jnp.arange(gates_BLN.shape[1]) == state["swap_place"][:, None])[..., None] & (expert < num_experts)
    everyone = jnp.arange(num_experts)
    source_BLN = jnp.where(everyone == expert, first_BL1, jnp.where(everyone == first_BL1, expert, everyone))
    gates_BLN = jnp.take_along_axis(gates_BLN, jnp.where(here_BL1, source_BLN, everyone), axis=-1)
    runs_BL1 = (index_BLC == expert).any(axis=-1, keepdims=True)
    replaced_BLC = here_BL1 & ~runs_BL1 & (jnp.arange(index_BLC.shape[-1]) == choice_BL1)
    index_BLC = jnp.where(replaced_BLC, expert, index_BLC)
    return decision._replace(gates=gates_BLN + state["gate_offset"], expert_index=index_BLC)
