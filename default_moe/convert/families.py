"""The families of Hugging Face models that can be read and written: their config.json, and the names of their tensors.

OLMoE (Muennighoff et al. 2024), Qwen3-MoE (Yang et al. 2025) and Mixtral (Jiang et al. 2024), as transformers has them.
Of models without experts Llama, Mistral and Qwen3 can be read.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from default_moe.config import Config
from default_moe.errors import check, quoted, shown


@dataclass(frozen=True)
class Family:
    """How a family differs from the others, see `settings_of` and `tensors.py`.

    model_type, architecture: in config.json.  num_experts, expert_dim: what these are called there.
    moe: where the router and the experts are in a layer.  parts: gate, up and down projection of an expert.
    qk_norm: of `model.qk_norm`; "any": whatever it is.
    """

    model_type: str
    architecture: str
    num_experts: str
    expert_dim: str
    moe: str
    parts: tuple[str, str, str]
    qk_norm: str


_PARTS = ("gate_proj", "up_proj", "down_proj")
OLMOE = Family("olmoe", "OlmoeForCausalLM", "num_experts", "intermediate_size", "mlp", _PARTS, "full")
QWEN3 = Family("qwen3_moe", "Qwen3MoeForCausalLM", "num_experts", "moe_intermediate_size", "mlp", _PARTS, "head")
MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    "num_local_experts",
    "intermediate_size",
    "block_sparse_moe",
    ("w1", "w3", "w2"),
    "none",
)
# Any model of ours: transformers computes it with the two files that are written beside its config.json.
DEFAULT_MOE = Family(
    "default_moe", "DefaultMoEForCausalLM", "num_experts", "moe_intermediate_size", "mlp", _PARTS, "any"
)
_OWN_CODE = {"AutoConfig": "configuration_default_moe.DefaultMoEConfig"} | {
    "AutoModelForCausalLM": f"modeling_default_moe.{DEFAULT_MOE.architecture}"
}
_NUM_EXPERTS = ("num_experts", "num_local_experts")  # transformers 5 writes the second for all but OLMoE
# Methods whose evaluation DEFAULT_MOE computes.
_CHOOSE_K = ("topk", "default", "default_sampled", "densemixer", "loss_free", "frozen", "probmoe")
_WRITTEN = (*_CHOOSE_K, "dense", "remoe")
FAMILIES = {family.model_type: family for family in (OLMOE, QWEN3, MIXTRAL)}
# Models without experts, which are only read.
LLAMA = Family("llama", "LlamaForCausalLM", "", "", "mlp", _PARTS, "none")
MISTRAL = Family("mistral", "MistralForCausalLM", "", "", "mlp", _PARTS, "none")
DENSE_QWEN3 = Family("qwen3", "Qwen3ForCausalLM", "", "", "mlp", _PARTS, "head")
DENSE = {family.model_type: family for family in (LLAMA, MISTRAL, DENSE_QWEN3)}


def family_of(values: Mapping[str, Any], where: str) -> Family:
    """The family of a config.json. Raises ConfigError if it is none of these."""
    found, known = values.get("model_type"), FAMILIES | DENSE
    check(
        isinstance(found, str) and found in known,
        f"{where}: model_type is {quoted(found)}, but must be one of {', '.join(map(repr, known))}",
    )
    return known[str(found)]


def settings_of(values: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """The settings `model` and `moe` of a config.json.

    Raises ConfigError, naming the key, where a key is missing or says what no setting here can.
    """
    family = family_of(values, where)

    def number(key: str, kind: Callable[[Any], Any] = int) -> Any:
        value: Any = values.get(key)
        right = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 2**31
        check(right and value == kind(value), f"{where}: {key} is {quoted(value)}, but must be a positive number")
        return kind(value)

    def optional(key: str) -> int | None:
        return None if values.get(key) is None else int(number(key))

    def must_be(key: str, *allowed: Any) -> None:
        value = values.get(key, allowed[0])
        check(value in allowed, f"{where}: {key} is {quoted(value)}, but only {quoted(allowed[0])} can be represented")

    must_be("hidden_act", "silu")
    must_be("attention_bias", False, None)
    must_be("clip_qkv", None)
    must_be("partial_rotary_factor", 1.0, None)
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, Mapping) else rope
    check(kind == "default", f"{where}: rope of type {quoted(kind)}, but only 'default' can be represented")
    theta: Any = rope.get("rope_theta", values.get("rope_theta"))
    check(
        isinstance(theta, int | float) and 0 < theta < 1e30,
        f"{where}: rope_theta is {quoted(theta)}, but must be a positive number",
    )
    model: dict[str, Any] = {
        "vocab_size": number("vocab_size"),
        "d_model": number("hidden_size"),
        "num_layers": number("num_hidden_layers"),
        "num_heads": number("num_attention_heads"),
        "num_kv_heads": optional("num_key_value_heads"),
        "head_dim": optional("head_dim"),
        "tie_embeddings": bool(values.get("tie_word_embeddings", False)),
        "rope_theta": float(theta),
        "norm": "rms",
        "norm_epsilon": number("rms_norm_eps", float),
        "qk_norm": family.qk_norm,
        "num_dense_layers": 0,
    }
    if family is DENSE_QWEN3:
        must_be("use_sliding_window", False, None)
    if family in (MIXTRAL, MISTRAL):
        model["attention_window"] = optional("sliding_window")
    if family.model_type in DENSE:
        must_be("mlp_bias", False, None)
        model |= {"num_dense_layers": model["num_layers"], "dense_dim": number("intermediate_size")}
        return {"model": model, "moe": {"router": "topk"}}
    moe: dict[str, Any] = {
        "router": "topk",
        "num_experts": number(next((key for key in _NUM_EXPERTS if key in values), family.num_experts)),
        "top_k": number("num_experts_per_tok"),
        "expert_dim": number(family.expert_dim),
        "normalize_weights": family is MIXTRAL or bool(values.get("norm_topk_prob", False)),
    }
    if family is QWEN3:
        must_be("use_sliding_window", False, None)
        dense = values.get("mlp_only_layers") or []
        check(
            isinstance(dense, list) and all(layer in range(model["num_layers"]) for layer in dense),
            f"{where}: mlp_only_layers is {shown(dense)}, but must be numbers of layers",
        )
        every, first = optional("decoder_sparse_step") or 1, next(n for n in itertools.count() if n not in dense)
        model |= {
            "num_dense_layers": first,
            "moe_every": every,
            "dense_layers": ",".join(str(layer) for layer in dense if layer > first) or None,
            "dense_dim": number("intermediate_size") if dense or every > 1 else None,
        }
    return {"model": model, "moe": moe}


def adds_vectors(config: Config) -> bool:
    """Whether default vectors are part of the output at evaluation."""
    vectors = config.moe.default_vectors if config.model.num_moe_layers else None
    return vectors is not None and vectors.substitute == "forward" and vectors.substitute_at_eval


def choose_family(config: Config) -> tuple[Family, str]:
    """The family that computes what this model does, and why it is DEFAULT_MOE where it is.

    Raises ConfigError if no family does.
    """
    model, moe = config.model, config.moe
    plain = moe.method.name in _CHOOSE_K and not adds_vectors(config)
    common: list[tuple[bool, str]] = [
        (plain, f"moe.router={moe.method.name!r} adds to the output of the K likeliest experts, or chooses others"),
        (model.num_moe_layers > 0, "there are no MoE layers"),
        (
            not moe.load_balancer.biased,
            f"moe.balancer={moe.load_balancer.name!r} has a bias that helps to choose a token's experts",
        ),
        (moe.score_function == "softmax", f"moe.score_function is {moe.score_function!r}"),
        (moe.num_groups == 1, f"moe.num_groups is {moe.num_groups}"),
        (moe.weight_scale == 1, f"moe.weight_scale is {moe.weight_scale}"),
        (moe.num_shared_experts == 0, "moe.num_shared_experts is not 0"),
        (model.norm == "rms", f"model.norm is {model.norm!r}"),
    ]
    dense = (model.num_dense_layers == 0, "model.num_dense_layers is not 0")
    others = (model.num_moe_layers == model.num_layers, "model.moe_every or model.dense_layers makes layers dense")
    window = (model.attention_window is None, "model.attention_window is set")
    own: dict[str, list[tuple[bool, str]]] = {
        OLMOE.model_type: [
            dense,
            others,
            window,
            (model.head_size * model.num_heads == model.d_model, "model.head_dim is not model.d_model / num_heads"),
        ],
        QWEN3.model_type: [window],
        MIXTRAL.model_type: [dense, others, (moe.normalize_weights, "moe.normalize_weights is False")],
    }
    reasons: dict[str, list[str]] = {}
    for family in FAMILIES.values():
        same_norm = (model.qk_norm == family.qk_norm, f"model.qk_norm is {model.qk_norm!r}")
        reason = next((why for fits, why in [*common, same_norm, *own[family.model_type]] if not fits), None)
        if reason is None:
            return family, ""
        reasons.setdefault(reason, []).append(family.model_type)
    check(
        moe.method.name in _WRITTEN or model.num_moe_layers == 0,
        f"moe.router is {moe.method.name!r}, but only models of {', '.join(map(repr, _WRITTEN))} can be written",
    )
    return DEFAULT_MOE, "; ".join(f"not as {' or '.join(names)}, since {why}" for why, names in reasons.items())


def config_json(
    config: Config, family: Family, vocab_size: int, separator: int, dtype: str, vector_share: float | None
) -> dict[str, Any]:
    """What config.json says of a model, for `settings_of` and for transformers.

    vector_share: factor of the default vectors in the output, None where they are no part of it.
    """
    model, moe = config.model, config.moe
    values: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": vocab_size,
        "hidden_size": model.d_model,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_size,
        "hidden_act": "silu",
        "attention_bias": False,
        "max_position_embeddings": config.train.sequence_length,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": model.tie_embeddings,
        "num_experts_per_tok": moe.top_k,
        "router_aux_loss_coef": moe.balance_weight,
        "bos_token_id": separator,
        "eos_token_id": separator,
        "torch_dtype": dtype,
        "intermediate_size": model.dense_dim or moe.expert_dim,
        family.num_experts: moe.num_experts,
        family.expert_dim: moe.expert_dim,
    }
    special: dict[Family, Callable[[], dict[str, Any]]] = {
        OLMOE: lambda: {"norm_topk_prob": moe.normalize_weights, "clip_qkv": None},
        QWEN3: lambda: {
            "norm_topk_prob": moe.normalize_weights,
            "decoder_sparse_step": model.moe_every,
            "mlp_only_layers": [
                layer
                for layer in range(model.num_layers)
                if layer not in model.moe_layers and (layer + 1) % model.moe_every == 0
            ],
            "use_sliding_window": False,
        },
        MIXTRAL: lambda: {"sliding_window": model.attention_window},
        DEFAULT_MOE: lambda: {
            **special[QWEN3](),
            "auto_map": _OWN_CODE,
            "num_experts_per_tok": moe.most_experts_per_token,
            "norm_type": model.norm,
            "qk_norm": model.qk_norm,
            "attention_window": model.attention_window,
            "scoring_func": moe.score_function,
            "relu_gates": moe.method.name == "remoe",
            "score_bias": moe.load_balancer.biased,
            "n_group": moe.num_groups,
            "topk_group": moe.groups_per_token,
            "routed_scaling_factor": moe.weight_scale,
            "n_shared_experts": moe.num_shared_experts,
            "default_vector_share": vector_share,
        },
    }
    return {**values, **special[family]()}
