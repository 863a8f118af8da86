"""A profile of some steps: written where it is asked for, and nothing of the run changes."""

import gzip
import json
import os
import signal
import time

import pytest
from helpers.tiny_runs import assert_same_state, at_step, metrics, tiny_config, trained

from default_moe.config import TrainConfig
from default_moe.runs.profiling import Profiler


@pytest.fixture(scope="module")
def plain(folder):
    trained(tiny_config(folder), folder / "plain")
    return folder / "plain"


def profiled(workdir):
    """The numbers of the steps in each profile, the oldest first."""
    found = []
    for profile in sorted(workdir.glob("profile/plugins/profile/*")):
        assert list(profile.glob("*.xplane.pb"))
        events = json.loads(gzip.decompress((profile / "perfetto_trace.json.gz").read_bytes()))["traceEvents"]
        found.append(sorted(int(event["args"]["step_num"]) for event in events if event.get("name") == "train"))
    return found


def test_the_end_is_not_profiled():
    assert TrainConfig(profile_steps="10:13").profiled == range(10, 13)
    assert TrainConfig(profile_steps="399:500").profiled == range(399, 401)
    assert not TrainConfig().profiled


def test_steps_are_profiled_and_the_run_stays_the_same(folder, plain, tmp_path, monkeypatch):
    """Stopped among them, the run continues: each start has a profile of the steps that it does."""
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        trained(tiny_config(folder, train={"profile_steps": "3:5"}), tmp_path)
    assert profiled(tmp_path) == [[3]]
    time.sleep(1.1)  # a profile's folder is named by the second
    output = trained(tiny_config(folder, train={"profile_steps": "3:6"}), tmp_path)
    assert "changed since the last start: train.profile_steps was 3:5, is now 3:6\n" in output
    assert profiled(tmp_path) == [[3], [4, 5]]
    (line,) = (line for line in output.splitlines() if line.startswith("profile of the steps from "))
    newest = max(tmp_path.glob("profile/plugins/profile/*"))
    assert line.startswith(f"profile of the steps from 4 on: open {newest / 'perfetto_trace.json.gz'} on https://")
    assert f"--logdir={tmp_path / 'profile'}`" in line
    assert output.index("step 5/40") < output.index(line) < output.index("step 6/40")
    assert metrics(tmp_path) == metrics(plain)
    assert_same_state(tmp_path, plain, 40)


def test_a_run_that_fails_leaves_its_profile_and_the_next_can_make_one(tmp_path):
    said = []
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), Profiler(range(7, 9), tmp_path / "profile", said.append) as profiler:
            assert not profiler.begins(6) and profiler.begins(8)
            profiler.start(8, None)
            assert (
                not profiler.begins(8)
                and not profiler.ends(7, False)
                and profiler.ends(7, True)
                and profiler.ends(8, False)
            )
            raise ZeroDivisionError
    assert len(said) == 2 and all(line.startswith("profile of the steps from 8 on") for line in said)


def test_a_profile_that_cannot_be_written_ends_nothing(tmp_path):
    (tmp_path / "profile").write_text("in the way")
    said = []
    with Profiler(range(7, 9), tmp_path / "profile", said.append) as profiler:
        profiler.start(7, None)
        assert not profiler.begins(8) and not profiler.ends(8, True)
    (line,) = said
    assert line == f"the profile cannot be written (File exists: {tmp_path}/profile): training continues without it"
