"""Processes that train together: real ones, over gloo, forked from the one that runs the tests.

Forked, because each would spend ten seconds on importing what pytest's process has imported.
"""

import faulthandler
import gc
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import builders
import torch
from accelerate.state import AcceleratorState
from builders import Outcome

# Longer than anything takes here; a process that is still there then hangs.
PATIENCE = 90.0
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP",
    "FSDP_MIN_NUM_PARAMS": "100",
}


def together(
    count: int,
    body: Callable[[int], object],
    folder: Path,
    *,
    stop_after: Callable[[list[int]], object] | None = None,
    **environment: str,
) -> list[Outcome]:
    """Run `body(process)` in some processes that a launcher would start, and wait for all.

    Args:
        folder: for what they print.
        stop_after: is called with their ids once they run.
        environment: more variables, as the launcher's config sets them.
    """
    builders._freeze()
    # The launcher's own store, which outlives its processes.
    store = torch.distributed.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30)
    )
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "GLOO_SOCKET_IFNAME": next(name for _, name in socket.if_nameindex() if name[:2] == "lo"),
        **environment,
    }
    ids = []
    for process in range(count):
        pid = os.fork()
        if pid == 0:
            _child(process, body, folder, shared)
        ids.append(pid)
    if stop_after is not None:
        stop_after(ids)
    codes = _wait(ids)
    texts = [
        [(folder / f"{p}.{kind}").read_text() for kind in ("out", "err")] for p in range(count)
    ]
    return [Outcome(code, *text) for code, text in zip(codes, texts, strict=True)]


def _child(
    process: int, body: Callable[[int], object], folder: Path, shared: dict[str, str]
) -> None:
    code = 70
    try:
        for number, kind in ((1, "out"), (2, "err")):
            file = os.open(folder / f"{process}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
        os.environ |= {**shared, "RANK": str(process), "LOCAL_RANK": str(process)}
        faulthandler.dump_traceback_later(PATIENCE - 5)  # where one hangs that will be killed
        gc.freeze()  # the destructor of what was inherited may wait for a thread that was not
        warnings.resetwarnings()
        AcceleratorState._reset_state(reset_partial_state=True)  # pytest's process is alone
        body(process)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001  # whatever it is ends the process
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # neither cleans up nor runs what the parent registered


def _wait(ids: list[int]) -> list[int]:
    codes: dict[int, int] = {}
    end = time.monotonic() + PATIENCE
    while len(codes) < len(ids):
        for pid in set(ids) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in ids]


def command(*words: Any) -> None:
    """Run the command line in a process of `together`, to its exit."""
    from askewq import cli

    sys.argv = ["askewq", *map(str, words)]
    cli.main()
