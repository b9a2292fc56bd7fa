"""All that a run is at one moment, as files in a folder: what a checkpoint holds.

Weights, the optimizer's tensors and the random numbers of every process are safetensors, numbers
are JSON: reading a checkpoint runs no pickle, whoever wrote it.
"""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, load_model, save_file, save_model
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from askewq import disk, sharding
from askewq.errors import OutputError

STATE, WEIGHTS, OPTIMIZER = "state.json", "model.safetensors", "optimizer.safetensors"
RANDOM, STREAM = "random-{:05d}.safetensors", "stream-{:05d}.json"
VERSION = 1
# The loops of a run, in their order, and the learning rates that each has.
FULL_PRECISION, LOW_BIT, POLISH = "full precision", "low-bit", "polish"
RATES = {
    FULL_PRECISION: ("full_precision_lr",),
    LOW_BIT: ("lr", "level_lr"),
    POLISH: ("polish_lr",),
}


@dataclass(slots=True)
class Progress:
    """How far a run has come, beside weights and optimizer.

    Attributes:
        step: optimizer steps made, skipped ones included; with the seed it says where the sampler
            stands and what the next step draws.
        phase: which of the loops made the last of them.
        skipped: steps whose update was passed over, see `divergence`.
        full_precision, rounded, relaxed: the metric before the low-bit steps, without them, and
            after them.
        inside: share of the quantized weights inside their interval after the low-bit steps.
        teacher: SHA-256 of the file with the network that teaches, if the run wrote one.
        seconds, step_seconds: of all steps, and the median of those since the run was started, of
            the first process.
        inputs: of the layers that round their inputs, whether the levels are signed.
        made_of: what the data set and the teacher's file decide, by its name in a message.
    """

    step: int = 0
    phase: str = ""
    seconds: float = 0.0
    step_seconds: float | None = None
    skipped: int = 0
    full_precision: float | None = None
    rounded: float | None = None
    relaxed: float | None = None
    inside: float | None = None
    teacher: str | None = None
    inputs: dict[str, bool] | None = None
    made_of: dict[str, Any] | None = None


def size(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Return about how many bytes `save` writes."""
    tensors = {id(t): t for t in model.state_dict(keep_vars=True).values()}
    for values in optimizer.state_dict()["state"].values():
        tensors |= {id(t): t for t in values.values() if isinstance(t, Tensor)}
    return sum(t.numel() * t.element_size() for t in tensors.values()) + 2**16


def save(
    folder: Path | None,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    processes: int,
) -> None:
    """Write everything but random numbers into an existing folder; one process does.

    Args:
        folder: None only helps to gather the state of an optimizer of sharded weights.
    """
    tensors, numbers = _split(optimizer, keep=folder is not None)
    if folder is None:
        return
    save_model(model, str(folder / WEIGHTS))
    save_file(tensors, folder / OPTIMIZER)
    content = {
        "version": VERSION,
        "processes": processes,
        "progress": asdict(progress),
        "optimizer": numbers,
    }
    (folder / STATE).write_text(json.dumps(content) + "\n", encoding="utf-8")


def load_weights(folder: Path, model: nn.Module) -> None:
    """Fill a model, in place; before it is sharded.

    Raises:
        OutputError: weights of another model.
    """
    with fitting(folder):
        load_model(model, str(folder / WEIGHTS))


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer, process: int) -> None:
    """Fill an optimizer, in place, whose weights may be sharded, and set the random numbers.

    Raises:
        OutputError: state that belongs to another optimizer.
    """
    with fitting(folder):
        _join(optimizer, load_file(folder / OPTIMIZER), _content(folder)["optimizer"])
        _load_random(folder / RANDOM.format(process))


@contextmanager
def fitting(folder: Path) -> Iterator[None]:
    """Within the block, whatever goes wrong with a checkpoint's content is an OutputError."""
    try:
        yield
    except (RuntimeError, ValueError, LookupError, TypeError, OSError, SafetensorError) as error:
        raise OutputError(
            f"the checkpoint {folder} does not fit this run ({type(error).__name__}: {error}); it "
            "was written by another one. Start again with --overwrite."
        ) from error


def read_progress(folder: Path, processes: int, made_of: dict[str, Any]) -> Progress:
    """Return how far the run of a checkpoint had come.

    Args:
        made_of: what the run that goes on is made of, as `Progress` has it.

    Raises:
        OutputError: a checkpoint of another version of askewq, of another number of processes, or
            of other data or another teacher.
    """
    content = _content(folder)
    if content["processes"] != processes:
        raise OutputError(
            f"the checkpoint {folder} was written by {content['processes']} processes, and these "
            f"are {processes}; the data would go on in another order. Start as many as before."
        )
    progress = Progress(**content["progress"])
    differing = [
        f"{what} {was}, now {made_of[what]}"
        for what, was in (progress.made_of or {}).items()
        if made_of[what] != was
    ]
    if differing:
        raise OutputError(
            f"the checkpoint {folder} is of a run with other data or another teacher than there "
            f"are now ({'; '.join(differing)}); put back what it was started with, or start again "
            "with --overwrite."
        )
    return progress


def _content(folder: Path) -> dict[str, Any]:
    """Return what state.json holds; `load` is the one to find out about its `optimizer`."""
    try:
        content = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']!r}, not {VERSION}")
        Progress(**content["progress"])
        return content  # type: ignore[no-any-return]  # JSON
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"the checkpoint {folder} cannot be read ({type(error).__name__}: {error}): another "
            "askewq wrote it. Go on with that one, or start again with --overwrite."
        ) from error


