"""Speed of packing and unpacking beside a memory copy, and of loading a packed resnet50.

Packing is codes of float32 weights and their bytes; unpacking is bytes to float32 weights. One
weight [2048, 2048] with a scale per row; rates are in GB of float32 weights a second, medians of
interleaved rounds. The memory copy is `clone` of the same weight. Loading compares safetensors with
load_state_dict and the packed file at 2 bits: into a network that is there, and building it, too,
as a user does; each with the file in the page cache and, as after a start of the machine, not.

    python benchmarks/pack.py [--rounds 15] [--threads 2]
"""

import argparse
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import askewq
from askewq import checkpoint
from askewq.grid import BITS, fit_scale, make_grid
from askewq.pack import pack, unpack_values

SHAPE = (2048, 2048)


def interleaved(
    tasks: dict[str, Callable[[], object]],
    rounds: int,
    before: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Return the median seconds of each task; every round runs all, each after `before`."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for i in range(rounds + 2):
        for name, task in tasks.items():
            before()
            began = time.perf_counter()
            task()
            if i >= 2:  # the first two rounds warm up
                seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in seconds.items()}


def compare_packing(rounds: int) -> None:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    print("bits      pack GB/s  of copy   unpack GB/s  of copy   copy GB/s")
    for bits in BITS:
        grid = make_grid(bits)
        scale = fit_scale(weight[:, :64], grid)
        packed = pack(grid.codes(weight, scale), bits)
        tasks = {
            "copy": weight.clone,
            "pack": lambda g=grid, s=scale: pack(g.codes(weight, s), g.bits),
            "unpack": lambda g=grid, s=scale, p=packed: unpack_values(p, g, s, SHAPE),
        }
        rates = {n: weight.nbytes / t / 1e9 for n, t in interleaved(tasks, rounds).items()}
        pack_rate, unpack_rate, copy = rates["pack"], rates["unpack"], rates["copy"]
        print(
            f"{bits!s:9} {pack_rate:9.2f} {pack_rate / copy:8.2f} {unpack_rate:13.2f} "
            f"{unpack_rate / copy:8.2f} {copy:11.2f}"
        )


def out_of_page_cache(path: Path) -> None:
    """Let the next read of a file come from the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def compare_loading(rounds: int) -> None:
    model = timm.create_model("resnet50", pretrained=False).eval()
    askewq.quantize(model, 2)
    askewq.snap_(model)
    plain = timm.create_model("resnet50", pretrained=False).eval()
    with tempfile.TemporaryDirectory() as folder:
        packed, dense = Path(folder) / "packed", Path(folder) / "dense"
        checkpoint.save(model, packed)
        save_file(checkpoint.read(packed).dense_state(), dense)
        build = functools.partial(timm.create_model, "resnet50", pretrained=False)

        def fill_dense(network: nn.Module) -> None:
            network.load_state_dict(load_file(dense))

        def fill_packed(network: nn.Module) -> None:
            checkpoint.load_into(network, checkpoint.read(packed))

        tasks = {
            "safetensors": lambda: fill_dense(plain),
            "packed": lambda: fill_packed(plain),
            "build, safetensors": lambda: fill_dense(build()),
            "build, packed": lambda: fill_packed(build()),
        }

        def forget() -> None:
            for path in (packed, dense):
                out_of_page_cache(path)

        warm, cold = interleaved(tasks, rounds), interleaved(tasks, rounds, before=forget)
        sizes = dense.stat().st_size / 1e6, packed.stat().st_size / 1e6
    print(f"\nresnet50 from {sizes[0]:.1f} MB of safetensors and {sizes[1]:.1f} MB packed, in ms")
    for seconds, place in ((warm, "in the page cache"), (cold, "on the disk")):
        for way, label in (("", "a network that is there"), ("build, ", "building it, too")):
            first, second = (1e3 * seconds[way + name] for name in ("safetensors", "packed"))
            print(f"{place:18} {label:24} {first:7.1f} {second:7.1f}  ratio {second / first:.2f}")


def main() -> None:
    """Parse the flags and compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    compare_packing(arguments.rounds)
    compare_loading(arguments.rounds)


if __name__ == "__main__":
    main()
