"""Weights that FSDP2 spreads over the processes: DTensors, cut along dimension 0.

What goes element by element is done on this process' part, `local`; what needs all of a tensor
gathers it, `whole`, or sums over the processes, `add_up_`. An ordinary tensor is its own part and
its own whole. Every process must come to a function that gathers or sums.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether a tensor is spread over processes."""
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return this process' part of a tensor: its memory, without its history."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]  # DTensor's


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor, in every process."""
    if not is_sharded(tensor):
        return tensor
    full: Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]  # DTensor's
    # Gathered from uneven parts it lies in the memory of padded ones.
    return full if full.untyped_storage().nbytes() == full.nbytes else full.clone()


def span(tensor: Tensor) -> tuple[int, int]:
    """Return the first index of dimension 0 that is this process' part, and the one after it."""
    size = tensor.shape[0]
    if not is_sharded(tensor):
        return 0, size
    mesh = tensor.device_mesh  # type: ignore[attr-defined]  # DTensor's
    height = -(-size // mesh.size())  # all parts are that high, but the last ones
    start = min(size, mesh.get_local_rank() * height)
    return start, min(size, start + height)


def like(tensor: Tensor, sharded: Tensor) -> Tensor:
    """Return a whole tensor spread as another one is; every process has it."""
    if not is_sharded(sharded):
        return tensor
    from torch.distributed.tensor import DTensor

    start, stop = span(sharded)
    other: Any = sharded
    return DTensor.from_local(
        tensor[start:stop].contiguous(),
        other.device_mesh,
        other.placements,
        run_check=False,
        shape=sharded.shape,
        stride=sharded.stride(),
    )


def add_up_(count: Tensor, sharded: Tensor) -> Tensor:
    """Add up, in place, what every process counted on its part of a tensor."""
    if is_sharded(sharded):
        import torch.distributed

        group = sharded.device_mesh.get_group()  # type: ignore[attr-defined]  # DTensor's
        torch.distributed.all_reduce(count, group=group)
    return count


def hollow(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose parameters have shapes but no memory; shared ones stay so."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, memo)


@torch.no_grad()
def fill(empty: nn.Module, model: nn.Module, device: Any, *, keep: bool = True) -> nn.Module:
    """Return an ordinary copy of a sharded model, from the hollow one made before it was sharded.

    Args:
        keep: False only helps the other processes to gather, and returns the hollow model.
    """
    memo: dict[int, Any] = {}
    for target, source in zip(empty.parameters(), model.parameters(), strict=True):
        full = whole(source)
        if keep:
            memo[id(target)] = nn.Parameter(full.to(device), source.requires_grad)
    if not keep:
        return empty
    for place, buffer in zip(empty.buffers(), model.buffers(), strict=True):
        memo[id(place)] = buffer.to(device)
    return copy.deepcopy(empty, memo)


def reshard_(model: nn.Module) -> None:
    """Give up gathered weights that FSDP2 keeps after a forward pass without a backward pass."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
