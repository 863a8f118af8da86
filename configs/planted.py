"""A task where a good division of labour is known: text of 16 generators, and 16 experts.

    python -m default_moe.compare --config=configs/planted.py --methods=topk,densemixer,frozen

In each document every character follows from the one before by a permutation of the document's own generator, which a
letter names now and then. An expert is too narrow for all of them. What a run's experts have to do with the generators
says

    python -m default_moe.analysis domains --workdir=runs/planted/runs/topk/seed_0

A run takes 30 seconds on a CPU core. Expect a held-out loss of 1.08 nats per byte from top-k. No model can get below
0.68: 15 of 16 characters have an entropy of 0.73.
"""

from ml_collections import ConfigDict

from default_moe.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.data.name = "planted/16"
    config.data.tokenizer = "bytes"
    config.model.d_model = 64
    config.model.num_layers = 2
    config.model.num_heads = 2
    config.moe.num_experts = 16
    config.moe.top_k = 1
    config.moe.expert_dim = 16
    config.moe.balancer = "quantile"
    config.train.num_steps = 600
    config.train.batch_size = 16
    config.train.sequence_length = 128
    config.eval.num_batches = 16
    config.eval.every_steps = config.train.num_steps // 10
    config.eval.sample_tokens = 0
    config.checkpoint.every_steps = config.train.num_steps // 2
    config.checkpoint.keep_last = 1
    config.optim.peak_lr = 6e-3
    return config
