"""Steps that do not fit are refused before anything is made, and memory that runs out later is said in one line."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from default_moe import hardware
from default_moe.bench.candidate import random_batch
from default_moe.config import Config, ModelConfig, MoEConfig, TrainConfig
from default_moe.errors import ConfigError, TrainingFailed
from default_moe.training import memory
from default_moe.training.memory import out_of_memory_in_one_line, step_memory, what_reduces
from default_moe.training.program import Program

CONFIG = Config(
    model=ModelConfig(d_model=16, num_layers=2, num_heads=2),
    moe=MoEConfig(num_experts=4, expert_dim=8),
    train=TrainConfig(batch_size=16, sequence_length=16),
)
ROOT = Path(__file__).parents[2]


def test_a_step_that_does_not_fit_is_refused(monkeypatch):
    program = Program(CONFIG, 257)
    row = jax.tree.map(lambda a: a[:1], random_batch(CONFIG, 257))
    needed = step_memory(program.compile_train_step(row))
    monkeypatch.setattr(memory, "memory_bytes", lambda device: needed.total)
    program.compile_train_step(row)  # just fits
    monkeypatch.setattr(memory, "memory_bytes", lambda device: needed.total - 1)
    with pytest.raises(
        ConfigError, match=r"the training step needs 0\.0 GiB a device .* but a cpu has 0\.0 GiB: "
    ) as e:
        program.compile_train_step(row)
    assert "train.batch_size below 16" in str(e.value) and "\n" not in str(e.value)
    monkeypatch.setattr(memory, "memory_bytes", lambda device: needed.state - 1)
    with pytest.raises(ConfigError, match="a smaller model would need less"):
        program.compile_train_step(row)


def test_the_memory_of_a_step_is_its_state_and_the_rest():
    program = Program(CONFIG, 257, jax.devices()[:1])
    batch = random_batch(CONFIG, 257)
    needed = step_memory(program.compile_train_step(jax.tree.map(lambda a: a[:1], batch)))
    leaves = jax.tree.leaves(jax.tree.map(lambda a: a, program.new_state()))
    state = sum(leaf.nbytes for leaf in leaves if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key))
    assert needed.state == pytest.approx(state + sum(a.nbytes for a in batch.values()), rel=0.01)
    assert needed.temporaries > 0


def temporaries(**train) -> int:
    """Of a float32 step of 4 MoE layers, D 64, 8 experts of 128, whose parameters take 3,717,120 bytes."""
    config = Config(
        model=ModelConfig(d_model=64, num_layers=5, num_heads=2),
        moe=MoEConfig(num_experts=8, expert_dim=128),
        train=TrainConfig(**{"batch_size": 4, "sequence_length": 32, **train}),
    )
    program = Program(config, 257, jax.devices()[:1])
    return step_memory(program.compile_train_step(jax.tree.map(lambda a: a[:1], random_batch(config, 257)))).temporaries


def test_the_memory_of_a_small_step_is_as_recorded_and_accumulation_adds_next_to_nothing():
    """Three times the parameters: the new ones and their moments until they are known to be finite; and activations."""
    recorded = temporaries()
    assert recorded == pytest.approx(12_222_048, rel=0.03)
    assert temporaries(batch_size=8, grad_accum_steps=2) - recorded < 0.1 * 3_717_120


def test_advice_names_only_what_can_be_changed():
    assert what_reduces(CONFIG, 8).startswith(
        "train.grad_accum_steps above 1, train.batch_size below 16, model.remat='full'"
    )
    bare = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, remat="full"),
        train=dataclasses.replace(CONFIG.train, batch_size=1),
        mesh=dataclasses.replace(CONFIG.mesh, data=1, fsdp=-1),
    )
    assert "batch" not in what_reduces(CONFIG, 16)  # each device has one sequence
    assert what_reduces(bare, 1) == "train.logits_per_chunk below 268435456 would need less"


def test_memory_that_runs_out_is_one_line():
    message = "RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.\nmuch more"
    with (
        pytest.raises(
            TrainingFailed, match=r"^out of memory while training \(Out of memory allocating 123 bytes\.\): "
        ) as e,
        out_of_memory_in_one_line(TrainingFailed, "training", CONFIG, 8),
    ):
        raise jax.errors.JaxRuntimeError(message)
    assert "\n" not in str(e.value)
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"),
        out_of_memory_in_one_line(TrainingFailed, "training", CONFIG, 8),
    ):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
    with (
        pytest.raises(TrainingFailed, match=r"\(no details\)"),
        out_of_memory_in_one_line(TrainingFailed, "training", CONFIG, 8),
    ):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")


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


@pytest.mark.parametrize(
    "before,after",
    [(None, "glibc.malloc.hugetlb=1"), ("a.b=2", "a.b=2:glibc.malloc.hugetlb=1")]
    + [(off, off) for off in ("glibc.malloc.hugetlb=0", "a.b=2:glibc.malloc.hugetlb=0")],
)
@pytest.mark.parametrize("as_module", [False, True])
def test_a_program_starts_again_with_huge_pages_once(tmp_path, before, after, as_module):
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    environment |= {"PYTHONPATH": f"{ROOT}:{tmp_path}"} | ({"GLIBC_TUNABLES": before} if before else {})
    command = [sys.executable, *(["-m", "program"] if as_module else [str(tmp_path / "program.py")]), "--x=a b"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (3, f"{after} ['--x=a b']\n"), done.stderr


@pytest.mark.parametrize("launcher", [["-m", "pdb", "-c", "continue"], ["-m", "cProfile"], ["-"]], ids=" ".join)
def test_what_runs_the_program_for_itself_is_left_alone(tmp_path, launcher):
    """A debugger or a profiler would start anew, and standard input has been read already."""
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | {"PYTHONPATH": str(ROOT)}
    program = [] if launcher == ["-"] else [str(tmp_path / "program.py")]
    command = [sys.executable, *launcher, *program]
    done = subprocess.run(command, input=PROGRAM, capture_output=True, text=True, env=environment)
    assert "None []" in done.stdout, done.stderr
