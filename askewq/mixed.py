"""Objects that get a mixin by a change of class: their own class, with the mixin before it.

The class is made at run time and has no name to import, so such an object is pickled, and copied,
by the mixin and its original class.
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
        """Pickle by mixin, original class and leaves."""
        mixin, original = type(self).__bases__
        return _empty, (mixin, original, self.leaves), self.__dict__


def mix_(module: nn.Module, mixin: type[Mixin], leaves: tuple[str, ...] = ()) -> None:
    """Put a mixin before the module's class, in place; it reads the attributes `leaves`."""
    module.__class__ = _class(mixin, type(module), leaves)  # type: ignore[arg-type]  # hashable


def unmix_(module: nn.Module) -> None:
    """Give a mixed module its original class back, in place."""
    module.__class__ = type(module).__bases__[1]


@functools.cache
def _class(
    mixin: type[Mixin], original: type[nn.Module], leaves: tuple[str, ...]
) -> type[nn.Module]:
    names: dict[str, Any] = {"__module__": mixin.__module__, "leaves": leaves}
    names |= {leaf: _reader(leaf) for leaf in leaves}
    return type(f"{mixin.prefix}{original.__name__}", (mixin, original), names)


def _reader(leaf: str) -> property:
    def read(module: Mixin) -> Tensor:
        return module.read(leaf)

    return property(read)


def _empty(
    mixin: type[Mixin], original: type[nn.Module], leaves: tuple[str, ...] = ()
) -> nn.Module:
    """Return an instance for pickle and deepcopy to fill."""
    made = _class(mixin, original, leaves)  # type: ignore[arg-type]  # a class is hashable
    return made.__new__(made)
