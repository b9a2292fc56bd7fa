"""The checkpoints of a run: folders that are whole or not there, each with the sums of its files.

A folder is written beside its place, summed up, synced and renamed by the first process, to which
the others hand what is their own. `SHA256SUMS` is what `sha256sum -c` reads. Reading starts at the
newest folder whose files have their sums; a damaged one is set aside.
"""

import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from askewq import disk, processes, training_state
from askewq.disk import PARTIAL
from askewq.training_state import Progress

CHECKPOINTS = "checkpoints"
SUMS = "SHA256SUMS"
DAMAGED = ".damaged"
TEACHER = "teacher.safetensors"


def save(
    accelerator: Any,
    out: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    keep: int,
    own: dict[str, bytes] | None = None,
) -> None:
    """Write a checkpoint and delete the oldest ones beyond `keep`; every process calls this.

    Args:
        model: with all of its weights; in the first process.
        own: more files of this process, by name.

    Raises:
        DiskFullError: no room; the checkpoints of before are left.
    """
    path = _path(out, progress.step)
    partial = path.with_name(path.name + PARTIAL)
    main = accelerator.is_main_process
    last = newest(out) if main else None
    advice = (
        f"The last good checkpoint, {last}, is left" if last else "There is no checkpoint yet"
    ) + f"; make room, then go on with: {resume_command(out)}"
    random_file = training_state.RANDOM.format(accelerator.process_index)
    mine = {random_file: training_state.random_numbers(), **(own or {})}
    files = processes.gather(accelerator, mine)
    if not main:
        training_state.save(None, model, optimizer, progress, accelerator.num_processes)
        accelerator.wait_for_everyone()
        return
    with disk.room_for(training_state.size(model, optimizer), out, advice), _tidy(partial):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name, content in (pair for some in files for pair in some.items()):
            (partial / name).write_bytes(content)
        training_state.save(partial, model, optimizer, progress, accelerator.num_processes)
        _write_sums(partial)
        if path.exists():
            set_aside(path)
        disk.publish(partial, path)
        _prune(out, keep)
    accelerator.wait_for_everyone()


@contextmanager
def _tidy(partial: Path) -> Iterator[None]:
    """Leave no half-written folder behind: on a full disk it would take the room that is needed."""
    try:
        yield
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def resume_command(out: Path) -> str:
    """Return the command that goes on with the run in a folder."""
    words = f"finetune --resume --output {shlex.quote(str(out))}"
    count = os.environ.get("WORLD_SIZE") or "1"
    if processes.STARTED in os.environ:
        return f"askewq {words} --num-processes {count}"
    if processes.asks_for_fsdp() or count != (os.environ.get("LOCAL_WORLD_SIZE") or count):
        return f"accelerate launch --config_file FILE -m askewq {words}"
    if int(count) > 1:  # --multi_gpu starts several on a machine without GPUs, too
        return f"accelerate launch --multi_gpu --num_processes {count} -m askewq {words}"
    return f"askewq {words}"


def newest(out: Path) -> Path | None:
    """Return the newest checkpoint, damaged or not."""
    return next(iter(_all(out)), None)


def newest_whole(out: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Return the newest undamaged checkpoint, and the damaged ones passed over, each with why."""
    damaged: list[tuple[Path, str]] = []
    for folder in _all(out):
        if not (reason := damage(folder)):
            return folder, damaged
        damaged.append((folder, reason))
    return None, damaged


def set_aside(folder: Path) -> None:
    """Rename a checkpoint, so that it is not resumed from; the next `save` deletes it."""
    aside = folder.with_name(folder.name + DAMAGED)
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)


def tidy(out: Path) -> None:
    """Delete what a run that was killed left half-written."""
    for leftover in (out / CHECKPOINTS).glob(f"*{PARTIAL}"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def damage(folder: Path) -> str:
    """Return what is wrong with the files of a checkpoint, or an empty text."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
        sums = {name: sha256 for sha256, _, name in (line.partition("  ") for line in lines)}
        present = {path.name for path in folder.iterdir()} - {SUMS}
        if present != sums.keys():
            return (
                f"it should hold {', '.join(sorted(sums))} and holds {', '.join(sorted(present))}"
            )
        for name, sha256 in sums.items():
            if disk.sha256_of(folder / name) != sha256:
                return f"{name} does not have its checksum"
    except (OSError, UnicodeDecodeError) as error:
        return f"{type(error).__name__}: {error}"
    return "" if sums else f"{SUMS} is empty"


def _write_sums(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    lines = [f"{disk.sha256_of(folder / name)}  {name}\n" for name in names]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def _prune(out: Path, keep: int) -> None:
    for old in _all(out)[keep:]:
        disk.delete(old)
    for damaged in (out / CHECKPOINTS).glob(f"*{DAMAGED}"):
        disk.delete(damaged)


def is_written(path: Path) -> bool:
    """Tell whether a run makes something of this name in its folder of checkpoints."""
    return path.name.startswith("step-") or path.name.split(".")[0] == "teacher"


def _path(out: Path, step: int) -> Path:
    return out / CHECKPOINTS / f"step-{step:08d}"


def _all(out: Path) -> list[Path]:
    """Return the complete checkpoints, newest first."""
    folders = (p for p in (out / CHECKPOINTS).glob("step-*") if not p.suffix)
    return sorted(folders, reverse=True)
