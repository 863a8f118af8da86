"""A comparison of methods that is small enough to be run again by anyone: 8 experts, of which each token runs 1 or 2.

python -m default_moe.compare --config=configs/compare_small.py --set moe.top_k=1,2
"""

from ml_collections import ConfigDict

from default_moe.config_dict import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.model.d_model = 64
    config.model.num_layers = 3
    config.model.num_heads = 2
    config.moe.num_experts = 8
    config.moe.top_k = 1
    config.moe.expert_dim = 64
    config.data.name = "python_stdlib"
    config.data.tokenizer = "bytes"
    config.train.num_steps = 600
    config.train.batch_size = 16
    config.train.sequence_length = 128
    config.eval.every_steps = 30
    config.eval.num_batches = 32
    config.eval.sample_tokens = 0
    config.checkpoint.keep_last = 1
    return config
