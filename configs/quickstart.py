"""A small Default MoE on the Python standard library's sources, which every machine with Python has.

python train.py --config=configs/quickstart.py --workdir=runs/quickstart
"""

from ml_collections import ConfigDict

from default_moe.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    return config
