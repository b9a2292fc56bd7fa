"""The processes of a run: Accelerate's, what they agree on, and how all end when one fails.

Accelerate and its launcher decide how many there are and where, and whether DDP or FSDP2 keeps
them together. What askewq cannot do exactly under their settings is refused here, by name. A
process that fails leaves its message in the launcher's store; the others, whose next exchange
breaks, find it there and end with it.
"""

import json
import os
from datetime import timedelta
from typing import Any

from askewq import signals
from askewq.config import Recipe
from askewq.errors import RecipeError

# Tells processes that --num-processes of their own command has started them.
STARTED = "ASKEWQ_LAUNCHED"

_FAILURE = "askewq/failure"


def without_float64() -> bool:
    """Tell whether Accelerate would choose Apple's GPU; scales and figures need float64."""
    import torch

    return torch.backends.mps.is_available()


def plain_accelerator(mixed_precision: str) -> Any:
    """Return the Accelerator of what is no run: an evaluation, or calibration."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # Accelerate keeps the precision of a run before it otherwise
    return Accelerator(cpu=without_float64(), mixed_precision=mixed_precision)


def is_first() -> bool:
    """Tell whether this process is the one that speaks."""
    from accelerate import PartialState

    return PartialState().is_main_process


def accelerator_of(recipe: Recipe) -> Any:
    """Return the Accelerator of a run; here the processes meet.

    Raises:
        RecipeError: settings of the launcher that contradict the recipe, or are not supported.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import (
        DataLoaderConfiguration,
        DistributedType,
        GradientAccumulationPlugin,
        ProjectConfiguration,
    )

    _check_launcher(recipe)
    _check_tracker(recipe)
    # A process may run several recipes; Accelerate keeps the first one's precision otherwise.
    AcceleratorState._reset_state()
    sharded = _sharding()
    made = Accelerator(
        # Accelerate takes several processes without a GPU for that many runs unless it is told.
        cpu=without_float64() or (several() and not torch.accelerator.is_available()),
        mixed_precision=recipe.mixed_precision,
        dynamo_backend="inductor" if recipe.compile else "no",
        fsdp_plugin=sharded,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=recipe.grad_accumulation, sync_with_dataloader=False
        ),
        # The sampler adds the epoch to its seed; no two seeds may have an order in common.
        dataloader_config=DataLoaderConfiguration(
            use_seedable_sampler=True, data_seed=recipe.seed * 2**20
        ),
        log_with=None if recipe.report_to == "none" else recipe.report_to,
        project_config=ProjectConfiguration(
            str(recipe.output), logging_dir=str(recipe.output / "logs")
        ),
    )
    if sharded is not None and made.device.type == "cpu":
        # Accelerate switches FSDP on for GPUs alone, but gloo can do what it needs. Each of the
        # two states is asked now and then, and the second is filled from the first.
        for state in (PartialState(), made.state):
            state.distributed_type = DistributedType.FSDP
        made.state.fsdp_plugin = sharded
    if made.num_processes != _count():
        raise RecipeError(
            f"the launcher started {_count()} processes, and Accelerate connected "
            f"{made.num_processes}; start them by accelerate launch, torchrun or --num-processes."
        )
    if sharded is not None and not is_sharded(made):
        raise RecipeError(
            f"the launcher's config asks for FSDP, and Accelerate makes {made.distributed_type} of "
            "it; FSDP2 needs several processes, on GPUs or the CPU."
        )
    return made


def _check_tracker(recipe: Recipe) -> None:
    """Refuse a tracker that is not installed: Accelerate would go on without it."""
    from accelerate.utils import is_tensorboard_available, is_wandb_available

    there = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
    name = recipe.report_to
    if name != "none" and not there[name]():
        raise RecipeError(
            f"--report-to {name}: {name} cannot be imported; pip install 'askewq[{name}]', or "
            "leave it out."
        )


