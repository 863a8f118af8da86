"""How fast this is here: `python -m default_moe.bench --suite=layer`, or one of the others.

layer: the MoE layer, forward and with backward, against a dense feed-forward network of equal active FLOPs.
step: the whole training step of a config, its parts, and Default MoE, or --methods, against plain top-k.
scaling: the step against the number of experts, the depth and the number of tokens.
ceilings: a plain matrix product, and a copy in memory.
products: grouped matrix products by every kernel, as shares of a plain product's speed.
accelerator: all that is worth knowing about one GPU or TPU, within --minutes, written to --out.
"""

from typing import Any

from absl import flags
from ml_collections import config_flags

from default_moe import cli
from default_moe.bench import accelerator, layer, products, report, scaling, step
from default_moe.bench.report import Row
from default_moe.bench.workload import LayerShape, standard_shapes
from default_moe.config import OPTIMIZERS
from default_moe.errors import ConfigError, check, check_choice
from default_moe.methods import METHODS

_DEFAULT_CONFIG = "configs/quickstart.py"
_SUITES = ["layer", "step", "scaling", "ceilings", "products", "accelerator"]
_SUITE = flags.DEFINE_enum("suite", "layer", _SUITES, "What to time.")
_SHAPES = flags.DEFINE_multi_string("shape", None, "T,D,N,K,F for --suite=layer and products; standard ones if none.")
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "Compute type for --suite=layer, ceilings, products."
)
_ROUNDS = flags.DEFINE_integer("rounds", None, "Times that each candidate is timed: 15, for scaling 5.", 1, 10_000)
_BACKENDS = flags.DEFINE_list("matmul", None, "Values of moe.matmul for --suite=layer; all that run here if not given.")
_METHODS = flags.DEFINE_list("methods", None, "Values of moe.router for --suite=step; topk,default if not given.")
_OPTIMIZERS = flags.DEFINE_list(
    "optimizers", None, "Values of optim.name for --suite=step, such as adamw,muon; the config's if not given."
)
_RANDOM = flags.DEFINE_bool("random_tokens", False, "Random tokens for --suite=step, in place of the config's data.")
_PROFILE = flags.DEFINE_string("profile", None, "Folder for JAX's trace of a step of each method, for --suite=step.")
_VS_TORCH = flags.DEFINE_bool("vs_torch", False, "Add torch: to --suite=layer transformers' Mixtral block.")
_JSON = flags.DEFINE_string("json", None, "File to write the results to, with the machine and versions.")
_PLOT = flags.DEFINE_string("plot", None, "Picture (.png) to draw of --suite=layer or scaling.")
_OUT = flags.DEFINE_string("out", None, "New directory for all that --suite=accelerator finds.")
_MINUTES = flags.DEFINE_float("minutes", None, "Longest time for --suite=accelerator: 8 if not given.", 0.1, 600)
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, f"Config for --suite=step and scaling; {_DEFAULT_CONFIG} if not given."
)
flags.DEFINE_alias("vs-torch", "vs_torch")

# The suites that each flag goes with; the others refuse it.
_FLAGS_OF = {
    "shape": ("layer", "products"),
    "dtype": ("layer", "ceilings", "products"),
    "matmul": ("layer",),
    "methods": ("step",),
    "optimizers": ("step",),
    "random_tokens": ("step",),
    "profile": ("step",),
    "vs_torch": ("layer", "products"),
    "rounds": ("layer", "step", "scaling", "ceilings", "products"),
    "json": ("layer", "step", "scaling", "ceilings", "products"),
    "plot": ("layer", "scaling"),
    "out": ("accelerator",),
    "minutes": ("accelerator",),
}


def main(argv: list[str]) -> int:
    suite = _suite(argv)
    config = None
    if suite in ("step", "scaling"):
        config = cli.parse_config(argv, _CONFIG, _DEFAULT_CONFIG, adjust=_without_data)
    elif cli.config_name(argv, ""):
        raise ConfigError(f"--config goes with --suite=step and --suite=scaling, but --suite is {suite}")
    else:
        cli.parse_flags(argv)
    for name, suites in _FLAGS_OF.items():
        if flags.FLAGS[name].present and suite not in suites:
            wanted = " and ".join(f"--suite={other}" for other in suites)
            raise ConfigError(f"--{name} goes with {wanted}, but --suite is {suite}")
    if suite == "accelerator":
        return _accelerator()
    json_file, plot_file = cli.file_to_write(_JSON), cli.file_to_write(_PLOT)
    check(not plot_file or plot_file.suffix == ".png", f"--plot is {plot_file}, but must be a name that ends in .png")
    for method in _METHODS.value or ():
        check_choice("--methods", method, tuple(METHODS))
    for optimizer in _OPTIMIZERS.value or ():
        check_choice("--optimizers", optimizer, OPTIMIZERS)
    profile = str(cli.path(_PROFILE)) if _PROFILE.value else None
    shapes = [LayerShape.parse(text) for text in _SHAPES.value or ()]
    rounds = _ROUNDS.value or (5 if suite == "scaling" else 15)

    def save(rows: list[Row]) -> None:
        if json_file:
            report.write_json(json_file, suite, rows)

    results: list[Row]
    if config and suite == "step":
        methods = _METHODS.value or ["topk", "default"]
        results = step.run(config, methods, rounds, _RANDOM.value, profile, _OPTIMIZERS.value, save)
    elif config:
        results = scaling.run(config, rounds)
    elif suite == "ceilings":
        results = products.ceilings(_DTYPE.value, rounds)
    elif suite == "products":
        results = products.run(shapes, _DTYPE.value, rounds, _VS_TORCH.value, save)
    else:
        results = layer.run(shapes or standard_shapes(), _BACKENDS.value, _DTYPE.value, rounds, _VS_TORCH.value, save)
    save(results)
    if plot_file:
        {"layer": layer.plot, "scaling": scaling.plot}[suite](results, plot_file)
    return 0


def _accelerator() -> int:
    if not _OUT.value:
        raise ConfigError("--suite=accelerator needs --out=DIR, a new directory for what it finds")
    return 0 if accelerator.run(cli.path(_OUT), _MINUTES.value or accelerator.MINUTES) else 1


def _without_data(config_dict: Any) -> None:
    """With random tokens the config's files need not be there."""
    if _RANDOM.value and config_dict.data.name == "text_files" and not config_dict.data.files:
        config_dict.data.files = "*.txt"


def _suite(argv: list[str]) -> str:
    """Return the value of --suite, which decides whether a config file is read before the flags that change it."""
    values = flags.FlagValues()
    flags.DEFINE_enum(_SUITE.name, _SUITE.default, _SUITES, "", flag_values=values)
    values(argv, known_only=True)
    return str(values[_SUITE.name].value)


if __name__ == "__main__":
    cli.run(main, cached=False)  # how long compiling takes is measured too
