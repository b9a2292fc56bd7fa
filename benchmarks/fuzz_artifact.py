"""Damage an artifact in every place and way; it is refused by FormatError, or loads to its weights.

The places: the header's length, the header, the manifest in it (its digest apart), codes, scales,
other tensors, and config.json. The ways: a bit or a byte flipped, two bytes swapped, a piece
truncated, repeated, overwritten or inserted. Three artifacts are damaged in turn, a network with 2
bits, ternary weights and shared tensors, one with scales by group and bfloat16, one with rounded
inputs.

    python benchmarks/fuzz_artifact.py [--cases 20000] [--seed 0]

Exit code 1 if a case gives another model, another exception, takes more than a second of the
processor, or lets the peak memory of the process grow by more than twice the file and the network
that it fills: what is read, unpacked and compared here takes that much.
"""

import argparse
import collections
import copy
import json
import random
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch import nn

import askewq
from askewq import artifact, checkpoint
from askewq.activations import attach_, rounded_layers
from askewq.errors import FormatError
from askewq.grid import fit_scale, make_grid
from askewq.layers import quantize_layer_
from askewq.preprocessing import ImagePreprocessing
from askewq.spec import CONFIG, LoadedModel, ModelSpec

SECOND = 1.0
# malloc grows by 128 KiB at a time, and safetensors 0.8 loses 64 bytes with every tensor it reads.
SLACK = 2**18


