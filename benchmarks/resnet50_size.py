"""A few steps of timm's resnet50 at 2 bits on an image folder, and the size of what is packed.

Draws a small folder of random images in two classes, runs the command below on it, and compares
the bytes of the quantized layers in model.safetensors with 2 bits a weight plus float32 scales.

    python benchmarks/resnet50_size.py [--steps 3] [--output out/resnet50]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import safe_open


def write_images(folder: Path, count: int = 24) -> None:
    """Write random images as folder/split/class/number.png."""
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for i in range(count):
            path = folder / split / ("cat", "dog")[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, (96, 128, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)


def quantized_bytes(file: Path) -> tuple[int, int, int]:
    """Return the bytes of codes and of scales, and the number of quantized weights, in a file."""
    with safe_open(file, framework="np") as content:
        manifest = json.loads(content.metadata()["askewq"])
        weights = manifest["weights"]
        codes = sum(content.get_tensor(f"{name}.codes").nbytes for name in weights)
        scales = sum(content.get_tensor(f"{name}.scale").nbytes for name in weights)
    return codes, scales, sum(int(np.prod(entry["shape"])) for entry in weights.values())


def main() -> None:
    """Run the command and compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", default="3")
    parser.add_argument("--output", default="out/resnet50")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder))
        command = ["finetune", "--model", "resnet50", "--no-pretrained", "--bits", "2"]
        data = ["--dataset", folder, "--output", arguments.output, "--overwrite"]
        length = ["--max-steps", arguments.steps, "--batch-size", "8"]
        subprocess.run([sys.executable, "-m", "askewq", *command, *data, *length], check=True)
    codes, scales, weights = quantized_bytes(Path(arguments.output) / "model.safetensors")
    expected = weights * 2 / 8 + scales
    print(f"quantized weights      {weights:,}")
    print(f"codes and scales       {codes + scales:,} bytes")
    print(f"2 bits a weight+scales {expected:,.0f} bytes, ratio {(codes + scales) / expected:.4f}")


if __name__ == "__main__":
    main()