def _check_launcher(recipe: Recipe) -> None:
    """Refuse what a launcher's config asks for and the run would not do."""
    for name, what in (
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism_config"),
        ("FSDP_OFFLOAD_PARAMS", "fsdp_offload_params"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "fsdp_activation_checkpointing"),
    ):
        if is_on(name):
            raise RecipeError(
                f"the launcher's config asks for {what}, with which askewq does not train; leave "
                "it out. DDP and FSDP2 (distributed_type: FSDP, fsdp_version: 2) are what it can."
            )
    if os.environ.get("FSDP_IGNORED_MODULES"):
        raise RecipeError(
            "the launcher's config has fsdp_ignored_modules, whose weights would not be averaged "
            "over the processes; leave it out."
        )
    asked = {
        "mixed_precision": (os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), "no"),
        "grad_accumulation": (os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"), "1"),
    }
    for key, (value, default) in asked.items():
        if value not in (default, "", "auto") and value != str(getattr(recipe, key)):
            raise RecipeError(
                f"the launcher's config says {value} for {key} and the recipe {key} = "
                f"{getattr(recipe, key)}; the recipe decides, so leave it out of the config or "
                f"pass --{key.replace('_', '-')} {value}."
            )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend not in ("no", "") and not recipe.compile:
        raise RecipeError(
            f"the launcher's config says dynamo_backend: {backend}; leave it out and pass "
            "--compile, which is what decides."
        )


def _sharding() -> Any:
    """Return the plugin of FSDP2 if the launcher asks for it, with what exactness needs."""
    # With empty weights in all processes but one there would be nothing to fit scales to.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    if not asks_for_fsdp():
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise RecipeError(
            "the launcher's config asks for FSDP version 1, which lays the weights of many layers "
            "into one; use fsdp_version: 2."
        )
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    # Gathered in bf16, weights would be rounded to the wrong level; autocast does the rest.
    return FullyShardedDataParallelPlugin(mixed_precision_policy=MixedPrecisionPolicy())


def is_on(name: str) -> bool:
    """Tell whether a variable of the launcher's says yes."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def _count() -> int:
    return int(os.environ.get("WORLD_SIZE") or 1)


def several() -> bool:
    """Tell whether a launcher started this process together with others."""
    return _count() > 1


def asks_for_fsdp() -> bool:
    """Tell whether the launcher's config asks for FSDP."""
    return is_on("ACCELERATE_USE_FSDP")


def is_sharded(accelerator: Any) -> bool:
    """Tell whether weights are spread over the processes."""
    return bool(accelerator.is_fsdp2)


def expect(accelerator: Any, model: Any, *, always: bool) -> None:
    """Prepare DDP for parameters to which a backward pass brings no gradient; drop the first one's.

    It would wait for theirs otherwise, without end; looking for them costs time.

    Args:
        always: not only where the first backward pass of any process left some out, for a network
            that may choose its layers batch by batch.
    """
    from accelerate import DistributedDataParallelKwargs

    trained = [p for p in model.parameters() if p.requires_grad]
    if anyone(accelerator, int(always or any(p.grad is None for p in trained))):
        accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    model.zero_grad()


def share_buffers(accelerator: Any, model: Any) -> None:
    """Give every process the first one's buffers; batch norm's statistics are each process' own."""
    import torch

    if accelerator.num_processes > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


def anyone(accelerator: Any, number: int) -> int:
    """Return the largest number of all processes, so that they go the same way."""
    import torch

    if accelerator.num_processes == 1:
        return number
    mine = torch.tensor([number], device=accelerator.device)
    return int(accelerator.gather(mine).max())


def check_signals(accelerator: Any) -> None:
    """Stop here if a signal came to any of the processes; all of them stop.

    Raises:
        signals.Stop: naming it.
    """
    if number := anyone(accelerator, signals.received()):
        raise signals.Stop(number)


def gather(accelerator: Any, mine: Any) -> list[Any]:
    """Return an object of every process, in their order; every process gets all."""
    from accelerate.utils import gather_object

    return [mine] if accelerator.num_processes == 1 else gather_object([mine])


def first_text(accelerator: Any, text: str) -> str:
    """Return the text of the first process that has one."""
    return next(filter(None, gather(accelerator, text)), "")


def failed_first(message: str, code: int) -> tuple[int, str, int]:
    """Leave a message for the other processes, unless one of them was faster.

    Returns:
        Process, message and exit code of the one that failed first.
    """
    process = int(os.environ.get("RANK") or 0)
    mine = json.dumps([process, message, code])
    if not several():
        return process, message, code
    try:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]  # of the extension

        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5))
        first = store.compare_set(_FAILURE, "", mine)
        found = json.loads(first)
        return int(found[0]), str(found[1]), int(found[2])
    except (RuntimeError, ValueError, KeyError):  # the store went with the process that had it
        return process, message, code


def lost_another(error: BaseException) -> bool:
    """Tell whether an error says that an exchange broke because another process was gone."""
    import torch

    if isinstance(error, torch.distributed.DistError):
        return True
    words = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
