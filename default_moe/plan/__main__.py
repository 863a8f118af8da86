"""What a step will take, before renting anything: `python -m default_moe.plan --config=... --topology=v5e:4x4`.

Compiles the very training step of a config for TPUs or GPUs that need not be there, and prints for a device: memory,
operations, exchanges, and an estimate of the step's time. --search tries meshes, microbatches and remat policies.
--kernels compiles our kernels for Hopper GPUs instead, in every way that is worth a trial.
"""

import json
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from default_moe import cli
from default_moe.config import Config, DataConfig
from default_moe.data.tokenizer import open_tokenizer_file, tokenizer_from_dict
from default_moe.errors import ConfigError, check
from default_moe.plan import kernels, report
from default_moe.plan.search import largest_by_proportion, largest_microbatch, search
from default_moe.plan.step_plan import StepPlan, make_plan
from default_moe.plan.topologies import known, open_topology

_DEFAULT_CONFIG = "configs/quickstart.py"
_CONFIG = config_flags.DEFINE_config_file("config", None, f"Config file; {_DEFAULT_CONFIG} if not given.")
_TOPOLOGY = flags.DEFINE_string("topology", None, f"What to compile for: {known()}.")
_LARGEST = flags.DEFINE_bool("largest", False, "Find the largest microbatch that fits by compiling, a few times.")
_SEARCH = flags.DEFINE_bool("search", False, "Try meshes, microbatches and remat policies of the same global batch.")
_COMPILE = flags.DEFINE_integer("compile", 12, "How many candidates --search compiles at most.", 1, 10_000)
_KERNELS = flags.DEFINE_bool("kernels", False, "Compile our kernels for Hopper GPUs, and nothing else.")
_JSON = flags.DEFINE_string("json", None, "File to write the plan to, or the plans that --search found.")


def main(argv: list[str]) -> int:
    config = cli.parse_config(argv, _CONFIG, _DEFAULT_CONFIG, adjust=_without_data)
    if not _TOPOLOGY.value:
        raise ConfigError(f"--topology is missing: what to compile for, one of {known()}")
    check(not (_KERNELS.value and (_SEARCH.value or _LARGEST.value)), "--kernels goes without --search and --largest")
    json_file = cli.file_to_write(_JSON)
    jax.config.update("jax_platforms", "cpu")  # accelerators of this machine stay free
    topology = open_topology(_TOPOLOGY.value)
    if _LARGEST.value and topology.hardware is None:
        raise ConfigError(f"--largest needs a device whose memory is known, which that of {topology.name} is not")
    vocab_size = config.model.vocab_size or _vocab_size(config.data)

    def make(config: Config) -> StepPlan:
        return make_plan(config, vocab_size, topology)

    if _KERNELS.value:
        found = list(kernels.compile_kernels(topology))
        print(kernels.table(found))
        content: Any = [{**one._asdict(), "tiles": one.tiles._asdict()} for one in found]
        success = not any(one.error for one in found)
    elif _SEARCH.value:
        plans = search(config, vocab_size, topology, _COMPILE.value, lambda plan: print(_one_line(plan), flush=True))
        print(_ranking(plans))
        content = [report.as_json(plan) for plan in plans]
        success = bool(plans)
    else:
        plan = make(config)
        print(report.text(plan), flush=True)
        if _LARGEST.value:
            print(_largest_line(largest_microbatch(plan, make)))
        elif (size := largest_by_proportion(plan)) is not None:
            print(f"by proportion about {size} sequences a device fit at a time; --largest finds out by compiling")
        content, success = report.as_json(plan), plan.fits
    if json_file:
        try:
            json_file.write_text(json.dumps(content, indent=1) + "\n")
        except OSError as error:
            raise ConfigError(f"cannot write {json_file}: {error.strerror}") from None
    return 0 if success else 1


def _without_data(config_dict: Any) -> None:
    """No plan depends on the text of a run, which may not be there yet."""
    if config_dict.data.name == "text_files" and not config_dict.data.files:
        config_dict.data.files = "*.txt"


def _vocab_size(config: DataConfig) -> int:
    if config.tokenizer == "bytes":
        return tokenizer_from_dict({"kind": "bytes"}).vocab_size
    if config.tokenizer.startswith("bpe:"):
        return int(config.tokenizer.removeprefix("bpe:"))
    return open_tokenizer_file(Path(config.tokenizer)).vocab_size


def _one_line(plan: StepPlan) -> str:
    settings = [f"mesh.{axis}={size}" for axis, size in plan.program.mesh.shape.items()]
    settings.append(f"model.remat={plan.config.model.remat}")
    settings.append(f"train.grad_accum_steps={plan.config.train.grad_accum_steps}")
    memory = f"{plan.memory.total / 2**30:.1f} GiB" if plan.memory else "too much memory"
    speed = report.speed(plan) if plan.fits else "does not fit"
    return f"{' '.join(f'--config.{setting}' for setting in settings)}: {memory}, {speed}"


def _ranking(plans: list[StepPlan]) -> str:
    if not plans:
        return "\nnothing that was tried fits: more devices, a smaller train.batch_size or more --compile may help"
    lines = [f"{number}. {_one_line(plan)}\n   limited by {report.limit(plan)}" for number, plan in enumerate(plans, 1)]
    return "\n".join(["", "those that fit, the fastest by their estimates first:", *lines])


def _largest_line(plan: StepPlan | None) -> str:
    if plan is None:
        return "largest microbatch: not even one sequence a device fits"
    a_device = plan.sequences_a_device
    return (
        f"largest microbatch that fits: {a_device} sequence{'s' if a_device > 1 else ''} a device, "
        f"{a_device * plan.program.num_batch_shards:,} at a time (train.batch_size / train.grad_accum_steps)"
    )


if __name__ == "__main__":
    cli.run(main, cached=False)  # programs for devices that are not there cannot be read back
