"""SIGTERM and Ctrl-C: noted, obeyed at a safe point, and only noted where a run listens."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
from accelerate import Accelerator

from askewq import processes, signals

WAITING = """
import os, time
from askewq import signals
signals.ECHO = 0.2
with signals.listening():
    print("ready", flush=True)
    while not signals.received():
        time.sleep(0.01)
    print("noted", signals.received(), flush=True)
    time.sleep(20)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_obeyed_at_the_next_check(number):
    """The process goes on until the check, which names the signal."""
    alone = Accelerator(cpu=True)
    with signals.listening():
        processes.check_signals(alone)
        os.kill(os.getpid(), number)
        assert signals.received() == number
        with pytest.raises(signals.Stop, match=number.name) as caught:
            processes.check_signals(alone)
    assert caught.value.number == number


def test_handlers_are_put_back():
    """After the block the signals mean what they meant before, and none is noted."""
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    with signals.listening():
        os.kill(os.getpid(), signal.SIGTERM)
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before
    assert not signals.received()


def test_an_echo_is_no_second_wish(monkeypatch):
    """A signal that a launcher passes on within two seconds does not end the process."""
    monkeypatch.setattr(signals, "ECHO", 1000.0)  # however slow this machine is
    with signals.listening():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received() == signal.SIGINT


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_one_ends_the_process_at_once(number):
    """Who asks again, later, is not kept waiting."""
    child = subprocess.Popen([sys.executable, "-c", WAITING], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "ready\n"
    child.send_signal(number)
    assert child.stdout.readline() == f"noted {int(number)}\n"
    time.sleep(0.3)
    child.send_signal(number)
    assert child.wait(timeout=10) == -number
    child.stdout.close()


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda number, _: None])
def test_a_process_that_handles_sigterm_goes_on_to(handler):
    """Ending by an exception is for one that the signal would end."""
    before = signal.signal(signal.SIGTERM, handler)
    try:
        with signals.ending():
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_threads_leave_signals_alone():
    """A run in a thread of a larger program does not touch the program's handlers."""
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
        with signals.listening():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="nobody says who sent a signal")
@pytest.mark.parametrize("start", ["spawn", "forkserver"])
def test_a_worker_obeys_the_main_process_alone(start):
    """A signal to all processes of a job leaves it at work; its own parent may end it.

    With 0, as torch's own workers do: of another number the main process would say that its worker
    exited unexpectedly.
    """
    context = multiprocessing.get_context(start)
    ready = context.Event()
    worker = context.Process(target=_work, args=(ready,), daemon=True)
    worker.start()
    try:
        assert ready.wait(60)
        for number in ("-INT", "-TERM"):
            subprocess.run(["sh", "-c", f"kill {number} {worker.pid}"], check=True)
        worker.join(1)
        assert worker.is_alive()
        worker.terminate()
        worker.join(20)
        assert worker.exitcode == 0
    finally:
        worker.kill()


def _work(ready: Any) -> None:
    signals.leave_to_main()
    ready.set()
    time.sleep(60)
