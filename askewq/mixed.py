"""Objects that get mixins by a change of class: their own class, with the mixins before it.

The class is made at run time and has no name to import, so such an object is pickled, and copied,
by the mixins and its original class.
"""

import functools
from typing import Any

from torch import Tensor, nn


class Mixin(nn.Module):
    """Base of the mixins.

    Attributes:
        prefix: begins the names of a mixin's classes.
        leaves: the attributes that give what `read` returns, not the Parameter of that name.
    """

    prefix: str
    leaves: tuple[str, ...] = ()

    def read(self, leaf: str) -> Tensor:
        """Return what the attribute `leaf` is from now on."""
        raise NotImplementedError

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle by mixins, with the leaves of each, and original class."""
        return _empty, _parts(type(self)), self.__getstate__()


# A mixin and the attributes that it reads.
_Mixed = tuple[type[Mixin], tuple[str, ...]]


def mix_(module: nn.Module, mixin: type[Mixin], leaves: tuple[str, ...] = ()) -> None:
    """Put a mixin before the module's class, in place; it may have others already.

    Args:
        leaves: the attributes that the mixin reads.
    """
    module.__class__ = _class(mixin, type(module), leaves)  # type: ignore[arg-type]  # hashable


def unmix_(module: nn.Module, mixin: type[Mixin]) -> None:
    """Take a mixin, or a subclass of it, away from a module's class, in place."""
    mixins, original = _parts(type(module))
    module.__class__ = _stacked([m for m in mixins if not issubclass(m[0], mixin)], original)


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module without its mixins."""
    return _parts(type(module))[1]


def _parts(kind: type[nn.Module]) -> tuple[list[_Mixed], type[nn.Module]]:
    """Return the mixins of a class, the outermost first, and the class that they were put on."""
    mixins = []
    while issubclass(kind, Mixin):
        leaves = kind.__dict__.get("leaves", ())
        mixin, kind = kind.__bases__
        mixins.append((mixin, leaves))
    return mixins, kind


def _stacked(mixins: list[_Mixed], original: type[nn.Module]) -> type[nn.Module]:
    for mixin, leaves in reversed(mixins):
        original = _class(mixin, original, leaves)  # type: ignore[arg-type]  # a class is hashable
    return original


@functools.cache
def _class(
    mixin: type[Mixin], original: type[nn.Module], leaves: tuple[str, ...]
) -> type[nn.Module]:
    names: dict[str, Any] = {leaf: _reader(leaf) for leaf in leaves}
    if leaves:  # else those of a mixin below count
        names["leaves"] = leaves
    names["__module__"] = original.__module__  # torch.fx leaves those of torch.nn whole
    return type(f"{mixin.prefix}{original.__name__}", (mixin, original), names)


def _reader(leaf: str) -> property:
    def read(module: Mixin) -> Tensor:
        return module.read(leaf)

    return property(read)


def _empty(mixins: list[_Mixed], original: type[nn.Module]) -> nn.Module:
    """Return an instance for pickle and deepcopy to fill."""
    made = _stacked(mixins, original)
    return made.__new__(made)
