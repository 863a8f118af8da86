"""The models of arXiv:2504.12463 (Default MoE), chosen after a colon: 8c1, 8c2, 32c1, 32c2 or 32c4.

    python train.py --config=configs/paper.py:8c1 --workdir=runs/paper_8c1 \\
        --config.data.files='fineweb_edu/*.parquet' --config.data.tokenizer=llama3/tokenizer.json

NcK has N experts of which each token runs K. `8c1,d_model=512` and `8c1,d_model=2048` are the other two widths.

Hardware: many accelerators. The loss is taken in chunks (train.logits_per_chunk), so activations decide what
fits: on fewer than 64 devices of 80 GB set train.grad_accum_steps so that each holds few enough sequences at a time.
The paper trains on 160 B tokens (10 B in its ablations: set train.num_steps=4768);
it reports a 13-task average of 47.9 for 8c1 with Default MoE, 46.9 with top-k.
FineWeb-Edu and Llama 3's tokenizer are not part of this repository.
"""

from ml_collections import ConfigDict

from default_moe.config import default_config
from default_moe.errors import ConfigError

_CONFIGURATIONS = {"8c1": (8, 1), "8c2": (8, 2), "32c1": (32, 1), "32c2": (32, 2), "32c4": (32, 4)}
_WIDTHS = (512, 1024, 2048)


def get_config(arguments: str = "8c1") -> ConfigDict:
    name, *options = arguments.split(",")
    if name not in _CONFIGURATIONS:
        raise ConfigError(f"configs/paper.py:{name} is not one of {', '.join(_CONFIGURATIONS)}")
    num_experts, top_k = _CONFIGURATIONS[name]
    d_model = 1024
    for option in options:
        if option not in {f"d_model={width}" for width in _WIDTHS}:
            raise ConfigError(f"configs/paper.py:{arguments}: {option!r} is not d_model=512, 1024 or 2048")
        d_model = int(option.removeprefix("d_model="))

    config = default_config()
    config.model.vocab_size = 128_256  # Llama 3
    config.model.d_model = d_model
    config.model.num_heads = d_model // 64
    # Inferred: 24 layers, of which the parameter counts (1.96 B in all, 366 M outside the experts) leave 23 to MoE.
    # Inferred too: the dense layer is as wide as one expert (dense_dim unset), and experts widen with the model,
    # which gives the 557 M and 7.33 B of the other widths.
    config.model.num_layers = 24
    config.model.num_dense_layers = 1
    config.model.dtype = "bfloat16"
    config.model.remat = "dots"

    config.moe.num_experts = num_experts
    config.moe.top_k = top_k
    config.moe.expert_dim = 22_528 * d_model // (1024 * num_experts)
    config.moe.default.ema_decay = 0.9

    config.data.name = "text_files"
    config.data.tokenizer = "tokenizer.json"
    config.data.validation_fraction = 1e-4

    config.train.sequence_length = 2048
    config.train.batch_size = 1024
    config.train.num_steps = 76_294  # 160 B tokens
    config.optim.peak_lr = 9e-4
    config.optim.warmup_fraction = 0.01
    config.optim.final_lr_fraction = 0.1
    config.optim.weight_decay = 0.1

    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.checkpoint.every_steps = 1000
    config.eval.every_steps = 1000
    config.eval.num_batches = 4
    config.eval.prompt = "The"
    return config
