"""Models from and to Hugging Face's folders: `python -m default_moe.convert import --model=OLMoE --workdir=runs/olmoe`.

import: read a model (config.json, tokenizer.json, safetensors) into a new work directory, which eval.py and
--config.init_from take. export: write a checkpoint of --workdir to --out. upcycle: make a Mixture-of-Experts of a dense
model, that in --model or that of --workdir, in the new work directory --out.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from default_moe import cli
from default_moe.config import Config
from default_moe.convert.checkpoints import read_checkpoint
from default_moe.convert.exporting import DTYPES, export_model
from default_moe.convert.importing import import_model, read_model
from default_moe.convert.upcycling import Upcycling, check_dense, upcycle
from default_moe.errors import ConfigError, check, quoted
from default_moe.runs.progress import Progress

_OF_UPCYCLE = [field.name for field in dataclasses.fields(Upcycling)]
# What each needs, and what does not go with it.
_FLAGS_OF: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "import": (("model", "workdir"), ("out", "step", "dtype", *_OF_UPCYCLE)),
    "export": (("workdir", "out"), ("model", *_OF_UPCYCLE)),
    "upcycle": (("out",), ("dtype",)),
}
_MODEL = flags.DEFINE_string("model", None, "Folder of the model to import or upcycle.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Work directory: a new one to import to, that of a run to export or upcycle."
)
_OUT = flags.DEFINE_string("out", None, "New folder to export to; new work directory of what is upcycled.")
_STEP = flags.DEFINE_integer("step", None, "Step to export or upcycle; the newest if not given.", 0, 2**31 - 1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", list(DTYPES), "What exported tensors are kept in.")
flags.DEFINE_integer("num_experts", Upcycling.num_experts, "Experts of each layer that is upcycled.", 1, 2**16)
flags.DEFINE_integer("top_k", Upcycling.top_k, "How many of these each token runs.", 1, 2**16)
flags.DEFINE_float("noise", Upcycling.noise, "Noise on each expert's weights, as a part of their standard deviation.")
flags.DEFINE_float("redraw", Upcycling.redraw, "Share of each expert's hidden units whose weights are drawn anew.")
flags.DEFINE_integer("seed", Upcycling.seed, "Seed of what is drawn.", 0, 2**32 - 1)


def main(argv: list[str]) -> int:
    kinds = [arg for arg in argv[1:2] if not arg.startswith("-")]
    cli.parse_flags([argv[0], *argv[1 + len(kinds) :]])
    if not kinds or kinds[0] not in _FLAGS_OF:
        asked = f"there is no {quoted(kinds[0])}" if kinds else "what to do is not said"
        raise ConfigError(f"{asked}: python -m default_moe.convert import, export or upcycle")
    needed, foreign = _FLAGS_OF[kinds[0]]
    for name in needed:
        check(bool(flags.FLAGS[name].value), f"--{name} is missing: {flags.FLAGS[name].help}")
    for name in foreign:
        check(not flags.FLAGS[name].present, f"--{name} does not go with {kinds[0]}")
    say = Progress(0).message
    if kinds[0] == "import":
        say(_made(import_model(cli.path(_MODEL), cli.path(_WORKDIR)), cli.path(_WORKDIR)))
    elif kinds[0] == "upcycle":
        check(bool(_MODEL.value) != bool(_WORKDIR.value), "give upcycle either --model or --workdir")
        check(_STEP.value is None or not _MODEL.value, "--step does not go with --model")
        values: dict[str, Any] = {name: flags.FLAGS[name].value for name in _OF_UPCYCLE}
        how = Upcycling(**values)
        if _MODEL.value:
            dense = read_model(cli.path(_MODEL), check_dense)
        else:
            dense, _ = read_checkpoint(cli.path(_WORKDIR), _STEP.value, check_dense)
        say(_made(upcycle(dense, cli.path(_OUT), how), cli.path(_OUT)))
    else:
        family, why = export_model(cli.path(_WORKDIR), cli.path(_OUT), _STEP.value, _DTYPE.value)
        say(f"written to {cli.path(_OUT)}, as {family.architecture}{why and f', with code of its own: {why}'}")
    return 0


def _made(config: Config, workdir: Path) -> str:
    moe = config.moe
    experts = f"{moe.num_experts} experts, {moe.top_k} for each token" if config.model.num_moe_layers else "no experts"
    return (
        f"{workdir}: {config.model.num_layers} layers, {experts}; evaluate it with eval.py --workdir={workdir}, or "
        f"train on from it with --config.init_from={workdir}"
    )


if __name__ == "__main__":
    cli.run(main)
