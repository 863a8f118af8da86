"""Evaluate a saved checkpoint: `python eval.py --workdir=runs/quickstart`. All is in default_moe/eval.py."""

from default_moe import cli
from default_moe.eval import main

if __name__ == "__main__":
    cli.run(main, many_processes=True)
