"""Signals that ask a run to stop."""

import os
import signal

import pytest

from default_moe.processes.stopping import StopRequest


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 0), (signal.SIGHUP, 0), (signal.SIGUSR1, 0), (signal.SIGINT, 130)]
)
def test_a_signal_is_noted_and_the_run_goes_on_to_save(capsys, number, code):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.received()
        os.kill(os.getpid(), number)
        assert stop.received() and stop.requested
    assert stop.exit_code == code
    assert capsys.readouterr().err.startswith(f"{number.name} received")
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_interrupts():
    with StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.received()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_is_noted_where_nothing_can_be_printed(monkeypatch):
    """`2>&1 | tee log`, and Ctrl-C: tee is gone first."""

    def fail(*_args, **_options):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("builtins.print", fail)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received()
