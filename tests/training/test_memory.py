"""Steps that do not fit are refused before anything is made, and memory that runs out later is said in one line."""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from helpers.refusals import refused

from default_moe import hardware
from default_moe.bench.candidate import random_batch
from default_moe.config import Config, ModelConfig, MoEConfig, TrainConfig
from default_moe.errors import TrainingFailed
from default_moe.training import memory
from default_moe.training.memory import out_of_memory_in_one_line, step_memory, what_reduces
from default_moe.training.program import Program

CONFIG = Config(
    model=ModelConfig(d_model=64, num_layers=5, num_heads=2),
    moe=MoEConfig(num_experts=8, expert_dim=128),
    train=TrainConfig(batch_size=4, sequence_length=32),
)
ACCUMULATED = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, batch_size=8, grad_accum_steps=2))
PARAMETER_BYTES = 3_717_120  # of 4 MoE layers and a dense one, in float32
ROOT = Path(__file__).parents[2]


@functools.cache
def program_of(config: Config) -> Program:
    return Program(config, 257, jax.devices()[:1])


def compiled(config: Config):
    """The step of the config's one program, compiled once."""
    return program_of(config).compile_train_step(jax.tree.map(lambda a: a[:1], random_batch(config, 257)))


def test_a_step_that_does_not_fit_is_refused(monkeypatch):
    needed = step_memory(compiled(CONFIG))
    monkeypatch.setattr(memory, "memory_bytes", lambda device: needed.total)
    compiled(CONFIG)  # just fits
    monkeypatch.setattr(memory, "memory_bytes", lambda device: needed.total - 1)
    with refused(r"the training step needs 0\.0 GiB a device .* but a cpu has 0\.0 GiB: .*train\.batch_size below 4"):
        compiled(CONFIG)
    monkeypatch.setattr(memory, "memory_bytes", lambda device: needed.state - 1)
    with refused("a smaller model would need less"):
        compiled(CONFIG)


def test_the_memory_of_a_step_is_its_state_and_the_rest():
    """The rest is three times the parameters: the new ones and their moments until they are known to be finite; and
    activations. Accumulation adds next to nothing."""
    needed = step_memory(compiled(CONFIG))
    arrays = [a for a in jax.tree.leaves(program_of(CONFIG).abstract_state) if a.dtype != jax.random.key(0).dtype]
    state = sum(a.size * a.dtype.itemsize for a in arrays)
    batch = sum(a.nbytes for a in random_batch(CONFIG, 257).values())
    assert needed.state == pytest.approx(state + batch, rel=0.01)
    assert needed.temporaries == pytest.approx(12_222_048, rel=0.03)
    assert step_memory(compiled(ACCUMULATED)).temporaries - needed.temporaries < 0.1 * PARAMETER_BYTES


def test_advice_names_only_what_can_be_changed():
    assert what_reduces(CONFIG, 2).startswith(
        "train.grad_accum_steps above 1, train.batch_size below 4, model.remat='full'"
    )
    bare = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, remat="full"),
        train=dataclasses.replace(CONFIG.train, batch_size=1),
        mesh=dataclasses.replace(CONFIG.mesh, data=1, fsdp=-1),
    )
    assert "batch" not in what_reduces(CONFIG, 4)  # each device has one sequence
    assert what_reduces(bare, 1) == "train.logits_per_chunk below 268435456 would need less"
    of_evaluation = what_reduces(CONFIG, 2, evaluation=True)
    assert of_evaluation.startswith("eval.batch_size below 4, mesh.data=1") and "train.batch_size" not in of_evaluation


@pytest.mark.parametrize(
    ("message", "error", "pattern"),
    [
        (
            "RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.\nmuch more",
            TrainingFailed,
            r"^out of memory while training \(Out of memory allocating 123 bytes\.\): ",
        ),
        ("RESOURCE_EXHAUSTED", TrainingFailed, r"\(no details\)"),
        ("INTERNAL: something else", jax.errors.JaxRuntimeError, "INTERNAL"),
    ],
)
def test_memory_that_runs_out_is_one_line(message, error, pattern):
    with refused(pattern, error), out_of_memory_in_one_line(TrainingFailed, "training", CONFIG, 8):
        raise jax.errors.JaxRuntimeError(message)


def test_the_hosts_memory_is_shared_by_its_simulated_devices():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = hardware.memory_bytes(jax.devices()[0])
    assert found is not None and 2**20 < found <= total // 8


PROGRAM = """
import os, sys
from default_moe import cli
from default_moe.processes import huge_pages
huge_pages._would_help = lambda: True
def main(argv):
    print(os.environ.get("GLIBC_TUNABLES"), argv[1:])
    return 3
if __name__ == "__main__":
    cli.run(main)
"""


ON, OFF = "glibc.malloc.hugetlb=1", "glibc.malloc.hugetlb=0"


def run_program(folder, arguments, before=None):
    """Runs PROGRAM, written to the folder, where GLIBC_TUNABLES is `before`."""
    (folder / "program.py").write_text(PROGRAM)
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    environment |= {"PYTHONPATH": f"{ROOT}:{folder}"} | ({"GLIBC_TUNABLES": before} if before else {})
    command = [sys.executable, *arguments]
    return subprocess.run(command, input=PROGRAM, capture_output=True, text=True, env=environment, cwd=folder)


@pytest.mark.parametrize(
    ("command", "before", "after"),
    [
        (["program.py"], None, ON),
        (["-m", "program"], None, ON),
        (["program.py"], "a.b=2", f"a.b=2:{ON}"),
        (["program.py"], OFF, OFF),
        (["-m", "program"], f"a.b=2:{OFF}", f"a.b=2:{OFF}"),
    ],
)
def test_a_program_starts_again_with_huge_pages_once(tmp_path, command, before, after):
    done = run_program(tmp_path, [*command, "--x=a b"], before)
    assert (done.returncode, done.stdout) == (3, f"{after} ['--x=a b']\n"), done.stderr


@pytest.mark.parametrize("launcher", [["-m", "pdb", "-c", "continue"], ["-m", "cProfile"], ["-"]], ids=" ".join)
def test_what_runs_the_program_for_itself_is_left_alone(tmp_path, launcher):
    """A debugger or a profiler would start anew, and standard input has been read already."""
    program = [] if launcher == ["-"] else ["program.py"]
    done = run_program(tmp_path, [*launcher, *program])
    assert "None []" in done.stdout, done.stderr
