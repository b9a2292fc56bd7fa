"""The output folder of a run: whether it may be written, its recipe, and its checkpoints."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from askewq import config
from askewq.config import Recipe
from askewq.errors import OutputError, RecipeError

RECIPE = "recipe.yaml"
STATE = "state.json"
CHECKPOINTS = "checkpoints"
# Of the saved checkpoints, this many newest ones are kept.
KEPT_CHECKPOINTS = 2


@dataclass(slots=True)
class Progress:
    """What a resumed run must know beside weights and optimizer: written with each checkpoint."""

    step: int = 0
    seconds: float = 0.0
    full_precision: float | None = None
    rounded: float | None = None


def check(recipe: Recipe) -> None:
    """Refuse a folder that holds something, unless the recipe says what to do with it."""
    out = recipe.output
    if out.exists() and not out.is_dir():
        raise OutputError(f"--output {out} is a file; name a folder.")
    if recipe.overwrite and out.is_dir() and any(out.iterdir()):
        _check_may_delete(recipe)
    if out.is_dir() and any(out.iterdir()) and not (recipe.resume or recipe.overwrite):
        raise OutputError(
            f"--output {out} is not empty; pass --resume to go on with the run in it, --overwrite "
            "to replace it, or another folder."
        )


def _check_may_delete(recipe: Recipe) -> None:
    """Refuse to replace a folder that is no run of askewq's, or holds what the run reads."""
    out = recipe.output.resolve()
    if not (out / RECIPE).is_file():
        raise OutputError(
            f"--overwrite replaces an earlier run, and {recipe.output} is none (it has no "
            "recipe.yaml); name another folder, or empty this one yourself."
        )
    files = (name.rpartition(":")[0] or name for name in (recipe.model, recipe.teacher or ""))
    others = (recipe.dataset, recipe.tokenizer, recipe.weights, recipe.teacher_weights)
    for name in [*files, *others]:
        if (
            name
            and Path(name).exists()
            and out in (Path(name).resolve(), *Path(name).resolve().parents)
        ):
            raise OutputError(
                f"--overwrite would delete {name}, which this run reads from {recipe.output}; name "
                "another folder."
            )


def resumed(recipe: Recipe) -> Recipe:
    """Return the recipe of the run in the output folder, which must agree with the one given."""
    path = recipe.output / RECIPE
    if not path.is_file():
        raise OutputError(f"--resume: {recipe.output} holds no run (no recipe.yaml).")
    stored = config.build(config.read_yaml(path), str(path))
    given = recipe.model_dump(exclude_unset=True)
    differing = [
        f"{key} = {value!r} (the run has {getattr(stored, key)!r})"
        for key, value in given.items()
        if key not in ("resume", "output") and value not in (None, getattr(stored, key))
    ]
    if differing:
        raise RecipeError(
            f"--resume goes on with the run in {recipe.output} as it was; these settings differ: "
            f"{'; '.join(differing)}. Leave them out, or start again with --overwrite."
        )
    return stored.model_copy(update={"resume": True, "output": recipe.output})


def prepare(recipe: Recipe) -> None:
    """Make the folder, empty where the recipe says so, with the recipe in it."""
    if recipe.overwrite and recipe.output.exists():
        shutil.rmtree(recipe.output)
    (recipe.output / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    # How a command treats an earlier run is not a setting of the run.
    once = recipe.model_copy(update={"resume": False, "overwrite": False})
    write(recipe.output / RECIPE, config.to_yaml(once))


def save_checkpoint(accelerator: Any, out: Path, progress: Progress) -> None:
    """Write a checkpoint beside its place, then rename it: it is there whole or not at all."""
    name = _path(out, progress.step)
    partial = name.with_suffix(".partial")
    accelerator.save_state(str(partial))
    if accelerator.is_main_process:
        write(partial / STATE, json.dumps(asdict(progress)))
        if name.exists():
            shutil.rmtree(name)
        partial.rename(name)
        for old in _checkpoints(out)[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def read_progress(folder: Path) -> Progress:
    """Return what a checkpoint says of its run."""
    try:
        return Progress(**json.loads((folder / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(folder, error) from error


def load_state(accelerator: Any, folder: Path) -> None:
    """Load weights, buffers and optimizer state of a checkpoint."""
    try:
        accelerator.load_state(str(folder))
    except Exception as error:  # every file in it fails in its own way
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: Exception) -> OutputError:
    return OutputError(
        f"the checkpoint {folder} is damaged ({type(error).__name__}: {error}); delete it to go on "
        "from the one before, or start again with --overwrite."
    )


def newest_checkpoint(out: Path) -> Path | None:
    """Return the folder of the newest complete checkpoint."""
    return next(reversed(_checkpoints(out)), None)


def drop_checkpoint(out: Path, step: int) -> None:
    """Delete the checkpoint of a step, if there is one."""
    shutil.rmtree(_path(out, step), ignore_errors=True)


def _path(out: Path, step: int) -> Path:
    return out / CHECKPOINTS / f"step-{step:08d}"


def _checkpoints(out: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first."""
    return sorted(p for p in (out / CHECKPOINTS).glob("step-*") if p.suffix != ".partial")


def write(path: Path, text: str) -> None:
    """Write a text file that appears whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
