"""The config of an exported model, for transformers: a copy of this file lies beside its config.json."""

from typing import Any

from transformers import PretrainedConfig


class DefaultMoEConfig(PretrainedConfig):
    """Settings under the names of OLMoE and Qwen3-MoE where they mean the same. The others:

    norm_type: of the residual stream, "rms" or "layer".  rms_norm_eps: of either.
    qk_norm: RMSNorm of queries and keys: "none", of each "head", or of the "full" projection.
    attention_window: tokens that a token sees, itself and the latest before it; None: all before it.
    mlp_only_layers: numbers of the dense layers, of hidden width intermediate_size.
    scoring_func: "softmax", "sigmoid" or "sqrt_softplus".
    relu_gates: weights are ReLUs of the router's logits instead (ReMoE).
    score_bias: whether a bias on the scores helps to choose experts.
    n_group, topk_group, routed_scaling_factor: as in DeepSeek-V3.
    n_shared_experts: experts that every token runs, their output added as it is.
    default_vector_share: factor of the default vectors in the output; None: there are none.
    """

    model_type = "default_moe"

    def __init__(
        self,
        vocab_size: int = 257,
        hidden_size: int = 128,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        num_key_value_heads: int = 4,
        head_dim: int = 32,
        intermediate_size: int = 352,
        moe_intermediate_size: int = 352,
        num_experts: int = 8,
        num_experts_per_tok: int = 1,
        norm_topk_prob: bool = False,
        mlp_only_layers: list[int] | None = None,
        max_position_embeddings: int = 256,
        rope_theta: float = 10_000.0,
        rms_norm_eps: float = 1e-5,
        norm_type: str = "rms",
        qk_norm: str = "none",
        attention_window: int | None = None,
        scoring_func: str = "softmax",
        relu_gates: bool = False,
        score_bias: bool = False,
        n_group: int = 1,
        topk_group: int = 1,
        routed_scaling_factor: float = 1.0,
        n_shared_experts: int = 0,
        default_vector_share: float | None = None,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.intermediate_size = intermediate_size
        self.moe_intermediate_size = moe_intermediate_size
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.norm_topk_prob = norm_topk_prob
        self.mlp_only_layers = mlp_only_layers or []
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta = rope_theta
        self.rms_norm_eps = rms_norm_eps
        self.norm_type = norm_type
        self.qk_norm = qk_norm
        self.attention_window = attention_window
        self.scoring_func = scoring_func
        self.relu_gates = relu_gates
        self.score_bias = score_bias
        self.n_group = n_group
        self.topk_group = topk_group
        self.routed_scaling_factor = routed_scaling_factor
        self.n_shared_experts = n_shared_experts
        self.default_vector_share = default_vector_share
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
