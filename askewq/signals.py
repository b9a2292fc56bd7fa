"""SIGTERM and Ctrl-C: noted when they come, obeyed where nothing is half done.

A scheduler that ends a job and a person at the keyboard want the same thing: what was computed on
the disk, soon, and the process gone. So the first signal is only noted, and the run stops at its
next safe point (`processes.check_signals`). A second one, more than `ECHO` seconds later, ends the
process at once; what is on the disk is whole at any moment.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A launcher passes on a Ctrl-C that the terminal has sent to its children, too.
ECHO = 2.0

_noted: tuple[int, float] | None = None


class Stop(Exception):  # noqa: N818  # no error: a request
    """A signal that was noted; `number` says which."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def listening() -> Iterator[None]:
    """Within the block the two signals are noted instead of ending the process."""
    global _noted
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may receive signals; elsewhere they keep their meaning
        return
    before = [(number, signal.getsignal(number)) for number in SIGNALS]
    _noted = None
    for number in SIGNALS:
        signal.signal(number, _note)
    try:
        yield
    finally:
        _noted = None
        for number, handler in before:
            signal.signal(number, handler)


@contextmanager
def ending() -> Iterator[None]:
    """Within the block SIGTERM ends the process by an exception, so that what it began is undone.

    A process that handles or ignores it goes on to do that.

    Raises:
        SystemExit: of 143, as the shell knows it.
    """
    ends = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not ends or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def leave_to_main(_worker: int = 0) -> None:
    """In a loader's worker: obey no signal but one of the main process.

    A terminal, `timeout` and a scheduler signal all processes of a job, and the main process still
    needs batches until its step is done. On macOS, which does not tell who sent a signal, SIGTERM
    ends the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main = multiprocessing.parent_process()  # which a server may have forked this one for
    if main is not None and hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_by, args=(main.pid,), daemon=True).start()


def _end_by(main: int | None) -> None:
    """Wait for a SIGTERM of the main process, and end this one."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main:
        pass
    os._exit(0)  # of another number torch would tell the main process, as it ends, by a traceback


def _note(number: int, _: FrameType | None) -> None:
    global _noted
    now = time.monotonic()
    if _noted is None:
        _noted = number, now
    elif now - _noted[1] > ECHO:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def received() -> int:
    """Return the number of the signal that was noted, 0 for none."""
    return 0 if _noted is None else _noted[0]
