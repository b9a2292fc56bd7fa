"""Command-line flags made from the recipe: one for each key, of its type, with its help line."""

from typing import Annotated, Any, TypedDict, get_args

from cyclopts import Group, Parameter

from askewq import config


def whole(kind: Any, tokens: Any) -> int | str:
    """Return a flag's whole number, or its text for the recipe to accept or refuse."""
    text = str(tokens[0].value)
    try:
        return int(text)
    except ValueError:
        return text


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
        if not field.is_required() and field.default not in (None, (), False, True):
            help += f" [default: {field.default}]"
        kind = str(field.annotation)
        repeated = "tuple" in kind
        # cyclopts would read 2.5 as the whole number 2; the recipe's own check refuses it.
        number = int in (field.annotation, *get_args(field.annotation))
        annotations[key] = Annotated[
            field.annotation,  # type: ignore[name-defined]  # a type made at run time
            Parameter(
                help=help,
                group=group,
                negative_iterable="",
                consume_multiple=repeated or None,
                converter=whole if number else None,
            ),
        ]
    return TypedDict(name, annotations, total=False)  # type: ignore[operator]  # likewise
