"""A small Default MoE on the Python standard library's sources, which every machine with Python has.

    python train.py --config=configs/quickstart.py --workdir=runs/quickstart

On 2 CPU cores it takes 4 to 8 minutes: 300 steps, 2.5 million bytes. Expect about 1.95 bits per byte on held-out files.
"""

from ml_collections import ConfigDict

from default_moe.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.model.d_model = 128
    config.model.num_layers = 4
    config.model.num_heads = 4

    config.moe.num_experts = 8
    config.moe.top_k = 1
    config.moe.expert_dim = 256

    config.data.name = "python_stdlib"
    config.data.tokenizer = "bytes"

    config.train.num_steps = 300
    config.train.batch_size = 64
    config.train.sequence_length = 128
    config.optim.peak_lr = 3e-3

    config.eval.every_steps = 100
    config.eval.num_batches = 8
    config.eval.sample_tokens = 120  # with the prompt no longer than what it was trained on
    config.checkpoint.every_steps = 100
    return config
