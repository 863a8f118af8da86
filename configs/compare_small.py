"""A comparison of methods small enough for anyone to run again: 8 experts, of which each token runs 1 or 2.

    python -m default_moe.compare --config=configs/compare_small.py --set moe.top_k=1,2

Two methods, four seeds and both K are 16 runs of 0.12 and 0.15 M active parameters and 2.5 million bytes, in about 30
minutes on 2 CPU cores. Expect held-out losses of 1.32 and 1.30 nats per byte from top-k, 1.38 and 1.33 from Default
MoE as in the paper.
After a colon, `gpu` takes a larger model and 20 million bytes a run, an estimated ten minutes on one H200:

    python -m default_moe.compare --config=configs/compare_small.py:gpu --set moe.top_k=1,2
"""

from ml_collections import ConfigDict

from default_moe.config import default_config
from default_moe.errors import ConfigError


def get_config(hardware: str = "cpu") -> ConfigDict:
    if hardware not in ("cpu", "gpu"):
        raise ConfigError(f"configs/compare_small.py:{hardware} is not one of cpu, gpu")
    config = default_config()
    config.moe.num_experts = 8
    config.moe.top_k = 1
    config.data.name = "python_stdlib"
    config.data.tokenizer = "bytes"
    if hardware == "cpu":
        config.model.d_model = 64
        config.model.num_layers = 3
        config.model.num_heads = 2
        config.moe.expert_dim = 64
        config.train.num_steps = 1200
        config.train.batch_size = 16
        config.train.sequence_length = 128
        config.eval.num_batches = 32
    else:
        config.model.d_model = 256
        config.model.num_layers = 6
        config.model.num_heads = 4
        config.model.dtype = "bfloat16"
        config.moe.expert_dim = 512
        config.train.num_steps = 600
        config.train.batch_size = 128
        config.train.sequence_length = 256
        config.eval.num_batches = 8
    config.optim.peak_lr = 3e-3

    # Points of the curves on which tokens to target are read.
    config.eval.every_steps = config.train.num_steps // 20
    config.eval.sample_tokens = 0
    config.checkpoint.every_steps = config.train.num_steps // 2
    config.checkpoint.keep_last = 1
    return config
