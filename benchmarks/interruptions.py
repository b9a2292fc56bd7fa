"""Kill a run with SIGKILL at random moments, resume it, and compare its bytes with an uncut run's.

A small network with batch norm, dropout and distillation is trained in both phases, a checkpoint
after every step. Every other kill comes at a random moment of the run's time, every other one as
the run is about to change a random file of its folder: to open it for writing, rename or delete
it. A killed run is resumed by the command that it would print, and may be killed again. Runs are
forked from a process that has imported everything, so that each takes a second or two.

    python benchmarks/interruptions.py [--kills 20] [--seed 0]

Exit code 1 if a resumed run fails or ends with other bytes.
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NETWORK = """
from torch import nn

def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(32, 3),
    )
"""
RUN = """
    --full-precision-steps 4 --max-steps 8 --save-every 1 --eval-every 3 --batch-size 8
    --distill 0.5 --augment crop-flip --optimizer sgd --lr 0.05
"""
# A run that takes so many times as long as the uncut one hangs.
PATIENCE = 60


def write_data(folder: Path) -> None:
    """Write 48 noisy one-coloured images to train on, 24 to test, and the network's file."""
    import datasets
    import numpy as np
    from PIL import Image

    datasets.disable_progress_bars()
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["r", "g", "b"])}
    )
    draw = np.random.default_rng(0)
    for split, count in (("train", 48), ("test", 24)):
        labels = [i % 3 for i in range(count)]
        noise = [draw.normal(90 + 60 * np.eye(3)[y], 60, (16, 16, 3)) for y in labels]
        images = [Image.fromarray(n.clip(0, 255).astype(np.uint8)) for n in noise]
        content = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        content.to_parquet(folder / f"{split}.parquet")
    (folder / "network.py").write_text(NETWORK)


def forked(words: list[str], log: Path, watch: Callable[[str, tuple[Any, ...]], None]) -> int:
    """Start `askewq WORDS` in a forked process; return its id. `watch` gets its audit events."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        from askewq import cli

        sys.addaudithook(watch)
        sys.argv = ["askewq", *words]
        cli.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # neither cleans up nor runs what the parent registered


def finish(pid: int, seconds: float) -> int | None:
    """Wait for a process; kill it after some seconds. Return its exit code, None if killed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


class Changes:
    """Counts the changes that a process is about to make in a folder; kills it at one of them."""

    def __init__(self, folder: Path, fatal: int | None, count: Path | None = None) -> None:
        self.folder, self.fatal, self.count, self.seen = str(folder), fatal, count, 0

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        """Look at one audit event of the interpreter."""
        if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            return
        if not os.fspath(args[0] if isinstance(args[0], str | os.PathLike) else "").startswith(
            self.folder
        ):
            return
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
            return
        self.seen += 1
        if self.count is not None and Path(self.folder, "README.md").exists():
            self.count, at = None, self.count  # the last file of a run is there
            at.write_text(str(self.seen))
        if self.seen == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)


def survive(kills: int, seed: int, folder: Path) -> dict[str, int]:
    """Kill and resume runs in a folder.

    Returns:
        Counts: kills, those that found a run in the middle of a checkpoint, runs that ended with
        the bytes of the uncut one, and runs that did not.
    """
    data = folder / "data"
    data.mkdir()
    write_data(data)
    draw = random.Random(seed)
    command = ["finetune", "--model", f"{data / 'network.py'}:network", "--dataset", str(data)]
    command += RUN.split()
    log, uncut = folder / "log", folder / "uncut"
    began = time.monotonic()
    watch = Changes(uncut, None, folder / "changes")
    code = finish(forked([*command, "--output", str(uncut)], log, watch), 600)
    duration = time.monotonic() - began
    if code != 0:
        raise RuntimeError(f"the uncut run ended with {code}:\n{log.read_text()[-2000:]}")
    expected = digest(uncut)
    changes = int((folder / "changes").read_text())
    tally = {"kills": 0, "in a checkpoint": 0, "survived": 0, "lost": 0}
    while tally["kills"] < kills:
        out = folder / f"run-{tally['survived'] + tally['lost']}"
        while True:
            words = [*command, "--output", str(out)]
            if (out / "recipe.yaml").is_file():
                words = ["finetune", "--resume", "--output", str(out)]
            by_time = tally["kills"] % 2 == 0
            wanted = tally["kills"] < kills and (not out.exists() or draw.random() < 0.5)
            fatal = draw.randint(1, changes) if wanted and not by_time else None
            seconds = draw.uniform(0, duration) if wanted and by_time else PATIENCE * duration
            code = finish(forked(words, log, Changes(out, fatal)), seconds)
            if code is not None or not wanted:
                break
            tally["kills"] += 1
            tally["in a checkpoint"] += any(out.glob("checkpoints/*.partial"))
        same = code == 0 and digest(out) == expected and not [*out.rglob("*.partial")]
        tally["survived" if same else "lost"] += 1
        if same:
            shutil.rmtree(out)
        else:
            print(f"LOST: {out} ended with {code}\n{log.read_text()[-2000:]}")
    return tally


def digest(out: Path) -> str:
    """Return the SHA-256 of a run's weights."""
    return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


def main() -> None:
    """Print what survived."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    folder = Path(tempfile.mkdtemp(prefix="askewq-interruptions-"))
    os.environ["HF_HOME"] = str(folder / "hf")
    import accelerate  # noqa: F401  # what every run needs, once
    import datasets  # noqa: F401
    import timm  # noqa: F401
    import torch
    import transformers  # noqa: F401
    from tqdm import tqdm

    import askewq.train  # noqa: F401

    torch.set_num_threads(1)
    # tqdm's own lock is one for all forks: a run killed as it holds it would stop all that follow.
    tqdm.set_lock(threading.RLock())
    began = time.monotonic()
    tally = survive(options.kills, options.seed, folder)
    print(
        f"{tally['kills']} kills ({tally['in a checkpoint']} of them while a checkpoint was being "
        f"written), {tally['survived'] + tally['lost']} runs: {tally['survived']} ended with the "
        f"bytes of the uncut run, {tally['lost']} did not; {time.monotonic() - began:.0f} s"
    )
    if tally["lost"]:
        sys.exit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
