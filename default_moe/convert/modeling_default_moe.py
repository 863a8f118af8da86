"""An exported model in torch, for transformers: a copy of this file lies beside its config.json.

It computes what default_moe computes at evaluation. Letters: B batch, L new tokens, S tokens so far, T = B L,
D width, H heads, E width of a head, N experts.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_default_moe import DefaultMoEConfig

# What transformers calls the cache of keys and values: the second before 5.24.
CACHE = next(name for name in ("cache", "past_key_values") if name in CausalLMOutputWithPast.__dataclass_fields__)


def make_norm(config: DefaultMoEConfig) -> nn.Module:
    return (nn.RMSNorm if config.norm_type == "rms" else nn.LayerNorm)(config.hidden_size, eps=config.rms_norm_eps)


class Attention(nn.Module):
    """Attention with rotary positions, to the tokens that a mask allows."""

    def __init__(self, config: DefaultMoEConfig, layer: int):
        super().__init__()
        self.layer, self.heads, self.kv_heads = layer, config.num_attention_heads, config.num_key_value_heads
        width, size = config.hidden_size, config.head_dim
        self.size = size
        self.q_proj = nn.Linear(width, self.heads * size, bias=False)
        self.k_proj = nn.Linear(width, self.kv_heads * size, bias=False)
        self.v_proj = nn.Linear(width, self.kv_heads * size, bias=False)
        self.o_proj = nn.Linear(self.heads * size, width, bias=False)
        self.qk_norm = config.qk_norm
        if self.qk_norm != "none":
            per_head = self.qk_norm == "head"
            self.q_norm = nn.RMSNorm(size if per_head else self.heads * size, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(size if per_head else self.kv_heads * size, eps=config.rms_norm_eps)

    def forward(self, x_BLD: Tensor, angles_BLE: Tensor, mask_BLS: Tensor, cache: Any) -> Tensor:
        q, k, v = self.q_proj(x_BLD), self.k_proj(x_BLD), self.v_proj(x_BLD)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (a.unflatten(-1, (-1, self.size)) for a in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (a.transpose(1, 2) for a in (rotate(q, angles_BLE), rotate(k, angles_BLE), v))
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        k, v = (a.repeat_interleave(self.heads // self.kv_heads, dim=1) for a in (k, v))
        out_BHLE = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_BLS[:, None])
        return self.o_proj(out_BHLE.transpose(1, 2).flatten(2))


def rotate(x_BLHE: Tensor, angles_BLE: Tensor) -> Tensor:
    """The rotary embedding: pairs (e, e + E/2) of each head are rotated."""
    cos, sin = angles_BLE.cos()[:, :, None], angles_BLE.sin()[:, :, None]
    first, second = x_BLHE.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BLHE.dtype)


class FeedForward(nn.Module):
    """SwiGLU: an expert, the shared experts, or a dense layer's network."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Linear):
    """The weight of each expert's output for each token, and whether the expert runs: [T, N] both."""

    def __init__(self, config: DefaultMoEConfig):
        super().__init__(config.hidden_size, config.num_experts, bias=False)
        self.config = config
        if config.score_bias:
            self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts))

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        logits_TN = F.linear(x_TD.float(), self.weight.float())
        if config.relu_gates:
            return logits_TN.relu(), logits_TN > 0
        log_TN = self.log_scores(logits_TN)
        biased_TN = log_TN.exp() + (self.e_score_correction_bias.float() if config.score_bias else 0)
        ranked_TN = biased_TN if config.score_bias else logits_TN
        if config.n_group > 1:  # a group's score is the sum of its two best
            size = config.num_experts // config.n_group
            of_group_TG = biased_TN.unflatten(-1, (config.n_group, size)).topk(min(2, size)).values.sum(dim=-1)
            best_TM = of_group_TG.topk(config.topk_group).indices
            allowed_TG = torch.zeros_like(of_group_TG, dtype=torch.bool).scatter(1, best_TM, True)
            ranked_TN = ranked_TN.masked_fill(~allowed_TG.repeat_interleave(size, dim=-1), -torch.inf)
        chosen_TK = ranked_TN.topk(config.num_experts_per_tok).indices
        active_TN = torch.zeros_like(logits_TN, dtype=torch.bool).scatter(1, chosen_TK, True)
        if config.norm_topk_prob:
            log_TN = log_TN - log_TN.masked_fill(~active_TN, -torch.inf).logsumexp(dim=-1, keepdim=True)
        return config.routed_scaling_factor * log_TN.exp(), active_TN

    def log_scores(self, logits_TN: Tensor) -> Tensor:
        if self.config.scoring_func == "softmax":
            return logits_TN.log_softmax(dim=-1)
        if self.config.scoring_func == "sigmoid":
            return F.logsigmoid(logits_TN)
        # Far below 0 the softplus of s is exp(s).
        return torch.where(logits_TN < -17, logits_TN, F.softplus(logits_TN).log()) / 2


