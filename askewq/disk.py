"""Files and folders that appear whole or not at all, and are still there after a power cut.

Everything is written beside its place, synced to the disk, renamed, and the folder that holds the
name is synced, too. A disk that is full becomes an error that says how much is needed.
"""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from askewq import signals
from askewq.errors import DiskFullError, OutputError

PARTIAL = ".partial"
# No room on the device, in the quota, or under the limit for the size of a file.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Seconds that a loader's workers may outlive the process that was killed above them: twice theirs.
_ORPHANS = 10.0
# Read at a time: large enough to be quick, small enough to be no memory.
_PIECE = 2**20


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Give the place to write a file to; after the block it is at `path`, whole, for good.

    The place is in a folder of its own, for safetensors writes under another name beside it first.
    """
    folder = path.with_name(path.name + PARTIAL)
    if folder.is_dir():
        shutil.rmtree(folder)
    folder.unlink(missing_ok=True)  # a file, of an earlier version
    folder.mkdir()
    partial = folder / path.name
    try:
        yield partial
        _open_to_readers(partial, folder)
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _open_to_readers(path: Path, folder: Path) -> None:
    """Let those read a new file whom its new folder lets in; safetensors has its owner alone."""
    path.chmod(folder.stat().st_mode & 0o666)


def check_place(out: Path, flag: str = "--output ") -> None:
    """Check that a folder may be made, or written to, under the name that a flag gave.

    Raises:
        OutputError: a name that is too long, a file in its place or above it, no permission.
    """
    try:
        out.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # a name that is too long
        raise OutputError(f"{flag}{out}: {error.strerror}; name another folder.") from error
    nearest = next(path for path in (out, *out.absolute().parents) if os.path.lexists(path))
    if not nearest.is_dir():
        raise OutputError(f"{flag}{out}: {nearest} is no folder; name another one.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputError(f"{flag}{out}: {nearest} may not be written to; name another folder.")


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Within the block no other process that asks is in a folder, where its file system has locks.

    The lock is on the folder itself, leaves nothing behind, and goes with the process.

    Raises:
        OutputError: another process is in it.
    """
    handle = os.open(folder, os.O_RDONLY)
    end = time.monotonic() + _ORPHANS
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > end:
                    raise OutputError(
                        f"another run is writing to {folder}; wait until it has ended, or name "
                        "another folder."
                    ) from error
                time.sleep(0.1)
            except OSError:  # no locks there
                break
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # also of what was forked within the block
        os.close(handle)


def write(path: Path, text: str) -> None:
    """Write a text file that appears whole or not at all."""
    with appearing(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def appearing_folder(path: Path) -> Iterator[Path]:
    """Within the block, write to the folder it gives; after it, that folder is `path`.

    If the block fails, or SIGTERM ends the process, nothing of it is left, and a `path` that was
    there is as it was.

    Args:
        path: absolute; an empty folder, or nothing.
    """
    new_parents = [parent for parent in path.parents if not parent.exists()]
    partial = path.with_name(f"{path.name}{PARTIAL}-{os.getpid()}")
    try:
        with signals.ending():
            shutil.rmtree(partial, ignore_errors=True)  # of a process with the same number
            partial.mkdir(parents=True)
            yield partial
            publish(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):  # not ours any more if something else is in it
            for parent in new_parents:
                parent.rmdir()
        raise


def publish(partial: Path, path: Path) -> None:
    """Sync a folder with all that is in it and rename it to `path`, an empty one or nothing."""
    for inner in partial.rglob("*"):
        if inner.is_file():
            _open_to_readers(inner, partial)
        sync(inner)
    sync(partial)
    if path.is_dir():
        path.rmdir()
    partial.rename(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def delete(folder: Path) -> None:
    """Delete a folder; cut short, it leaves nothing under the name that it had."""
    doomed = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


@contextmanager
def room_for(needed: int, folder: Path, advice: str) -> Iterator[None]:
    """Within the block, a full disk is an error that says what is needed and what to do.

    Args:
        needed: bytes that the block writes.
        folder: where it writes them.
        advice: the last sentence of the message: what is left, and how to go on.

    Raises:
        DiskFullError: the disk, the quota or the limit of a file's size is used up.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not is_full(error):
            raise
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        raise DiskFullError(
            f"the disk is full ({error}): {needed:,} bytes are needed in {folder}, and "
            f"{shutil.disk_usage(there).free:,} are free there. {advice}"
        ) from error


def is_full(error: BaseException) -> bool:
    """Tell whether an error says that there is no room on the disk."""
    return _code(error) in _FULL


def _code(error: BaseException) -> int | None:
    """Return the number of an operating system's error; safetensors has it in its text alone."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None
