"""Random inputs for a network, the same ones every time, and what it makes of them.

By them an export is compared with its artifact.
"""

import inspect
from typing import Any, cast

import torch
from torch import Tensor

from askewq.errors import CALLING, ExportError
from askewq.preprocessing import ImagePreprocessing, ProcessorPreprocessing, TextPreprocessing
from askewq.spec import LoadedModel, first_line
from askewq.tasks import logits_of

SAMPLES = 4
# Tokens of a sample: enough for every position to have neighbours, few enough to be quick.
TOKENS = 32
# Image sizes tried on a module of the user's own whose artifact does not say one.
USUAL_SIZES = (224, 32, 28, 64, 96, 128, 256, 384)


@torch.no_grad()
def sample_inputs(loaded: LoadedModel) -> dict[str, Tensor]:
    """Return `SAMPLES` random inputs that fit a model, the same ones every time.

    Returns:
        ``pixel_values`` [samples, channels, height, width], random pixels through the model's own
        normalisation; or ``input_ids`` and ``attention_mask`` [samples, tokens], of different
        lengths, and ``token_type_ids`` where tokenizer and model have them.

    Raises:
        ExportError: a module of the user's own that takes none of the usual image sizes.
    """
    random = torch.Generator().manual_seed(0)
    preprocessing = loaded.preprocessing
    if isinstance(preprocessing, TextPreprocessing):
        return _random_texts(loaded, preprocessing, random)
    if isinstance(preprocessing, ProcessorPreprocessing):
        from PIL import Image

        shape = (SAMPLES, *picture_size(loaded), 3)
        pictures = torch.randint(256, shape, generator=random, dtype=torch.uint8)
        made = [preprocessing.image(Image.fromarray(p.numpy())) for p in pictures]
        return {"pixel_values": torch.stack(made)}
    if not isinstance(preprocessing, ImagePreprocessing):
        raise ExportError(f"askewq has no sample inputs for {type(preprocessing).__name__}.")
    sizes = [preprocessing.size] if preprocessing.size else [(n, n) for n in USUAL_SIZES]
    for height, width in sizes:
        shape = (SAMPLES, len(preprocessing.mean), height, width)
        pixels = torch.randint(256, shape, generator=random, dtype=torch.uint8)
        inputs = {"pixel_values": preprocessing.batch(pixels)}
        if preprocessing.size:
            return inputs
        try:
            logits_of(loaded.model, loaded.spec, inputs)
        except CALLING as error:
            said = f"{type(error).__name__}: {first_line(error)}"
        else:
            return inputs
    raise ExportError(
        "the export cannot be verified: the artifact says no image size, and the module takes none "
        f"of {', '.join(map(str, USUAL_SIZES))} (of the last it says {said}); say which with "
        "--image-size."
    )


def _random_texts(
    loaded: LoadedModel, preprocessing: TextPreprocessing, random: torch.Generator
) -> dict[str, Tensor]:
    model = cast(Any, loaded.model)
    shape = SAMPLES, min(preprocessing.max_length, TOKENS)
    vocabulary = _vocabulary(model, preprocessing.tokenizer)
    tokens = torch.randint(vocabulary, shape, generator=random)
    lengths = shape[1] - torch.arange(SAMPLES) * shape[1] // (2 * SAMPLES)
    mask = torch.arange(shape[1]) < lengths.view(-1, 1)
    padding = getattr(model.config, "pad_token_id", None) or 0
    if getattr(model.config, "is_encoder_decoder", False):  # such a text ends once
        end = model.config.eos_token_id
        tokens %= vocabulary - 1
        tokens += tokens >= end
        tokens[torch.arange(SAMPLES), lengths - 1] = end
    inputs = {"input_ids": torch.where(mask, tokens, padding), "attention_mask": mask.long()}
    listed, taken = preprocessing.tokenizer.model_input_names, inspect.signature(model.forward)
    if "token_type_ids" in listed and "token_type_ids" in taken.parameters:
        last = min(1, getattr(model.config, "type_vocab_size", 1) - 1)
        inputs["token_type_ids"] = (torch.arange(shape[1]) >= shape[1] // 2).long() * last * mask
    return inputs


def _vocabulary(model: Any, tokenizer: Any) -> int:
    """Return how many tokens a model knows; one that does not say so knows its tokenizer's."""
    try:
        return int(model.get_input_embeddings().num_embeddings)
    except (NotImplementedError, AttributeError):
        return len(tokenizer)


def takes_any_size(loaded: LoadedModel) -> bool:
    """Tell whether nothing says how large the pictures are that go into a network."""
    preprocessing = loaded.preprocessing
    if isinstance(preprocessing, ImagePreprocessing):
        return preprocessing.size is None
    if not isinstance(preprocessing, ProcessorPreprocessing) or preprocessing.side is not None:
        return False
    from PIL import Image

    pictures = (Image.new("RGB", size) for size in ((256, 256), (320, 256), (384, 384)))
    shapes = {preprocessing.image(picture).shape for picture in pictures}
    return len(shapes) > 1 and getattr(cast(Any, loaded.model).config, "image_size", None) is None


def picture_size(loaded: LoadedModel) -> tuple[int, int]:
    """Return height and width of pictures that a network takes by its preprocessing.

    Any, but for an image processor that does not resize: there the network's config says it, or
    who exports it.
    """
    processor: Any = getattr(loaded.preprocessing, "processor", None)
    if side := getattr(loaded.preprocessing, "side", None):
        return side, side
    size: Any = getattr(getattr(loaded.model, "config", None), "image_size", None)
    if size is None or getattr(processor, "do_resize", True):
        return 256, 256
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def expected_of(loaded: LoadedModel) -> tuple[dict[str, Tensor], Tensor]:
    """Return sample inputs and the artifact's logits for them.

    Raises:
        ExportError: a network that fails on them.
    """
    inputs = sample_inputs(loaded)
    try:
        with torch.no_grad():
            return inputs, logits_of(loaded.model, loaded.spec, inputs)
    except CALLING as error:
        raise ExportError(
            f"the export cannot be verified: the network fails on random inputs "
            f"({type(error).__name__}: {first_line(error)})."
        ) from error
