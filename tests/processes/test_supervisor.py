"""A process whose place another takes when it crashes: `go_on_in_children`."""

import signal
import subprocess
import sys
import textwrap
import time

import pytest
from helpers.tiny_runs import REPOSITORY

BEGIN = """
import os, signal, sys, time
from pathlib import Path
from default_moe.processes.supervisor import go_on_in_children
folder = Path(sys.argv[1])
"""
GO_ON = "go_on_in_children(lambda: set(folder.iterdir()))\n"


@pytest.fixture
def start(tmp_path):
    """A function that starts a program which goes on in children; they leave files in a folder, their progress."""
    (tmp_path / "progress").mkdir()

    def start_program(then: str, before: str = "") -> subprocess.Popen:
        path = tmp_path / "program.py"
        path.write_text(BEGIN + textwrap.dedent(before) + GO_ON + textwrap.dedent(then))
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        env = {"PYTHONPATH": str(REPOSITORY)}
        return subprocess.Popen([sys.executable, path, tmp_path / "progress"], env=env, **pipes)

    return start_program


def test_another_goes_on_where_one_crashed(start, tmp_path):
    program = start("""
        done = len(list(folder.iterdir()))
        print("begins at", done)
        (folder / str(done)).touch()
        sys.stdout.flush()
        os.kill(os.getpid(), (signal.SIGSEGV, signal.SIGKILL)[done]) if done < 2 else sys.exit(7)
    """)
    out, err = program.communicate(timeout=60)
    assert (program.returncode, out) == (7, "begins at 0\nbegins at 1\nbegins at 2\n")
    assert err.splitlines() == [f"the process was ended by {name}: another goes on" for name in ("SIGSEGV", "SIGKILL")]


def test_one_that_got_no_further_is_the_last(start):
    program = start("""
        print("begins", flush=True)
        (folder / "one").touch()
        os.kill(os.getpid(), signal.SIGABRT)
    """)
    out, err = program.communicate(timeout=60)
    assert (program.returncode, out) == (1, "begins\nbegins\n")
    assert err.splitlines()[-1] == "error: the process was ended by SIGABRT"


@pytest.mark.parametrize("obeys", [True, False])
def test_a_signal_reaches_the_child_and_no_other_follows(start, obeys, tmp_path):
    program = start(f"""
        def end(number, frame):
            os.write(1, b"told\\n")
            (folder / "further").touch()
            sys.exit(128 + number) if {obeys} else os.kill(os.getpid(), signal.SIGKILL)

        signal.signal(signal.SIGTERM, end)
        print("ready", flush=True)
        while True:  # a signal that comes just before a long sleep would be seen after it
            time.sleep(0.01)
    """)
    assert program.stdout.readline() == "ready\n"
    program.send_signal(signal.SIGTERM)
    out, err = program.communicate(timeout=60)
    assert (program.returncode, out) == (143 if obeys else 1, "told\n")
    assert err == ("" if obeys else "error: the process was ended by SIGKILL\n")


def test_a_signal_does_not_wait_until_the_child_ends(start):
    """Whichever thread takes it. No handler of Python's runs while the main thread is in a call that waits."""
    program = start(
        """
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
        (folder / "ready").touch()
        while True:
            time.sleep(0.01)
        """,
        before="""
        import threading
        def tell_itself():
            while not (folder / "ready").exists():
                time.sleep(0.01)
            time.sleep(0.2)
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        threading.Thread(target=tell_itself, daemon=True).start()
        """,
    )
    program.communicate(timeout=60)
    assert program.returncode == 5


def test_the_end_of_the_child_is_seen_whatever_was_blocked_before(start):
    program = start("sys.exit(3)", before="signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])\n")
    program.communicate(timeout=60)
    assert program.returncode == 3


def test_ctrl_z_stops_both_and_both_go_on(start, tmp_path):
    program = start("""
        print("ready", flush=True)
        for turn in range(100_000):
            (folder / "turns").write_text(str(turn))
            time.sleep(0.01)
            if (folder / "enough").exists():
                sys.exit(3)
    """)
    assert program.stdout.readline() == "ready\n"
    time.sleep(0.2)

    def turns():
        return (tmp_path / "progress" / "turns").read_text()

    program.send_signal(signal.SIGTSTP)
    time.sleep(0.3)
    before = turns()
    time.sleep(0.3)
    assert turns() == before
    program.send_signal(signal.SIGCONT)
    (tmp_path / "progress" / "enough").touch()
    program.communicate(timeout=60)
    assert program.returncode == 3


def test_the_child_does_not_outlive_its_parent(start, tmp_path):
    program = start("""
        print("ready", flush=True)
        time.sleep(2)
        (folder / "alive").touch()
    """)
    assert program.stdout.readline() == "ready\n"
    program.kill()
    program.communicate(timeout=60)
    time.sleep(3)
    assert not list((tmp_path / "progress").iterdir())
