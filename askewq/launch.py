"""`askewq finetune --num-processes N`: the same run by Accelerate's own launcher.

What `accelerate launch --num_processes N -m askewq finetune ...` does, with the defaults of the
machine: one process a GPU, or gloo where there is none. The launcher's process trains nothing; it
ends with the exit code of the process that failed first.
"""

import logging
import os
import signal
from typing import Any

from askewq.errors import RecipeError, StoppedError
from askewq.processes import STARTED, is_on


def wanted(count: int | None) -> bool:
    """Tell whether a launcher must be started.

    Raises:
        RecipeError: a number that is not possible here.
    """
    if count is None or os.environ.get(STARTED):
        return False
    if count < 1:
        raise RecipeError(f"--num-processes {count}: it must be at least 1; leave it out for one.")
    if "LOCAL_RANK" in os.environ:
        raise RecipeError(
            f"--num-processes {count} starts processes, and a launcher has started this one "
            f"already (process {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')}); leave "
            "it out, the launcher has a setting of its own."
        )
    if count == 1:
        return False
    import torch

    gpus = torch.cuda.device_count()
    if gpus and count > gpus and not is_on("ACCELERATE_USE_CPU"):
        raise RecipeError(
            f"--num-processes {count}: each process needs a GPU of its own, and there are {gpus}; "
            f"pass at most {gpus}, or set ACCELERATE_USE_CPU=true to train on the CPU."
        )
    return True


def words_of(flags: dict[str, Any]) -> list[str]:
    """Return the command line that gives these flags again."""
    words = []
    for key, value in flags.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, tuple | list):
            words += [f"--{name}={item}" for item in value]
        else:
            words.append(f"--{name}={value}")
    return words


def launch(count: int, words: list[str]) -> int:
    """Run `askewq WORDS` in some processes and return the exit code of the first that failed.

    Raises:
        StoppedError: a signal ended a process without its having a say.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = ["--num_processes", str(count), "--num_machines", "1", "--main_process_port", "0"]
    # On the CPU, too, this is the flag by which Accelerate starts more than one process.
    options += ["--multi_gpu", "--mixed_precision", "no", "--dynamo_backend", "no", "--module"]
    arguments = launch_command_parser().parse_args([*options, "askewq", *words])
    os.environ[STARTED] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    # The processes say themselves what went wrong.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch_command(arguments)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return _code(failure.exitcode)
    except SignalException as stop:
        return 128 + int(stop.sigval)
    finally:
        del os.environ[STARTED]
    return 0


def _code(code: int) -> int:
    """Return a process' exit code.

    Raises:
        StoppedError: a signal ended it, so that it could not say anything itself.
    """
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    raise StoppedError(
        f"a process was ended by {name}, and the others with it. SIGKILL is what a machine without "
        "memory left sends: try a smaller --batch-size, or fewer processes.",
        -code,
    )
