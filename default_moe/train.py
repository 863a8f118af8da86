"""Train a model, or continue a run: `python train.py --config=configs/quickstart.py --workdir=runs/quickstart`.

Any setting can be changed on the command line: --config.train.num_steps=1000. Where the package is installed, and from
any folder, `python -m default_moe.train` is the same program.
"""

from absl import flags
from ml_collections import config_flags

from default_moe import cli
from default_moe.runs import trainer

_DEFAULT_CONFIG = "configs/quickstart.py"
_CONFIG = config_flags.DEFINE_config_file("config", None, f"Config file; {_DEFAULT_CONFIG} if not given.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; runs/<name of the config> if not given.")


def main(argv: list[str]) -> int:
    config = cli.parse_config(argv, _CONFIG, _DEFAULT_CONFIG)
    return trainer.train(config, cli.path(_WORKDIR, f"runs/{cli.config_name(argv, _DEFAULT_CONFIG)}"))


if __name__ == "__main__":
    cli.run(main, many_processes=True)
