"""Objects that get a mixin by a change of class: their own class, with the mixin before it.

The class is made at run time and has no name to import, so such an object is pickled, and copied,
by the mixin and its original class.
"""

import functools
from typing import Any

from torch import nn


class Mixin(nn.Module):
    """Base of the mixins; a subclass sets `prefix`, which begins the names of its classes."""

    prefix: str

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle by mixin and original class."""
        mixin, original = type(self).__bases__
        return _empty, (mixin, original), self.__dict__


def mix_(module: nn.Module, mixin: type[Mixin]) -> None:
    """Put a mixin before the module's class, in place."""
    module.__class__ = _class(mixin, type(module))  # type: ignore[arg-type]  # a class is hashable


def unmix_(module: nn.Module) -> None:
    """Give a mixed module its original class back, in place."""
    module.__class__ = type(module).__bases__[1]


@functools.cache
def _class(mixin: type[Mixin], original: type[nn.Module]) -> type[nn.Module]:
    names = {"__module__": mixin.__module__}
    return type(f"{mixin.prefix}{original.__name__}", (mixin, original), names)


def _empty(mixin: type[Mixin], original: type[nn.Module]) -> nn.Module:
    """Return an instance for pickle and deepcopy to fill."""
    made = _class(mixin, original)  # type: ignore[arg-type]  # a class is hashable
    return made.__new__(made)
