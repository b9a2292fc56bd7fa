"""What checking the digest adds to loading a packed resnet50, and to a step the search for NaN.

Medians of interleaved rounds: reading the file with and without its digest, building and filling
the network from it, and, beside one training step, looking at its gradients.

    python benchmarks/digest.py [--rounds 15] [--threads 1]
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import timm
import torch

import askewq
from askewq import checkpoint, digest, divergence


def seconds(work: Callable[[], object]) -> float:
    """Return how long something takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    """Print the medians in milliseconds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    path = Path(tempfile.mkdtemp()) / "model.safetensors"
    network = timm.create_model("resnet50")
    askewq.quantize(network, 2)
    askewq.snap_(network)
    checkpoint.save(network, path)

    def load() -> None:
        checkpoint.load_into(timm.create_model("resnet50"), checkpoint.read(path))

    def unchecked() -> None:
        with mock.patch.object(digest, "check_seal"):
            checkpoint.read(path)

    trained = timm.create_model("resnet50")
    images = torch.randn(8, 3, 224, 224)

    def step() -> None:
        trained(images).sum().backward()

    step()
    works = {
        "read and check": lambda: checkpoint.read(path),
        "read alone": unchecked,
        "read, check, build and fill": load,
        "forward and backward of 8 images": step,
        "look for NaN in the gradients": lambda: divergence.gradients_finite(trained),
    }
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(options.rounds):
        for name, work in works.items():
            taken[name].append(seconds(work))
    print(f"{path.stat().st_size:,} bytes; milliseconds, median of {options.rounds}")
    for name, values in taken.items():
        print(f"{name:34} {1e3 * statistics.median(values):8.1f}")


if __name__ == "__main__":
    main()