class MoE(nn.Module):
    """The experts that run, weighted; default vectors in the place of the others, weighted too (arXiv:2504.12463)."""

    def __init__(self, config: DefaultMoEConfig):
        super().__init__()
        width, hidden, num_experts = config.hidden_size, config.moe_intermediate_size, config.num_experts
        self.gate = Router(config)
        self.experts = nn.ModuleList(FeedForward(width, hidden) for _ in range(num_experts))
        self.num_shared, self.share = config.n_shared_experts, config.default_vector_share
        if self.num_shared:
            self.shared_experts = FeedForward(width, self.num_shared * hidden)
        if self.share is not None:
            self.register_buffer("default_vectors", torch.zeros(num_experts, width))

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_TD = x_BLD.flatten(0, 1)
        gates_TN, active_TN = self.gate(x_TD)
        y_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        for index, expert in enumerate(self.experts):
            rows = active_TN[:, index].nonzero()[:, 0]
            if len(rows):
                y_TD = y_TD.index_add(0, rows, gates_TN[rows, index, None] * expert(x_TD[rows]).float())
        if self.share is not None:
            y_TD = y_TD + self.share * gates_TN.masked_fill(active_TN, 0) @ self.default_vectors.float()
        if self.num_shared:
            y_TD = y_TD + self.shared_experts(x_TD).float()
        return y_TD.to(x_BLD.dtype).view_as(x_BLD)


class Layer(nn.Module):
    """Attention, then the feed-forward network, each on a normed residual."""

    def __init__(self, config: DefaultMoEConfig, layer: int):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = make_norm(config), make_norm(config)
        self.self_attn = Attention(config, layer)
        dense = layer in config.mlp_only_layers
        self.mlp = FeedForward(config.hidden_size, config.intermediate_size) if dense else MoE(config)

    def forward(self, x_BLD: Tensor, *attention: Any) -> Tensor:
        x_BLD = x_BLD + self.self_attn(self.input_layernorm(x_BLD), *attention)
        return x_BLD + self.mlp(self.post_attention_layernorm(x_BLD))


class Decoder(nn.Module):
    def __init__(self, config: DefaultMoEConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = make_norm(config)


class DefaultMoEForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model. Text is generated with a cache of keys and values."""

    config_class = DefaultMoEConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - as transformers reads it

    def __init__(self, config: DefaultMoEConfig):
        super().__init__(config)
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predict the token after each token.

        attention_mask: [B, S], 0 where a token is padding.
        cache, or past_key_values: of the tokens before `input_ids`.
        logits_to_keep: so many of the last logits are computed; 0: all.
        """
        config = self.config
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache()
        x_BLD = self.model.embed_tokens(input_ids)
        past = 0 if cache is None else cache.get_seq_length()
        place_S = torch.arange(past + x_BLD.shape[1], device=x_BLD.device)
        behind_LS = place_S[past:, None] - place_S
        mask_BLS = ((behind_LS >= 0) & (behind_LS < (config.attention_window or len(place_S))))[None]
        if attention_mask is not None:  # padding sees itself: what attends to nothing is not a number
            mask_BLS = mask_BLS & (attention_mask[:, None] != 0) | (behind_LS == 0)
        positions_BL = place_S[None, past:] if position_ids is None else position_ids
        half = config.head_dim // 2
        frequencies_E = config.rope_theta ** (-torch.arange(half, device=x_BLD.device, dtype=torch.float32) / half)
        angles_BLE = positions_BL[..., None].float() * frequencies_E
        for layer in self.model.layers:
            x_BLD = layer(x_BLD, angles_BLE, mask_BLS, cache)
        logits_BLV = self.lm_head(self.model.norm(x_BLD)[:, -logits_to_keep:])
        loss = None if labels is None else self.loss_function(logits_BLV, labels, config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits_BLV, **{CACHE: cache})