class Network(nn.Module):
    """A network with everything that a packed file can hold."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3)
        self.body = nn.Linear(width, width)
        self.twin = nn.Linear(width, width, bias=False)
        self.twin.weight = self.body.weight
        self.norm = nn.BatchNorm1d(width)
        self.register_buffer("table", torch.randn(7).to(dtype))


def write_artifacts(folder: Path, larger: int = 600) -> list[tuple[Path, Network]]:
    """Write the three artifacts; return their folders with fresh networks to fill.

    Args:
        larger: width of the second one, a multiple of 20; half a megabyte by default.
    """
    made = []
    for name, width, bits, group, dtype, act_bits in (
        ("a", 24, ("ternary", 2), "channel", torch.float16, "none"),
        ("b", larger, (3, 8), 20, torch.bfloat16, "none"),
        ("c", 24, (2, 4), "channel", torch.float16, 4),
    ):
        torch.manual_seed(0)
        network = Network(width, dtype)
        for layer, width_bits in zip((network.stem, network.body), bits, strict=True):
            grid = make_grid(width_bits)
            size = "channel" if layer is network.stem else group
            quantize_layer_(layer, grid, fit_scale(layer.weight, grid, size))
        askewq.snap_(network)
        if act_bits != "none":
            attach_(network, act_bits, {"stem": True, "body": False})
        out = folder / name
        out.mkdir()
        checkpoint.save(network, out / artifact.ARTIFACT)
        spec = ModelSpec("module", "network", "image-classification", ("x", "y"), {})
        artifact.save_config(LoadedModel(network, spec, ImagePreprocessing()), out)
        made.append((out, Network(width, dtype)))
    return made


def regions(packed: bytes) -> dict[str, tuple[int, int]]:
    """Return where the parts of a packed file begin and end."""
    length = int.from_bytes(packed[:8], "little")
    header = json.loads(packed[8 : 8 + length])
    start = packed.index(b"__metadata__")
    manifest = packed.index(b"askewq", start), packed.index(b"}}", packed.index(b"version", start))
    found = {
        "length": (0, 8),
        "header": (8, 8 + length),
        "manifest": manifest,
        "digest": (packed.index(b"digest", start), packed.index(b"digest", start) + 80),
    }
    for kind in ("codes", "scale", "other"):
        spans = [
            entry["data_offsets"]
            for name, entry in header.items()
            if name != "__metadata__"
            and kind == {"codes": "codes", "scale": "scale"}.get(name.rpartition(".")[2], "other")
        ]
        for i, (first, last) in enumerate(spans):
            found[f"{kind} {i}"] = 8 + length + first, 8 + length + last
    return found


def damage(content: bytes, place: tuple[int, int], draw: random.Random) -> tuple[str, bytes]:
    """Return how a part of a file was damaged, and the file."""
    first, last = place
    at = draw.randrange(first, last)
    size = draw.choice([1, 2, 3, 4, 8, 16, 64])
    made = bytearray(content)
    how = draw.choice(["bit", "byte", "swap", "cut", "end", "repeat", "insert", "fill", "copy"])
    if how == "bit":
        made[at] ^= 1 << draw.randrange(8)
    elif how == "byte":
        made[at] = draw.randrange(256)
    elif how == "swap":
        other = draw.randrange(first, last)
        made[at], made[other] = made[other], made[at]
    elif how == "cut":
        del made[at : at + size]
    elif how == "end":
        del made[at:]
    elif how == "repeat":
        made[at:at] = content[at : at + size]
    elif how == "insert":
        made[at:at] = draw.randbytes(size)
    elif how == "fill":
        made[at : at + size] = bytes([draw.choice([0, 32, 48, 57, 255])]) * len(
            made[at : at + size]
        )
    else:
        source = draw.randrange(len(content))
        made[at : at + size] = content[source : source + size]
    return how, bytes(made)


def content_of(folder: Path, network: nn.Module) -> tuple[object, ...]:
    """Load an artifact as `askewq.load` and the command line do; return all that it says."""
    spec, preprocessing = artifact.read_spec(folder)
    askewq.load(folder, model=network)
    weights = {
        name: (str(t.dtype), tuple(t.shape), t.reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, t in network.state_dict().items()
    }
    inputs = {name: layer.input_grid for name, layer in rounded_layers(network).items()}
    return spec, preprocessing, weights, inputs


def peak() -> int:
    """Return the peak memory of this process in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def fuzz(cases: int, seed: int, folder: Path) -> tuple[collections.Counter[str], list[str]]:
    """Try damaged artifacts; return the outcomes by part, and what should not have happened."""
    draw = random.Random(seed)
    tally: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    subjects = []
    for out, network in write_artifacts(folder):
        path, config = out / artifact.ARTIFACT, out / CONFIG
        expected = content_of(out, copy.deepcopy(network))
        packed, text = path.read_bytes(), config.read_bytes()
        parts = [(name, path, packed, place) for name, place in regions(packed).items()]
        parts.append(("config", config, text, (0, len(text))))
        size = sum(tensor.nbytes for tensor in network.state_dict().values())
        subjects.append((out, network, size, expected, parts))
    for case in range(cases):
        out, plain, size, expected, parts = subjects[case % len(subjects)]
        network = copy.deepcopy(plain)
        name, path, content, place = draw.choice(parts)
        how, damaged = damage(content, place, draw)
        path.write_bytes(damaged)
        with torch.no_grad():
            for tensor in network.state_dict().values():
                tensor.zero_()
        before, began = peak(), time.process_time()
        try:
            same = content_of(out, network) == expected
            outcome = "unharmed" if same else "WRONG MODEL"
        except FormatError:
            outcome = "refused"
        except BaseException as error:  # noqa: BLE001  # what is looked for
            outcome = f"{type(error).__name__}: {error}"
        seconds, grown = time.process_time() - began, peak() - before
        path.write_bytes(content)
        if damaged == content:
            outcome = "unchanged" if outcome == "unharmed" else f"REFUSED UNCHANGED: {outcome}"
        tally[f"{name.split()[0]}: {outcome[:40]}"] += 1
        what = f"case {case}, {how} in {name} of {out.name}"
        if outcome not in ("refused", "unharmed", "unchanged"):
            wrong.append(f"{what}: {outcome}")
        if seconds > SECOND:
            wrong.append(f"{what}: {seconds:.2f} s")
        if case > cases // 100 and grown > 2 * (len(damaged) + size) + SLACK:
            wrong.append(f"{what}: {grown:,} bytes for a file of {len(damaged):,}")
    return tally, wrong


def main() -> None:
    """Print the outcomes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("error")  # a file that cannot be verified would count as an exception
    torch.set_num_threads(1)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        tally, wrong = fuzz(options.cases, options.seed, Path(folder))
    for outcome, count in sorted(tally.items()):
        print(f"{outcome:24} {count:6}")
    print("\n".join(wrong[:20]))
    print(f"{options.cases} cases, {len(wrong)} wrong, {time.perf_counter() - began:.0f} s")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
