"""How fast this is here: `python -m default_moe.bench --suite=layer`, or `--suite=step --config=configs/quickstart.py`.

layer: the MoE layer, forward and with backward, against a dense feed-forward network of equal active FLOPs.
step: the whole training step of a config, its parts, and Default MoE against plain top-k.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from default_moe import cli
from default_moe.bench import layer, report, step
from default_moe.bench.workload import LayerShape, standard_shapes
from default_moe.config import ConfigError

_DEFAULT_CONFIG = "configs/quickstart.py"
_SUITE = flags.DEFINE_enum("suite", "layer", ["layer", "step"], "What to time.")
_SHAPES = flags.DEFINE_multi_string("shape", None, "T,D,N,K,F for --suite=layer; the standard set if not given.")
_DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Compute type for --suite=layer.")
_ROUNDS = flags.DEFINE_integer("rounds", 15, "Times that each candidate is timed.", lower_bound=1)
_BACKENDS = flags.DEFINE_list("matmul", None, "Values of moe.matmul for --suite=layer; all that run here if not given.")
_VS_TORCH = flags.DEFINE_bool("vs_torch", False, "Add transformers' Mixtral block on torch to --suite=layer.")
_JSON = flags.DEFINE_string("json", None, "File to write the results to, with the machine and versions.")
_PLOT = flags.DEFINE_string("plot", None, "Picture (.png) to draw of --suite=layer.")
_CONFIG = config_flags.DEFINE_config_file("config", None, f"Config for --suite=step; {_DEFAULT_CONFIG} if not given.")


def main(argv: list[str]) -> int:
    if _suite(argv) == "step":
        config = cli.parse_config(argv, _CONFIG, _DEFAULT_CONFIG)
        for name, value in (("shape", _SHAPES.value), ("vs_torch", _VS_TORCH.value), ("plot", _PLOT.value)):
            if value:
                raise ConfigError(f"--{name} goes with --suite=layer, but --suite is step")
        results = step.run(config, _ROUNDS.value)
    else:
        if cli.config_name(argv, ""):
            raise ConfigError("--config goes with --suite=step, but --suite is layer")
        cli.parse_flags(argv)
        shapes = [LayerShape.parse(text) for text in _SHAPES.value or ()] or standard_shapes()
        results = layer.run(shapes, _BACKENDS.value, _DTYPE.value, _ROUNDS.value, _VS_TORCH.value)
    if _JSON.value:
        report.write_json(Path(_JSON.value), _SUITE.value, results)
    if _PLOT.value:
        layer.plot(results, Path(_PLOT.value))
    return 0


def _suite(argv: list[str]) -> str:
    """The value of --suite, which decides whether there is a config file to read before the flags that change it."""
    values = flags.FlagValues()
    flags.DEFINE_string(_SUITE.name, _SUITE.default, "", flag_values=values)
    values(argv, known_only=True)
    return str(values[_SUITE.name].value)


if __name__ == "__main__":
    cli.run(main)
