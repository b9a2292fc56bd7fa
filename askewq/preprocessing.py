"""What turns an image or a text into the model's input: the model's own preprocessing, kept.

An image is prepared in two parts: one image to a tensor of fixed size (which can be cached), and a
batch of those to the network's input (cheap and vectorised).
"""

import functools
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from askewq.errors import DataError, FormatError, RecipeError

# ImageNet's statistics, the default of every image model that brings none of its own.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


# Tokens of a text, where neither the user nor the tokenizer sets a lower limit.
DEFAULT_LENGTH = 512
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")  # timm's
# What a stranger's config may ask for: beyond it an image would fill the memory.
LARGEST_SIDE = 2**13
LEAST_CROP, MOST_CROP = 0.1, 2.0


class Preprocessing(Protocol):
    """What every kind of preprocessing can do."""

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the files it needs, if any, and return the values for config.json."""
        ...


@dataclass(frozen=True, slots=True)
class ImagePreprocessing:
    """Resize, center crop, normalise: timm's evaluation preprocessing, or a user's own module's.

    Attributes:
        size: height and width of the input; None leaves images as they are.
        mean, std: per channel, for values in 0..1; one value means grayscale input.
        crop_pct: share of the resized shorter side that the center crop keeps; above 1, as VOLO has
            it, the picture is smaller than the crop, and black around.
        interpolation: one of INTERPOLATIONS.
        crop_mode: center, squash or border, as timm defines them.
    """

    size: tuple[int, int] | None = None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop_pct: float = 1.0
    interpolation: str = "bilinear"
    crop_mode: str = "center"

    def override(
        self,
        image_size: int | None,
        mean: tuple[float, ...] | None,
        std: tuple[float, ...] | None,
    ) -> "ImagePreprocessing":
        """Return this preprocessing with what the user set instead.

        Raises:
            RecipeError: a mean and a std of different length, or of neither 1 nor 3 values; a size
                that no reader of the artifact would take.
        """
        changed = replace(
            self,
            size=self.size if image_size is None else (image_size, image_size),
            # The model's crop is for its own size; at another one the shorter side is kept whole.
            crop_pct=self.crop_pct if image_size is None or (image_size,) * 2 == self.size else 1.0,
            mean=mean or self.mean,
            std=std or self.std,
        )
        if len(changed.mean) != len(changed.std) or len(changed.mean) not in (1, 3):
            raise RecipeError(
                f"mean = {changed.mean} and std = {changed.std} must have one value each "
                "(grayscale) or three (RGB)."
            )
        if changed.size is not None and max(changed.size) > LARGEST_SIDE:
            raise RecipeError(f"image_size = {image_size} must be at most {LARGEST_SIDE} pixels.")
        if min(changed.std) <= 0:
            raise RecipeError(f"std = {changed.std} must be above 0.")
        return changed

    def image(self, image: Any) -> Tensor:
        """Return a PIL image as uint8 [channels, height, width]."""
        image = _eight_bits(image).convert("RGB" if len(self.mean) == 3 else "L")
        pixels: Tensor = _transform(self)(image)
        return pixels

    def batch(self, pixels: Tensor) -> Tensor:
        """Return uint8 [batch, channels, height, width] as the network's float32 input."""
        mean, std = (
            torch.tensor(v, device=pixels.device).view(-1, 1, 1) for v in (self.mean, self.std)
        )
        return (pixels.float() / 255 - mean) / std

    def save(self, folder: Path) -> dict[str, Any]:
        """Return the values; there is no file."""
        return asdict(self)

    @classmethod
    def restore(cls, values: Any) -> "ImagePreprocessing":
        """Return the preprocessing that `save` described.

        Raises:
            FormatError: keys that are missing or unknown.
        """
        if not isinstance(values, dict) or set(values) != set(cls.__dataclass_fields__):
            raise FormatError(
                f"config.json: preprocessing must have exactly {sorted(cls.__dataclass_fields__)}."
            )
        try:
            size = values["size"]
            restored = cls(
                size=None if size is None else (int(size[0]), int(size[1])),
                mean=tuple(map(float, values["mean"])),
                std=tuple(map(float, values["std"])),
                crop_pct=float(values["crop_pct"]),
                interpolation=str(values["interpolation"]),
                crop_mode=str(values["crop_mode"]),
            )
            if len(restored.mean) != len(restored.std) or len(restored.mean) not in (1, 3):
                raise ValueError("mean and std must have one value each, or three")
            if not all(math.isfinite(n) for n in (*restored.mean, *restored.std)):
                raise ValueError("mean and std must be numbers")
            if not min(restored.std) > 0:
                raise ValueError("std must be above 0")
            if size is not None and not (
                isinstance(size, list | tuple)
                and len(size) == 2
                and all(type(n) is int and 0 < n <= LARGEST_SIDE for n in size)
            ):
                raise ValueError(f"size must be null or two numbers from 1 to {LARGEST_SIDE}")
            if not LEAST_CROP <= restored.crop_pct <= MOST_CROP:
                raise ValueError(f"crop_pct must be {LEAST_CROP} to {MOST_CROP}")
            if restored.crop_mode not in CROP_MODES:
                raise ValueError(f"crop_mode must be one of {', '.join(CROP_MODES)}")
            if restored.interpolation not in INTERPOLATIONS:
                raise ValueError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}")
            _transform(restored)
        except (TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise FormatError(f"config.json: unusable preprocessing {values}: {error}") from error
        return restored


def _eight_bits(image: Any) -> Any:
    """Return a PIL image upright, as datasets decodes it, and with 8 bits a channel.

    Pillow itself would leave a camera's picture as it was held, and cut off what is above 255.

    Raises:
        DataError: numbers of which nobody knows which are black and white.
    """
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "32-bit whole" if image.mode == "I" else "floating-point"
        raise DataError(
            f"the data set has an image of {kind} numbers (Pillow's mode {image.mode}), in which "
            "nothing says what is black and what is white; save the images with 8 or 16 bits."
        )
    return image


@functools.lru_cache(maxsize=8)
def _transform(preprocessing: ImagePreprocessing) -> Any:
    """Return timm's own evaluation transform up to uint8 [channels, height, width]."""
    from timm.data.transforms_factory import transforms_imagenet_eval
    from torchvision.transforms import PILToTensor

    if preprocessing.size is None:
        return PILToTensor()
    return transforms_imagenet_eval(
        img_size=preprocessing.size,
        crop_pct=preprocessing.crop_pct,
        crop_mode=preprocessing.crop_mode,
        interpolation=preprocessing.interpolation,
        normalize=False,
    )


@dataclass(frozen=True, slots=True)
class ProcessorPreprocessing:
    """A transformers image processor.

    Attributes:
        side: height and width of the pictures, where somebody said so and nothing else does.
    """

    processor: Any
    side: int | None = None

    def image(self, image: Any) -> Tensor:
        """Return a PIL image as the processor's float32 [channels, height, width]."""
        made = self.processor(_eight_bits(image).convert("RGB"), return_tensors="pt")
        pixels: Tensor = made["pixel_values"][0]
        return pixels

    def batch(self, pixels: Tensor) -> Tensor:
        """Return the batch as it is: the processor has normalised it."""
        return pixels

    def save(self, folder: Path) -> dict[str, Any]:
        """Write preprocessor_config.json."""
        self.processor.save_pretrained(folder)
        return {}


@dataclass(frozen=True, slots=True)
class TextPreprocessing:
    """A transformers tokenizer, and the tokens at which texts are cut (or blocks are made)."""

    tokenizer: Any
    max_length: int

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the tokenizer's files."""
        self.tokenizer.save_pretrained(folder)
        return {"max_length": self.max_length}
