"""How fast this is here: `python -m default_moe.bench --suite=layer`, or step, scaling, accelerator.

layer: the MoE layer, forward and with backward, against a dense feed-forward network of equal active FLOPs.
step: the whole training step of a config, its parts, and Default MoE, or --methods, against plain top-k.
scaling: the step against the number of experts, the depth and the number of tokens.
accelerator: all that is worth knowing about one GPU or TPU, in less than nine minutes, written to --out.
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from default_moe import cli
from default_moe.bench import layer, report, scaling, step
from default_moe.bench.report import Row
from default_moe.bench.workload import LayerShape, standard_shapes
from default_moe.errors import ConfigError

_DEFAULT_CONFIG = "configs/quickstart.py"
_SUITES = ["layer", "step", "scaling", "accelerator"]
_SUITE = flags.DEFINE_enum("suite", "layer", _SUITES, "What to time.")
_SHAPES = flags.DEFINE_multi_string("shape", None, "T,D,N,K,F for --suite=layer; the standard set if not given.")
_DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Compute type for --suite=layer.")
_ROUNDS = flags.DEFINE_integer("rounds", None, "Times that each candidate is timed: 15, for scaling 5.", lower_bound=1)
_BACKENDS = flags.DEFINE_list("matmul", None, "Values of moe.matmul for --suite=layer; all that run here if not given.")
_METHODS = flags.DEFINE_list("methods", None, "Values of moe.router for --suite=step; topk,default if not given.")
_VS_TORCH = flags.DEFINE_bool("vs_torch", False, "Add transformers' Mixtral block on torch to --suite=layer.")
_JSON = flags.DEFINE_string("json", None, "File to write the results to, with the machine and versions.")
_PLOT = flags.DEFINE_string("plot", None, "Picture (.png) to draw of --suite=layer or scaling.")
_OUT = flags.DEFINE_string("out", None, "New directory for all that --suite=accelerator finds.")
_PART = flags.DEFINE_string("part", None, "Only this part of --suite=accelerator, in this process.")
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, f"Config for --suite=step and scaling; {_DEFAULT_CONFIG} if not given."
)
flags.DEFINE_alias("vs-torch", "vs_torch")

# The suites that each flag goes with; the others refuse it.
_FLAGS_OF = {
    "shape": ("layer",),
    "dtype": ("layer",),
    "matmul": ("layer",),
    "methods": ("step",),
    "vs_torch": ("layer",),
    "rounds": ("layer", "step", "scaling"),
    "json": ("layer", "step", "scaling"),
    "plot": ("layer", "scaling"),
    "out": ("accelerator",),
    "part": ("accelerator",),
}


def main(argv: list[str]) -> int:
    suite = _suite(argv)
    if suite in ("step", "scaling"):
        config = cli.parse_config(argv, _CONFIG, _DEFAULT_CONFIG)
    elif cli.config_name(argv, ""):
        raise ConfigError(f"--config goes with --suite=step and --suite=scaling, but --suite is {suite}")
    else:
        config = None
        cli.parse_flags(argv)
    for name, suites in _FLAGS_OF.items():
        if flags.FLAGS[name].present and suite not in suites:
            wanted = " and ".join(f"--suite={other}" for other in suites)
            raise ConfigError(f"--{name} goes with {wanted}, but --suite is {suite}")
    if suite == "accelerator":
        return _accelerator()
    for path in filter(None, (_JSON.value, _PLOT.value)):
        if not Path(path).absolute().parent.is_dir():
            raise ConfigError(f"cannot write {path}: there is no directory {Path(path).absolute().parent}")
    results: list[Row]
    if config is None:
        shapes = [LayerShape.parse(text) for text in _SHAPES.value or ()] or standard_shapes()
        results = layer.run(shapes, _BACKENDS.value, _DTYPE.value, _ROUNDS.value or 15, _VS_TORCH.value)
    elif suite == "step":
        results = step.run(config, _METHODS.value or ["topk", "default"], _ROUNDS.value or 15)
    else:
        results = scaling.run(config, _ROUNDS.value or 5)
    if _JSON.value:
        report.write_json(Path(_JSON.value), suite, results)
    if _PLOT.value:
        {"layer": layer.plot, "scaling": scaling.plot}[suite](results, Path(_PLOT.value))
    return 0


def _accelerator() -> int:
    from default_moe.bench import accelerator

    if not _OUT.value:
        raise ConfigError("--suite=accelerator needs --out=DIR, a new directory for what it finds")
    if _PART.value is None:
        rows = accelerator.run(Path(_OUT.value))
        return 0 if all(row.get("ok", True) and row.get("name") != accelerator.FAILED for row in rows) else 1
    if _PART.value not in accelerator.PARTS:
        raise ConfigError(f"--part is {_PART.value!r}, but must be one of {', '.join(accelerator.PARTS)}")
    accelerator.run_part(_PART.value, Path(_OUT.value))
    return 0


def _suite(argv: list[str]) -> str:
    """The value of --suite, which decides whether there is a config file to read before the flags that change it."""
    values = flags.FlagValues()
    flags.DEFINE_enum(_SUITE.name, _SUITE.default, _SUITES, "", flag_values=values)
    values(argv, known_only=True)
    return str(values[_SUITE.name].value)


if __name__ == "__main__":
    cli.run(main)
