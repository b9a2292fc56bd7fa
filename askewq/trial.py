"""A trial of a network before any training, on random weights and a random input.

What training, packing and loading rely on is tried: that a network with quantization-aware layers
gives the output of the plain one, that its weights get gradients, and that the network which is
loaded from the codes gives the output of the one that was packed, all to the bit.
"""

import copy
import glob
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from askewq import checkpoint, layers, wrap
from askewq.errors import ModelError
from askewq.plan_table import Plan
from askewq.spec import Source
from askewq.vocabulary import IMAGE_TASKS, Task

# Larger networks take minutes, and several times their memory.
UP_TO = 30_000_000


def inputs_of(
    network: nn.Module, source: Source, task: Task, image_size: int | None
) -> dict[str, Tensor] | None:
    """Return a random batch of two for a network; None where the shape of its input is unknown."""
    if task not in IMAGE_TASKS:
        config: Any = network.config
        # Where a config names none, as CANINE's, tokens are characters.
        ids = torch.randint(getattr(config.get_text_config(), "vocab_size", 128), (2, 8))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    shape = None
    if source == "timm":
        shape = network.pretrained_cfg["input_size"]  # type: ignore[index]  # timm's, a dict
    elif source == "transformers":
        config = network.config
        sides = getattr(config, "image_size", 224)
        height, width = (sides, sides) if isinstance(sides, int) else sides
        shape = (getattr(config, "num_channels", 3), height, width)
    elif image_size is not None:
        shape = (3, image_size, image_size)
    if shape is None:
        return None
    if image_size is not None:
        shape = (shape[0], image_size, image_size)
    return {"pixel_values": torch.randn(2, *shape)}


def attempt(
    network: nn.Module, fresh: nn.Module, plan: Plan, run: Callable[[nn.Module], Tensor]
) -> list[str]:
    """Wrap, train, snap, pack and load once; then `fresh` holds the codes of `network`.

    Args:
        network, fresh: built alike; their weights may differ.
        run: calls a network on the same input and returns its output.

    Returns:
        The weights that no gradient reached.

    Raises:
        ModelError: the network that will not work, and why.
    """
    network.eval()
    fresh.eval()
    with torch.no_grad():
        for layer in plan.quantized:  # random weights may begin at zero, trained ones do not end so
            weight = network.get_submodule(layer.names[0]).get_parameter(layer.leaves[0])
            if not weight.any():
                weight.normal_(std=0.02)
        plain = run(network)
        if not _same(plain, run(network)):
            raise ModelError(
                "its output for the same input changes from call to call, even in evaluation mode, "
                "so that nobody could tell whether a packed file is exact."
            )
        wrap.apply(network, plan)
        if not _same(plain, run(network)):
            changed = " ".join(_changing(fresh, plan, run))
            raise ModelError(
                "with quantization-aware layers its output is another: it does more with a weight "
                "than its layers say. "
                + (
                    f"Leave these in float: --exclude {changed}"
                    if changed
                    else "No layer does that alone: name fewer of them by --include."
                )
            )
    output = run(network)
    if not output.requires_grad:
        raise ModelError("its output does not depend on its weights in a way that can be trained.")
    output.float().square().mean().backward()
    trained = layers.quantized_layers(network)
    idle = [name for name, weight in trained.items() if weight.latent.grad is None]
    network.zero_grad()
    layers.snap_(network)
    checkpoint.load_into(fresh, checkpoint.artifact_of(network))
    with torch.no_grad():
        if not _same(run(network), run(fresh)):
            raise ModelError(
                "loaded from its packed weights it gives another output than before: it holds "
                "something that its state dict does not."
            )
    return idle


def _changing(network: nn.Module, plan: Plan, run: Callable[[nn.Module], Tensor]) -> Iterator[str]:
    """Yield the layers that, quantization-aware, change a network's output all by themselves."""
    plain = run(network)
    for layer in plan.quantized:
        twin = copy.deepcopy(network)
        wrap.apply(twin, Plan((layer,)))
        if not _same(plain, run(twin)):
            yield glob.escape(layer.label)


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True)
