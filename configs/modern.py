"""A small Mixture-of-Experts model as they are built in 2026, on the Python standard library's sources.

    python train.py --config=configs/modern.py --workdir=runs/modern

RMSNorm, norms of queries and keys, grouped-query attention, 32 narrow experts of which each token runs 4 beside one
that all share, Muon, and a learning rate that stays and then falls. The model runs about as many weights for each token
as the quickstart's, and sees half of its text in twice as many steps. On 2 CPU cores it takes 6.3 minutes. Expect about
1.68 bits per byte on held-out files.
"""

from ml_collections import ConfigDict

from default_moe.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.model.d_model = 128
    config.model.num_layers = 4
    config.model.num_heads = 4
    config.model.num_kv_heads = 2
    config.model.norm = "rms"
    config.model.qk_norm = "head"
    config.model.dense_dim = 256

    config.moe.num_experts = 32
    config.moe.top_k = 4
    config.moe.expert_dim = 48
    config.moe.num_shared_experts = 1

    config.data.name = "python_stdlib"
    config.data.tokenizer = "bytes"

    config.train.num_steps = 600
    config.train.batch_size = 16
    config.train.sequence_length = 128
    config.optim.name = "muon"
    config.optim.peak_lr = 3e-3
    config.optim.schedule = "wsd"

    config.eval.every_steps = 200
    config.eval.num_batches = 32
    config.eval.sample_tokens = 120
    config.checkpoint.every_steps = 200
    return config
