"""Objects that get mixins by a change of class: their own class, with the mixins before it.

The class is made at run time and has no name to import, so such an object is pickled, and copied,
by the mixins and its original class.
"""

import functools
from typing import Any

from torch import nn


class Mixin(nn.Module):
    """Base of the mixins; a subclass sets `prefix`, which begins the names of its classes."""

    prefix: str

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle by mixins and original class."""
        return _empty, _parts(type(self)), self.__dict__


def mix_(module: nn.Module, mixin: type[Mixin]) -> None:
    """Put a mixin before the module's class, in place; it may have others already."""
    module.__class__ = _class(mixin, type(module))  # type: ignore[arg-type]  # a class is hashable


def unmix_(module: nn.Module, mixin: type[Mixin]) -> None:
    """Take a mixin, or a subclass of it, away from a module's class, in place."""
    mixins, original = _parts(type(module))
    module.__class__ = _stacked([m for m in mixins if not issubclass(m, mixin)], original)


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module without its mixins."""
    return _parts(type(module))[1]


def _parts(kind: type[nn.Module]) -> tuple[list[type[Mixin]], type[nn.Module]]:
    """Return the mixins of a class, the outermost first, and the class that they were put on."""
    mixins = []
    while issubclass(kind, Mixin):
        mixin, kind = kind.__bases__
        mixins.append(mixin)
    return mixins, kind


def _stacked(mixins: list[type[Mixin]], original: type[nn.Module]) -> type[nn.Module]:
    for mixin in reversed(mixins):
        original = _class(mixin, original)  # type: ignore[arg-type]  # a class is hashable
    return original


@functools.cache
def _class(mixin: type[Mixin], original: type[nn.Module]) -> type[nn.Module]:
    names = {"__module__": mixin.__module__}
    return type(f"{mixin.prefix}{original.__name__}", (mixin, original), names)


def _empty(mixins: list[type[Mixin]], original: type[nn.Module]) -> nn.Module:
    """Return an instance for pickle and deepcopy to fill."""
    made = _stacked(mixins, original)
    return made.__new__(made)
