"""Train a model, or continue a run: `python train.py --workdir=runs/quickstart`. All is in default_moe/train.py."""

from default_moe import cli
from default_moe.train import main

if __name__ == "__main__":
    cli.run(main, many_processes=True)
