"""Eight simulated CPU devices for every test, set before JAX starts its backend."""

import gc
import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path

# Tests compile far more than they compute. Without LLVM's optimisation (XLA's own stays) that takes a quarter of the
# time, and less than half of it again with the simpler of two code generators for fusions and no LLVM module split for
# threads, which have no cores left beside the other test processes. Child processes inherit it.
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_cpu_parallel_codegen_split_count=1",
        # XLA ends the process on a flag that it does not know, as in other versions.
        "--xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jax").startswith("0.10.") else "",
    )
)

# Programs that tests start would start themselves again for it.
os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"

# What one test compiles is there for all that need the same program: test processes and children inherit the folder.
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get(
    "JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"default_moe_tests_{os.getpid()}")
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)


def pytest_sessionstart() -> None:
    devices = jax.devices()
    if len(devices) != 8:
        raise RuntimeError(f"the tests need 8 simulated CPU devices, but JAX has {devices}")
    # Traced programs are millions of objects that stay: looking through them for cycles takes a tenth of the time.
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


# What takes longest, the slowest files first: tests whose names start with one of these are marked `slow`.
SLOW = {
    "test_kill_and_resume": ("test_",),
    "test_many_processes": ("test_",),
    "test_method_training": ("test_what_a_method_keeps", "test_layers_"),
    "test_astray": ("test_a_run_whose_", "test_a_work_directory_", "test_a_start_", "test_a_run_that_never_"),
    "test_bad_places": ("test_a_run_that_", "test_an_evaluation_", "test_folders_"),
    "test_analysis": ("test_the_", "test_methods_are_", "test_default_vectors_are_", "test_losses_", "test_out_of_"),
    "test_compare_runs": ("test_",),
    "test_layer_order_runs": ("test_",),
    "test_optimizer": ("test_what_is_kept_",),
    "test_runs": ("test_a_run_whose_", "test_a_run_that_", "test_a_full_disk_", "test_evaluation_of_", "test_greedy_"),
    "test_writers": ("test_a_run_",),
    "test_profiling": ("test_steps_",),
    "test_mesh_training": ("test_losses_", "test_accumulation_", "test_state_"),
    "test_accelerator_bench": ("test_every_part_", "test_the_training_part_", "test_the_report_", "test_results_are_"),
    "test_fine_tuning": ("test_",),
    "test_convert": ("test_an_imported_",),
    "test_upcycling": ("test_it_computes_",),
    "test_memory": ("test_the_memory_", "test_a_program_starts_", "test_what_runs_the_program_"),
    "test_train_step": ("test_accumulated_", "test_default_vectors_are_", "test_backward_"),
    "test_methods": ("test_every_method_equals_the_loops_on_a_mesh", "test_random_numbers_"),
    "test_moe_variables": ("test_rematerialisation_",),
    "test_exchange": ("test_exchanged_",),
    "test_bench": ("test_the_step_suite_", "test_the_scaling_suite_"),
    "test_architecture": ("test_eight_",),
    "test_model": ("test_the_embedding_learns_", "test_unrolling_"),
    "test_moe_sharded": ("test_",),
    "test_mesh_rules": ("test_what_",),
    "test_plan": ("test_the_state_", "test_the_plan_", "test_the_command", "test_search_", "test_the_largest_"),
    "test_grouped_matmul": ("test_blocks_of_both_sizes_",),
    "test_checkpoint_failures": ("test_a_kill_",),
}


@pytest.hookimpl(tryfirst=True)  # before -m looks for the marker
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The slowest files come first: none of them is what all processes wait for at the end."""
    files = list(SLOW)
    items.sort(key=lambda item: files.index(item.path.stem) if item.path.stem in SLOW else len(files))
    for item in items:
        if item.name.startswith(SLOW.get(item.path.stem, ())):
            item.add_marker("slow")
    for name in ("tpu", "hf", "browser", "campaign"):  # another environment, an hour: only who asks for it gets it
        if name not in config.getoption("markexpr"):
            left_out = [item for item in items if item.get_closest_marker(name)]
            items[:] = [item for item in items if item not in left_out]
            config.hook.pytest_deselected(items=left_out)


def pytest_unconfigure() -> None:
    cache = os.environ["JAX_COMPILATION_CACHE_DIR"]
    if cache.endswith(f"_{os.getpid()}"):  # made by this process
        shutil.rmtree(cache, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def compiled_code_is_let_go():
    """A process on Linux may map 65,530 pieces of memory, and then crashes: all tests together map more."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 15_000:
        jax.clear_caches()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory for runs, with texts in `text`."""
    from helpers.tiny_runs import write_corpus

    folder = tmp_path_factory.mktemp("runs")
    write_corpus(folder / "text")
    return folder


@pytest.fixture
def tokamax_everywhere(monkeypatch):
    """Everything about that backend but its kernels, in the place of which `jax.lax.ragged_dot` computes on a CPU."""

    from default_moe.moe.experts import backends

    monkeypatch.setattr(backends, "_tokamax_runs", lambda: True)
