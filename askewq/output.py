"""The output folder of a run: whether it may be written, and the recipe in it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from askewq import artifact, config, disk, recipe_files, snapshots
from askewq.config import Recipe
from askewq.errors import OutputError, RecipeError
from askewq.recipe_files import RECIPE
from askewq.spec import path_of

# What a resumed run may change: neither decides what a run without trouble ends with.
_FREE = ("keep", "nan_policy")
_FOLDERS = (snapshots.CHECKPOINTS, "logs", "additional_chat_templates")
_SUFFIXES = (
    *(".bpe", ".jinja", ".json", ".model", ".safetensors", ".spm", ".tiktoken", ".txt", ".vocab"),
    *(".yaml", disk.PARTIAL),
)


def check(recipe: Recipe) -> None:
    """Refuse a folder that holds something, unless the recipe says what to do with it."""
    out = recipe.output
    disk.check_place(out)
    if recipe.overwrite and _holds_something(out):
        _check_may_delete(recipe)
    if _holds_something(out) and not (recipe.resume or recipe.overwrite):
        raise OutputError(
            f"--output {out} is not empty; pass --resume to go on with the run in it, --overwrite "
            "to replace it, or another folder."
        )


def _holds_something(out: Path) -> bool:
    """Tell whether a folder holds more than a run leaves that was killed as it began."""
    return out.is_dir() and any(path.name != RECIPE + disk.PARTIAL for path in out.iterdir())


def _check_may_delete(recipe: Recipe) -> None:
    """Refuse to replace a folder that is no run of askewq's, or holds what the run reads."""
    out = recipe.output.resolve()
    if not _is_run(out):
        raise OutputError(
            f"--overwrite replaces an earlier run, and {recipe.output} is none (it has no "
            "recipe.yaml, or neither checkpoints nor an artifact beside it); name another folder, "
            "or empty this one yourself."
        )
    models = (recipe.model, recipe.teacher, recipe.weights, recipe.teacher_weights)
    for name in filter(None, (*models, recipe.dataset, recipe.tokenizer)):
        path = path_of(str(name)).resolve()
        if path.exists() and out in (path, *path.parents):
            raise OutputError(
                f"--overwrite would delete {name}, which this run reads from {recipe.output}; name "
                "another folder."
            )

    if others := _others(out):
        raise OutputError(
            f"--overwrite would delete what no run writes: {', '.join(others[:5])} in "
            f"{recipe.output}; move it elsewhere, or name another folder."
        )


def _is_run(out: Path) -> bool:
    """Tell whether a folder is a run's, and not one where a user keeps a recipe among files."""
    path = out / RECIPE
    if not path.is_file():
        return False
    begun = (out / snapshots.CHECKPOINTS).is_dir() or artifact.is_artifact(out)
    alone = all(file.name in (RECIPE, RECIPE + disk.PARTIAL) for file in out.iterdir())
    return begun or alone or bool(recipe_files.read_yaml(path).get("overwrite"))


def _others(out: Path) -> list[str]:
    """Return what is in the folder of a run and was not written by one."""
    checkpoints = out / snapshots.CHECKPOINTS
    found = [path for path in out.iterdir() if not _is_written(path)]
    if checkpoints.is_dir():
        found += [path for path in checkpoints.iterdir() if not snapshots.is_written(path)]
    return sorted(str(path.relative_to(out)) for path in found)


def _is_written(path: Path) -> bool:
    """Tell whether it may be a run's, by its type: what a tokenizer calls its files varies."""
    if path.is_dir() and path.suffix != disk.PARTIAL:
        return path.name in _FOLDERS
    return path.name == "README.md" or path.suffix in _SUFFIXES


def stored_recipe(out: Path) -> Recipe:
    """Return the recipe of the run in a folder.

    Raises:
        OutputError: there is none, or one that nobody ran.
        RecipeError: one that cannot be read.
    """
    path = out / RECIPE
    if not path.is_file():
        raise OutputError(f"--resume: {out} holds no run (no {RECIPE}).")
    values = recipe_files.read_yaml(path)
    if "output" not in values:
        raise OutputError(
            f"--resume: {out} holds a recipe and no run; begin one with --recipe {path} and "
            "another --output."
        )
    return config.build(values, str(path))


def resumed(recipe: Recipe) -> Recipe:
    """Return the recipe of the run in the output folder, which must agree with the one given."""
    stored = stored_recipe(recipe.output)
    given = recipe.model_dump(exclude_unset=True)
    differing = [
        f"{key} = {value!r} (the run has {getattr(stored, key)!r})"
        for key, value in given.items()
        if key not in (*_FREE, "resume", "output") and not _same(value, getattr(stored, key))
    ]
    if differing:
        raise RecipeError(
            f"--resume goes on with the run in {recipe.output} as it was; these settings differ: "
            f"{'; '.join(differing)}. Leave them out, or start again with --overwrite."
        )
    free = {key: value for key, value in given.items() if key in _FREE}
    # One that says `overwrite` was killed while it deleted the run before it: it begins anew.
    resume = not stored.overwrite
    return stored.model_copy(update={**free, "resume": resume, "output": recipe.output})


def _same(given: Any, stored: Any) -> bool:
    """Tell whether a setting is left out, or the run's: a file or folder however it is spelled."""
    if given is None or given == stored:
        return True
    if not all(isinstance(value, str | Path) for value in (given, stored)):
        return False
    one, other = (path_of(str(value)) for value in (given, stored))
    return one.exists() and other.exists() and one.samefile(other)


@contextmanager
def held(recipe: Recipe) -> Iterator[None]:
    """Within the block the folder is there, and no other run's.

    Raises:
        OutputError: it cannot be made, or another run is, or was meanwhile, in it.
    """
    try:
        recipe.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"--output {recipe.output} cannot be made: {error}.") from error
    with disk.alone_in(recipe.output):
        check(recipe)
        yield


def prepare(recipe: Recipe) -> None:
    """Empty the folder where the recipe says so, and put the recipe in it.

    At any moment it holds a recipe, and can be resumed or overwritten, or nothing at all.
    """
    out = recipe.output
    # How a command treats an earlier run is not a setting of the run.
    once = recipe.model_copy(update={"resume": False, "overwrite": False})
    with disk.room_for(4096, out, "Nothing was trained yet; make room and start again."):
        if recipe.overwrite and _holds_something(out):
            # Until it is empty its recipe says that what else is there is of another run.
            emptying = once.model_copy(update={"overwrite": True})
            disk.write(out / RECIPE, recipe_files.to_yaml(emptying))
            _empty(out)
        disk.write(out / RECIPE, recipe_files.to_yaml(once))
    (out / snapshots.CHECKPOINTS).mkdir(exist_ok=True)
    disk.sync(out)
    disk.sync(out.absolute().parent)
    snapshots.tidy(out)


def _empty(out: Path) -> None:
    """Delete everything but the recipe."""
    for path in out.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != RECIPE:
            path.unlink()
