"""Models from and to Hugging Face's folders: `python -m default_moe.convert import --model=OLMoE --workdir=runs/olmoe`.

import: read an OLMoE, Qwen3-MoE or Mixtral (config.json, tokenizer.json, safetensors) into a new work directory, which
eval.py and --config.init_from take. export: write a checkpoint of --workdir to --out, as one of these.
"""

from absl import flags

from default_moe import cli
from default_moe.convert.exporting import DTYPES, export_model
from default_moe.convert.importing import import_model
from default_moe.errors import ConfigError, check, quoted
from default_moe.runs.progress import Progress

# What each needs, and what does not go with it.
_FLAGS_OF = {"import": (("model", "workdir"), ("out", "step", "dtype")), "export": (("workdir", "out"), ("model",))}
_MODEL = flags.DEFINE_string("model", None, "Folder of the model to import.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Work directory: a new one to import to, that of a run to export.")
_OUT = flags.DEFINE_string("out", None, "New folder to export to.")
_STEP = flags.DEFINE_integer("step", None, "Step to export; the newest if not given.", 0, 2**31 - 1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", list(DTYPES), "What exported tensors are kept in.")


def main(argv: list[str]) -> int:
    kinds = [arg for arg in argv[1:2] if not arg.startswith("-")]
    cli.parse_flags([argv[0], *argv[1 + len(kinds) :]])
    if not kinds or kinds[0] not in _FLAGS_OF:
        asked = f"there is no {quoted(kinds[0])}" if kinds else "what to do is not said"
        raise ConfigError(f"{asked}: python -m default_moe.convert import or export")
    needed, foreign = _FLAGS_OF[kinds[0]]
    for name in needed:
        check(bool(flags.FLAGS[name].value), f"--{name} is missing: {flags.FLAGS[name].help}")
    for name in foreign:
        check(not flags.FLAGS[name].present, f"--{name} does not go with {kinds[0]}")
    say = Progress(0).message
    workdir = cli.path(_WORKDIR)
    if kinds[0] == "import":
        config = import_model(cli.path(_MODEL), workdir)
        model, moe = config.model, config.moe
        say(
            f"{workdir}: {model.num_layers} layers, {moe.num_experts} experts, {moe.top_k} for each token; evaluate it "
            f"with eval.py --workdir={workdir}, or train on from it with --config.init_from={workdir}"
        )
    else:
        family, why = export_model(workdir, cli.path(_OUT), _STEP.value, _DTYPE.value)
        say(f"written to {cli.path(_OUT)}, as {family.architecture}{why and f', with code of its own: {why}'}")
    return 0


if __name__ == "__main__":
    cli.run(main)
