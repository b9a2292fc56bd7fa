"""Command-line flags made from the recipe: one for each key, of its type, with its help line."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict, get_args, get_origin

from cyclopts import Group, Parameter

from askewq import config
from askewq.errors import near


def whole(kind: Any, tokens: Sequence[Any]) -> Any:
    """Return a flag's whole number, or a word that it may have in its place; several for a tuple.

    cyclopts would read 2.5 as the whole number 2.

    Raises:
        ValueError: neither; cyclopts tells the user.
    """
    parts = [*_parts(kind)]
    any_number = int in parts
    choices = [part for part in parts if isinstance(part, int | str)]
    found: list[int | str] = []
    for text in (str(token.value) for token in tokens):
        number = re.fullmatch(r"[+-]?\d+", text)
        value = int(text) if number else text
        if value not in choices and not (number and any_number):
            words = [*map(str, choices)]
            listed = [f"one of {', '.join(words)}"] if words else []
            allowed = " or ".join(["a whole number"] * any_number + listed)
            meant = "" if number else near(text, filter(str.isalpha, words))
            # Of a single value cyclopts says itself whose it is.
            whose = f"{tokens[0].keyword}: " if len(tokens) > 1 else ""
            raise ValueError(f'{whose}"{text}" must be {allowed}{meant}.')
        found.append(value)
    return tuple(found) if _is_tuple(kind) else found[0]


def place(kind: Any, tokens: Sequence[Any]) -> Path:
    """Return a path with its ~ resolved, which a shell leaves alone in --output=~/run."""
    return config.at_home(tokens[0].value)


def name_or_place(kind: Any, tokens: Sequence[Any]) -> str:
    """Return a name as it is, or a path with its ~ resolved."""
    text = str(tokens[0].value)
    return str(config.at_home(text)) if text.startswith("~") else text


def _parts(kind: Any) -> Iterator[Any]:
    """Yield the types, and of Literals the values, that a type is made of."""
    inner = get_args(kind)
    if inner:
        for part in inner:
            yield from _parts(part)
    else:
        yield kind


def _is_tuple(kind: Any) -> bool:
    return tuple in (get_origin(kind), *map(get_origin, get_args(kind)))


def flags_of(name: str, keys: tuple[str, ...]) -> Any:
    """Return a dictionary type with one flag per recipe key; only flags given by the user occur."""
    groups: dict[str, Group] = {}
    annotations = {}
    for key in keys:
        field = config.Recipe.model_fields[key]
        extra = field.json_schema_extra
        title = str(extra["group"]) if isinstance(extra, dict) else ""
        group = groups.setdefault(title, Group.create_ordered(title))
        help = field.description or ""
        default = field.default
        if not (field.is_required() or isinstance(default, bool) or default in (None, ())):
            help += f" [default: {default}]"
        parts = [*_parts(field.annotation)]
        number = any(part is int or type(part) is int for part in parts)
        annotations[key] = Annotated[
            field.annotation,  # type: ignore[name-defined]  # a type made at run time
            Parameter(
                help=help,
                group=group,
                negative_iterable="",
                consume_multiple=_is_tuple(field.annotation) or None,
                converter=whole if number else place if Path in parts else None,
            ),
        ]
    return TypedDict(name, annotations, total=False)  # type: ignore[operator]  # likewise
