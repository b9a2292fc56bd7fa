"""Whether an artifact can describe a network: its inputs, and, of transformers, its config.

An artifact holds the config and no code: what is built from it is all that can be loaded again.
"""

from pathlib import Path

import torch
from torch import nn

from askewq import checkpoint, trust
from askewq.errors import FormatError, ModelError
from askewq.models import build_on_meta
from askewq.preprocessing import ImagePreprocessing
from askewq.spec import LoadedModel, first_line


def check(loaded: LoadedModel) -> None:
    """Check, before anything is trained, that an artifact will describe the network itself.

    Raises:
        ModelError: a config from which another network is built, or none without code of its own;
            images prepared in a way that a reader refuses.
    """
    spec = loaded.spec
    if isinstance(loaded.preprocessing, ImagePreprocessing):
        try:
            ImagePreprocessing.restore(loaded.preprocessing.save(Path()))
        except FormatError as error:
            raise ModelError(
                f"{spec.name!r} prepares its images in a way that no artifact can hold ({error}); "
                "use another model, or set --image-size, --mean and --std."
            ) from error
    if spec.source != "transformers":
        return
    advice = "so that its artifact could not be loaded; use another model"
    trust.check_arguments(spec.arguments, spec.name)
    try:
        with torch.random.fork_rng(devices=[]):
            described = build_on_meta(spec)
    except Exception as error:
        raise ModelError(
            f"{spec.name!r} cannot be built again from its config by the installed transformers "
            f"alone ({type(error).__name__}: {first_line(error)}), {advice}."
        ) from error
    have, had = map(_tensors_of, (loaded.model, described))
    if differing := sorted(name for name in have | had if have.get(name) != had.get(name)):
        one, other = (found.get(differing[0], "not there") for found in (have, had))
        raise ModelError(
            f"{spec.name!r} is another network than its config describes: {differing[0]} is {one} "
            f"in the one and {other} in the other ({len(differing)} differ), {advice}."
        )


def _tensors_of(model: nn.Module) -> dict[str, str]:
    """Return what is to agree of every tensor in a state dict: its shape, and of which it is one.

    What is no tensor has no part in it; `wrap.plan` refuses it.
    """
    shared = checkpoint.shared_names(model)
    return {
        name: f"{list(value.shape)}" + (f", one with {shared[name]}" if name in shared else "")
        for name, value in model.state_dict().items()
        if isinstance(value, torch.Tensor)
    }
