"""A Default MoE of 100 B parameters, of which a token uses 10 B, for 1,024 TPU v5p: a design, not a run.

    python -m default_moe.plan --config=configs/moe_100b.py --topology=v5p:8x8x16
    python train.py --config=configs/moe_100b.py --workdir=/shared/runs/moe_100b \\
        --config.data.files='fineweb_edu/*.parquet' --config.data.tokenizer=llama3/tokenizer.json

64 experts, top 4, in 47 of 48 layers. All parameters are split 128 ways, over one plane of the torus, of which there
are 8 copies; a device takes 4 sequences. (Experts split over devices would need less gathering of weights, but room
for all tokens of a group on each device, which costs more time here.) The batch is 16.8 M tokens; 2 T tokens are
119,209 steps. Nothing here has been trained; what the step takes is what the planner says.
"""

from ml_collections import ConfigDict

from default_moe.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.model.vocab_size = 128_256  # Llama 3
    config.model.d_model = 4096
    config.model.num_heads = 32
    config.model.num_layers = 48
    config.model.num_dense_layers = 1
    config.model.dense_dim = 12_288
    config.model.dtype = "bfloat16"
    config.model.remat = "full"

    config.moe.num_experts = 64
    config.moe.top_k = 4
    config.moe.expert_dim = 2560

    config.data.name = "text_files"
    config.data.tokenizer = "tokenizer.json"
    config.data.validation_fraction = 1e-4

    config.train.sequence_length = 4096
    config.train.batch_size = 4096
    config.train.num_steps = 119_209
    config.optim.peak_lr = 3e-4

    config.mesh.data = 8
    config.mesh.fsdp = 128
    config.checkpoint.every_steps = 500
    config.eval.every_steps = 1000
    config.eval.num_batches = 4
    config.eval.prompt = "The"
    return config