def _split(
    optimizer: torch.optim.Optimizer, *, keep: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the optimizer's state as named tensors and JSON values; no tensors without `keep`."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {"param_groups": state["param_groups"], "state": {}}
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                full = sharding.whole(value)  # every process helps
                if keep:
                    tensors[f"{index}.{key}"] = full.detach().cpu().contiguous()
            else:
                numbers["state"].setdefault(str(index), {})[key] = value
    return tensors, numbers


def _join(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], numbers: dict[str, Any]
) -> None:
    """Give an optimizer the state that `_split` took apart."""
    state: dict[int, dict[str, Any]] = {int(i): dict(v) for i, v in numbers["state"].items()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        parameter = parameters[int(index)]
        if tensor.dim() and tensor.shape != parameter.shape:
            raise ValueError(
                f"{name} is {list(tensor.shape)} and its parameter {list(parameter.shape)}"
            )
        part = sharding.like(tensor, parameter) if tensor.dim() else tensor
        state.setdefault(int(index), {})[key] = part
    groups = [dict(group) for group in numbers["param_groups"]]
    for group, present in zip(groups, optimizer.param_groups, strict=True):
        for key, value in group.items():
            if isinstance(present.get(key), tuple):
                group[key] = tuple(value)  # JSON has lists only
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def random_numbers() -> bytes:
    """Return the state of every generator of random numbers of this process, as safetensors."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy.keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "python.words": torch.tensor(words, dtype=torch.int64),
    }
    if torch.cuda.is_available():
        states = torch.cuda.get_rng_state_all()
        tensors |= {f"cuda.{i}": state for i, state in enumerate(states)}
    rest = {"numpy": [int(position), int(has_gauss), float(cached)], "python": [version, gauss]}
    return to_bytes(tensors, {"askewq": json.dumps(rest)})


def _load_random(path: Path) -> None:
    """Set every generator of random numbers of this process to where it was."""
    with safe_open(path, framework="pt") as file:
        rest = json.loads(file.metadata()["askewq"])
    tensors = load_file(path)
    torch.set_rng_state(tensors["torch"])
    keys = tensors["numpy.keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, *rest["numpy"]))
    version, gauss = rest["python"]
    random.setstate((version, tuple(tensors["python.words"].tolist()), gauss))
    states = [tensors[f"cuda.{i}"] for i in range(sum(n.startswith("cuda.") for n in tensors))]
    if states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states)


def save_network(model: nn.Module, path: Path) -> None:
    """Write a network to a file that appears whole or not at all."""
    with disk.appearing(path) as partial:
        save_model(model, str(partial))


def load_network(model: nn.Module, path: Path, sha256: str | None) -> None:
    """Fill a network, in place, from a file that `save_network` wrote.

    Raises:
        OutputError: the file is missing or is not the one that was written.
    """
    if not path.is_file() or disk.sha256_of(path) != sha256:
        raise OutputError(f"--resume: {path} is missing or damaged; start again with --overwrite.")
    load_model(model, str(path))
