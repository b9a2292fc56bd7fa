"""`askewq push DIR REPO`: an artifact to the Hugging Face Hub, without training's left-overs."""

import glob
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from askewq import checkpoint, sentence_files
from askewq.artifact import ARTIFACT, GENERATION, read_spec, restore
from askewq.card import NAMES
from askewq.errors import FormatError, HubError, RecipeError
from askewq.preprocessing import TextPreprocessing
from askewq.recipe_files import RECIPE, read_yaml
from askewq.spec import CONFIG, first_line, path_of
from askewq.wording import width_name

METRICS, CARD = "metrics.json", "README.md"
# What an artifact consists of beside its weights and what its preprocessing writes, and what older
# versions of transformers write for it.
_INDEX = f"{ARTIFACT}.index.json"  # of weights in several files
_NAMES = (
    *(CONFIG, GENERATION, METRICS, RECIPE, CARD),
    *("added_tokens.json", "special_tokens_map.json", "preprocessor_config.json"),
)


def push(folder: Path, repo: str, *, private: bool = False, dry_run: bool = False) -> list[str]:
    """Upload an artifact in one commit; return what was done, or would be, as lines to print.

    Args:
        repo: ``owner/name`` or ``name``; made where it does not exist.
        private: of a repository that is made.
        dry_run: only say which files the commit would have, and its message; needs no network.

    Raises:
        FormatError: no artifact, or a damaged one.
        ModelError: files of its tokenizer or image processor that are missing.
        HubError: a name that the Hub does not allow, no permission, or no way to reach it.
    """
    files = _files(folder)
    message = _message(folder)
    _check_name(repo)
    size = sum((folder / name).stat().st_size for name in files)
    listing = [f"  {name} ({(folder / name).stat().st_size:,} bytes)" for name in files]
    lines = [*listing, f"{len(files)} files, {size:,} bytes; commit message: {message}"]
    if paths := _local_paths(folder):
        lines.append(f"recipe.yaml and the files beside it name {', '.join(paths)} of this machine")
    if dry_run:
        return [f"dry run, nothing is sent; to {repo}:", *lines]
    return [f"pushed to {_upload(folder, repo, files, message, private)}:", *lines]


def _files(folder: Path) -> list[str]:
    """Return the names of the files to push, after a check that the artifact is whole."""
    spec, values = read_spec(folder)
    weights = checkpoint.files_of(folder / ARTIFACT)
    checkpoint.read_files(weights)
    missing = [name for name in (METRICS, CARD) if not (folder / name).is_file()]
    if missing:
        raise FormatError(
            f"{folder} has no {' and no '.join(missing)}: a pushed model says what it measures. "
            "Both are written at the end of `askewq finetune`."
        )
    preprocessing = restore(spec, values, folder)
    names = {*_NAMES, *sentence_files.NAMES, _INDEX, *(path.name for path in weights)}
    if isinstance(preprocessing, TextPreprocessing):
        names |= {*type(preprocessing.tokenizer).vocab_files_names.values()}
    with TemporaryDirectory() as place:  # what it consists of it knows itself
        preprocessing.save(Path(place))
        written = [path for path in Path(place).rglob("*") if path.is_file()]
        names |= {path.relative_to(place).as_posix() for path in written}
    return sorted(name for name in names if (folder / name).is_file())


def _local_paths(folder: Path) -> list[str]:
    """Return the files and folders outside the Hub that the recipe of an artifact names."""
    try:
        recipe = read_yaml(folder / RECIPE)
    except RecipeError:  # none, or one that says nothing
        return []
    names = [str(recipe[key]) for key in NAMES if recipe.get(key) is not None]
    return [
        name
        for name in names
        if name.startswith((".", "~")) or path_of(name).is_absolute() or path_of(name).exists()
    ]


def _message(folder: Path) -> str:
    """Return the commit message: what the model is and what it measures."""
    try:
        metrics: dict[str, Any] = json.loads((folder / METRICS).read_text(encoding="utf-8"))
        model = str(metrics["model"])
        if path_of(model).is_absolute() or path_of(model).exists():  # of this machine or another
            model = Path(model).name
        return (
            f"{model} at {width_name(metrics)}: {metrics['metric']} "
            f"{metrics['reloaded']:.2f} (full precision {metrics['full_precision']:.2f})"
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{folder / METRICS} is damaged: {first_line(error)}") from error


def _check_name(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # it is there

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise HubError(
            f"{repo!r} is no name of a repository ({first_line(error)}); pass owner/name."
        ) from error


def _upload(folder: Path, repo: str, files: list[str], message: str, private: bool) -> str:
    """Make the repository and the commit; return the address of the commit."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        made = api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            allow_patterns=[glob.escape(name) for name in files],
            delete_patterns=[ARTIFACT, "model-*-of-*.safetensors", _INDEX],  # of an earlier push
            commit_message=message,
        )
    except Exception as error:  # the client's errors share no class that its versions agree on
        raise HubError(
            f"the Hub did not take {repo!r} ({type(error).__name__}: {first_line(error)}). Without "
            "a token or permission: `hf auth login`, with a token that may write there. Offline: "
            "--dry-run shows what would be sent."
        ) from error
    return str(commit.commit_url)
