"""An encoder of images without labels: ResNet-20 without its head, on the images of CIFAR-10.

    python benchmarks/image_encoder.py --data FOLDER --output out/encoder

Fine-tunes it, then compares the packed artifact with the network that it started from. Flags
that it does not give itself go to `askewq finetune`.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

ENCODER = str(Path(__file__).parent / "resnet20.py") + ":encoder"


def main() -> None:
    """Write the weights without those of the head, then run finetune and eval."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("out/image-encoder"))
    arguments, more = parser.parse_known_args()
    state = load_file(arguments.data / "resnet20-cifar10" / "model.safetensors")
    weights = arguments.output.with_name(f"{arguments.output.name}-start.safetensors")
    weights.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v for k, v in state.items() if not k.startswith("linear.")}, weights)
    askewq = [sys.executable, "-m", "askewq"]
    data = ["--dataset", str(arguments.data / "cifar10"), "--batch-size", "128"]
    train = [*data, "--model", ENCODER, "--weights", str(weights), "--bits", "2"]
    train += ["--task", "image-feature-extraction", "--grid", "half-integer", "--max-steps", "300"]
    train += ["--augment", "crop-flip", "--mixed-precision", "bf16"]
    subprocess.run(
        [*askewq, "finetune", *train, "--output", str(arguments.output), *more], check=True
    )
    compared = ["--model", ENCODER, "--teacher-weights", str(weights), "--mixed-precision", "bf16"]
    subprocess.run([*askewq, "eval", str(arguments.output), *data, *compared], check=True)


if __name__ == "__main__":
    main()
