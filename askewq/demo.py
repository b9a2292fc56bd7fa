"""`askewq demo`: the whole way on scikit-learn's handwritten digits, offline, in minutes.

Trains a small timm network from scratch in full precision, fine-tunes it to 2 bits, packs it,
reloads it and prints the result; an ordinary recipe does all of that.
"""

from pathlib import Path

import numpy as np

from askewq import disk
from askewq.config import build
from askewq.errors import DataError, OutputError
from askewq.output import check
from askewq.recipe_files import RECIPE
from askewq.train import finetune

# A quarter of the 1,797 digits is held out for evaluation.
HELD_OUT = 4


def run(output: Path) -> None:
    """Write the digits, the run and its artifact below `output`, replacing an earlier demo.

    Raises:
        DataError: scikit-learn, which carries the digits, is not installed.
        AskewError: as `finetune`; before anything is written, an output that may not be.
    """
    recipe = build(
        {
            "model": "test_resnet",
            "pretrained": False,
            "dataset": str(output / "digits"),
            "image_size": 32,
            "bits": 2,
            "augment": "crop",
            "batch_size": 64,
            "optimizer": "adamw",
            "full_precision_steps": 300,
            "full_precision_lr": 3e-3,
            "lr": 1e-3,
            "max_steps": 300,
            "output": str(output / "model"),
            "overwrite": True,
        },
        "the demo",
    )
    check(recipe)
    digits = output / "digits"
    if not (output / "model" / RECIPE).is_file() and digits.is_dir() and any(digits.iterdir()):
        raise OutputError(
            f"{digits} is not of an earlier demo, whose run would be beside it; delete it, or name "
            "another --output."
        )
    with disk.room_for(10**6, output, "Make room and run the command again."):
        write_digits(digits)
    finetune(recipe)


def write_digits(folder: Path) -> None:
    """Write the digits as a data set of PNG images: train and test parquet files."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "the demo's digits come with scikit-learn, which is not installed; install "
            "'askewq[demo]'."
        ) from error
    from datasets import ClassLabel, Dataset, Features, Image, disable_progress_bars
    from PIL import Image as Pillow

    disable_progress_bars()
    digits = load_digits()
    pictures = [Pillow.fromarray((image * (255 / 16)).astype(np.uint8)) for image in digits.images]
    features = Features({"image": Image(), "label": ClassLabel(names=list("0123456789"))})
    folder.mkdir(parents=True, exist_ok=True)
    held_out = np.arange(len(pictures)) % HELD_OUT == 0
    for split, chosen in (("train", ~held_out), ("test", held_out)):
        rows = np.flatnonzero(chosen)
        content = {
            "image": [pictures[i] for i in rows],
            "label": [int(digits.target[i]) for i in rows],
        }
        Dataset.from_dict(content, features=features).to_parquet(folder / f"{split}.parquet")
