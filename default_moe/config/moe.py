"""The settings of a Mixture-of-Experts layer."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Self

from default_moe.config.mappings import MAY_CHANGE, TUNED, check_keys, dtype_name, section_from_mapping
from default_moe.errors import check, quoted
from default_moe.methods import BALANCERS, METHODS, Balancer, Method, groups_of_settings
from default_moe.methods.default import DefaultVectorSettings
from default_moe.methods.plugins import load_plugin
from default_moe.methods.settings import at_least, between, check_settings, one_of, positive, setting

MATMUL_BACKENDS = ("blocks", "ragged", "mosaic", "hopper", "tokamax")
EXPERT_PARALLEL_FORMS = ("gather", "exchange")


@dataclass(frozen=True)
class MoEConfig:
    """One sparse Mixture-of-Experts layer. In a config file a method's settings are a group of its name."""

    num_experts: int = setting(8, "N, experts of a layer.", at_least(1, 2**16))
    top_k: int = setting(1, "K, experts that each token runs; from 1 to num_experts.")
    expert_dim: int = setting(352, "F, hidden width of one SwiGLU expert.", at_least(1, 2**24))
    num_shared_experts: int = setting(
        0,
        "Experts of the same width that every token runs beside those, whose output is added as it is.",
        at_least(0, 2**16),
    )
    router: str | Method = setting(
        "default",
        f"The method by which the router chooses experts and learns to: {', '.join(sorted(METHODS))}. In Python also "
        "the method itself, with its settings.",
    )
    score_function: str = setting(
        "softmax", "What makes scores of router logits.", one_of("softmax", "sigmoid", "sqrt_softplus")
    )
    normalize_weights: bool = setting(False, "Divide the weights of a token's experts by their sum.")
    plugin: str | None = setting(
        None, "A module, my_package.my_router, that is imported first: methods it defines can be chosen.", MAY_CHANGE
    )
    num_groups: int = setting(
        1,
        "G, groups of equal size that experts are in, in order. A token runs experts of its best groups only.",
        at_least(1),
    )
    groups_per_token: int = setting(1, "M, groups that a token's experts are chosen from; from 1 to num_groups.")
    weight_scale: float = setting(1.0, "What the weights of a token's experts are multiplied by.", positive())
    balancer: str | Balancer = setting(
        "auto",
        f"How the load of experts is evened out: {', '.join(sorted(BALANCERS))}; 'auto' takes what the method asks "
        "for. In Python also the balancer itself, with its settings.",
    )
    router_init_std: float | None = setting(
        None,
        "Standard deviation of the router's weights at the start; None takes small init's, sqrt(2 / (5 D)).",
        at_least(0),
        TUNED,
    )
    router_noise_std: float = setting(
        0.0,
        "Standard deviation of Gaussian noise that is added to the logits in training, for all they are used for.",
        at_least(0),
        TUNED,
    )
    capacity_factor: float | None = setting(
        None,
        "If set, an expert takes at most ceil(capacity_factor K L / N) tokens of each sequence of L in training, the "
        "first that choose it. For the others it is dropped: it contributes nothing, or with default vectors its own. "
        "At evaluation nothing is dropped.",
        positive(),
    )
    load_balance_weight: float | None = setting(
        None,
        "Factor in the loss of the balance loss over the batch; None: 0.01 where the balancer is 'loss', else 0.",
        at_least(0),
        MAY_CHANGE,
        TUNED,
    )
    load_balance_over: str = setting(
        "microbatch",
        "What the balance loss over the batch counts load over: each microbatch, or the whole 'batch' as far as it has "
        "been seen, all microbatches up to its own (train.grad_accum_steps).",
        one_of("microbatch", "batch"),
        MAY_CHANGE,
    )
    sequence_balance_weight: float = setting(
        0.0, "Factor in the loss of the balance loss within each sequence.", at_least(0), MAY_CHANGE, TUNED
    )
    router_z_weight: float = setting(0.0, "Factor in the loss of the router's z-loss.", at_least(0), MAY_CHANGE, TUNED)
    simbal_weight: float = setting(
        0.0,
        "Factor in the loss of SimBal's, which keeps the columns of the router's matrix orthonormal; set "
        "balancer='none' to have it in the place of the balance loss.",
        at_least(0),
        MAY_CHANGE,
        TUNED,
    )
    coupling_weight: float = setting(
        0.0,
        "Factor in the loss of expert-router coupling, see moe/coupling.py.",
        at_least(0),
        MAY_CHANGE,
        TUNED,
    )
    coupling_margin: float = setting(
        1.0,
        "What of an expert's answer to its own proxy another answer may be without a loss.",
        between(0, 1),
        MAY_CHANGE,
        TUNED,
    )
    dtype: str | None = setting(
        None,
        "What experts are computed in; None stands for model.dtype in a config file, for float32 on its own. The "
        "router and the default vectors are float32 always.",
        one_of("float32", "bfloat16"),
    )
    matmul: str = setting(
        "auto",
        "How experts are computed, see moe/experts/backends.py; 'auto' picks by platform.",
        one_of("auto", *MATMUL_BACKENDS),
        MAY_CHANGE,
    )
    expert_parallel: str = setting(
        "auto",
        "How devices that hold different experts share tokens, see moe/experts/parallel.py; 'auto' gathers, but on "
        "TPUs takes the one that moves less.",
        one_of("auto", *EXPERT_PARALLEL_FORMS),
        MAY_CHANGE,
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        check_settings(self, "moe")
        if self.plugin is not None:
            load_plugin(self.plugin)
        check(
            1 <= self.top_k <= self.num_experts,
            f"moe.top_k is {self.top_k}, but must lie between 1 and moe.num_experts = {self.num_experts}",
        )
        check(
            not self.router_z_weight or self.score_function == "softmax",
            f"moe.router_z_weight is {self.router_z_weight}, but moe.score_function is {self.score_function!r}, which "
            "has no partition function to be kept small",
        )
        if not isinstance(self.router, Method):
            check(
                isinstance(self.router, str) and self.router in METHODS,
                f"moe.router is {quoted(self.router)}, but must be one of {', '.join(map(repr, sorted(METHODS)))}",
            )
            object.__setattr__(self, "router", METHODS[self.router]())
        if not isinstance(self.balancer, Balancer) and self.balancer != "auto":
            check(
                isinstance(self.balancer, str) and self.balancer in BALANCERS,
                f"moe.balancer is {quoted(self.balancer)}, but must be one of 'auto', "
                f"{', '.join(map(repr, sorted(BALANCERS)))}",
            )
            object.__setattr__(self, "balancer", BALANCERS[self.balancer]())
        self._check_method()
        self._check_groups()
        self._check_losses_of_the_router()
        self._check_balancer()

    def _check_method(self) -> None:
        method = self.method
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name == "balancer" and value == method.balancer():
                continue
            check(
                value in (f.default, 0) or f.name not in method.refused,
                f"moe.{f.name} is {getattr(value, 'name', value)!r}, which makes no sense with "
                f"moe.router={method.name!r}: {method.refused.get(f.name)}",
            )
        check(
            self.router_init_std != 0 or bool(self.router_noise_std) or method.learns_from_zero_logits,
            f"moe.router_init_std is 0, but with moe.router={method.name!r} a router of which all logits are 0 never "
            "learns",
        )
        method.check(self)
        check(
            not (method.dense_gradient and self.most_experts_per_token != self.top_k),
            f"moe.router={method.name!r} asks for a dense gradient, which goes with a choice of K experts",
        )

    def _check_groups(self) -> None:
        groups, used = self.num_groups, self.groups_per_token
        check(
            self.num_experts % groups == 0,
            f"moe.num_groups is {groups}, but must divide moe.num_experts = {self.num_experts}",
        )
        check(
            1 <= used <= groups,
            f"moe.groups_per_token is {used}, but must lie between 1 and moe.num_groups = {groups}",
        )
        choice = self.num_experts // groups * used
        check(
            groups == 1 or self.top_k <= choice,
            f"moe.top_k is {self.top_k}, but moe.groups_per_token={used} of moe.num_groups={groups} groups hold only "
            f"{choice} experts",
        )
        check(
            groups == 1 or self.method.takes_bias,
            f"moe.num_groups is {groups}, which makes no sense with moe.router={self.method.name!r}: it does not "
            "choose the K experts of largest score",
        )

    def _check_losses_of_the_router(self) -> None:
        for name in ("simbal_weight", "coupling_weight"):
            check(
                not getattr(self, name) or type(self.method).router is Method.router,
                f"moe.{name} is {getattr(self, name)}, which makes no sense with moe.router={self.method.name!r}: its "
                "router is not one matrix that learns",
            )

    def _check_balancer(self) -> None:
        balancer = self.load_balancer
        check(
            not balancer.biased or self.method.takes_bias,
            f"moe.balancer is {balancer.name!r}, which makes no sense with moe.router={self.method.name!r}: no bias "
            "steers its choice of experts; use 'loss' or 'none'",
        )
        check(
            not balancer.load_balance_weight or self.method.learns,
            f"moe.balancer is {balancer.name!r}, which makes no sense with moe.router={self.method.name!r}: no loss "
            "reaches its router; use 'bias', 'quantile' or 'none'",
        )
        balancer.check(self)

    @property
    def method(self) -> Method:
        """`router`, as which a name is not kept."""
        return typing.cast(Method, self.router)

    @property
    def default_vectors(self) -> DefaultVectorSettings | None:
        """The method's settings for default vectors, None if it has none."""
        return self.method if isinstance(self.method, DefaultVectorSettings) else None

    @property
    def load_balancer(self) -> Balancer:
        """`balancer`, or what the method asks for in its place."""
        return self.balancer if isinstance(self.balancer, Balancer) else self.method.balancer()

    @property
    def balance_weight(self) -> float:
        """The factor of the load balance loss: the balancer's own where none is set."""
        own = self.load_balancer.load_balance_weight
        return own if self.load_balance_weight is None else self.load_balance_weight

    @property
    def experts_per_token(self) -> int:
        """How many experts' outputs a token uses on average: K, unless the method says otherwise."""
        return self.method.experts_per_token(self)

    @property
    def most_experts_per_token(self) -> int:
        """C, how many of them there is room for."""
        return self.method.most_experts_per_token(self)

    def capacity(self, length: int) -> int | None:
        """Tokens that an expert takes of a sequence of this length in training; None if there is no limit."""
        if self.capacity_factor is None:
            return None
        factor = Fraction(str(self.capacity_factor))  # as written: 0.55 x 100 is 55, where floats say more
        return min(length, math.ceil(factor * self.top_k * length / self.num_experts))

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Self:
        """From what `to_dict` gives, or a config's group `moe`. Raises ConfigError, for groups of other methods too."""
        check(isinstance(mapping, Mapping), f"moe is {quoted(mapping)}, but must be a group of settings")
        if isinstance(mapping.get("plugin"), str):
            load_plugin(mapping["plugin"])
        # Default vectors' settings as runs were saved before methods had groups.
        old = {name: mapping[name] for name in _WERE_NOT_IN_A_GROUP if name in mapping}
        choices = groups_of_settings()
        check_keys(mapping, [*(f.name for f in dataclasses.fields(cls)), *choices, *old], prefix="moe.")
        groups: dict[str, Any] = {name: mapping.get(name, {}) for name in choices}
        if old:
            groups["default"] = old
        made = {name: section_from_mapping(choices[name], f"moe.{name}", groups[name]) for name in choices}
        values = {name: value for name, value in mapping.items() if name not in {*choices, *old}}
        for name, known in (("router", METHODS), ("balancer", BALANCERS)):
            chosen = values.get(name, getattr(cls, name))
            if isinstance(chosen, str) and chosen in known:
                values[name] = made[chosen]
        return section_from_mapping(cls, "moe", values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values: the names of method and balancer, and their settings, if any, in groups of these names."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for setting_name in ("router", "balancer"):
            chosen = values[setting_name]
            if not isinstance(chosen, str):
                values[setting_name] = chosen.name
                if settings := dataclasses.asdict(chosen):
                    values[chosen.name] = settings
        return values


_WERE_NOT_IN_A_GROUP = ("ema_decay", "ema_weighted", "substitute", "ema_init", "ema_init_std")
