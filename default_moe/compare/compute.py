"""What a method's training computes for each token, with the experts that tokens really ran."""

import math

from default_moe.config import Config
from default_moe.model.size import parameter_counts, train_flops_per_token


def training_flops_per_token(config: Config, vocab_size: int, experts_per_token: float) -> float:
    """Return the floating-point operations of training per token: the model's, and what the method computes besides.

    experts_per_token: E, as measured, a mean over MoE layers; NaN stands for what the method says.

    The model's are those of `train_flops_per_token`. With N experts, width D and P parameters of an expert there are
    besides, in each MoE layer:
      2 P (N - E) where a dense gradient runs the other experts forward in the backward pass;
      2 P for each expert that is sampled, forward only;
      2 D E for the moving average of default vectors, or 2 D N for each sample in it, 2 D N for the router's gradient
        from them, 2 D N for their part of the output where they have one, and 2 D (N + E) for the gradient of experts
        from that, if any;
      -4 D N where the router does not learn: no gradient passes it.
    Only products are counted. Choices count that a capacity drops.
    """
    moe, layers = config.moe, config.model.num_moe_layers
    if math.isnan(experts_per_token):
        experts_per_token = moe.experts_per_token
    flops = train_flops_per_token(config, vocab_size, experts_per_token)
    of_an_expert = parameter_counts(config, vocab_size).experts / moe.num_experts  # of all layers
    samples = moe.method.samples_per_token(moe)
    flops += 2 * of_an_expert * samples
    if moe.method.dense_gradient:
        flops += 2 * of_an_expert * (moe.num_experts - experts_per_token)
    width = 2 * config.model.d_model * layers
    if (vectors := moe.default_vectors) is not None:
        averaged = moe.num_experts * samples if samples else experts_per_token
        flops += width * (1 + vectors.expert_gradient) * (moe.num_experts + averaged)
        flops += width * moe.num_experts * (vectors.substitute == "forward")
    return flops if moe.method.learns else flops - 2 * width * moe.num_experts
