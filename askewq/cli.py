"""The commands. `askewq --help` imports neither torch nor timm: each command loads what it needs.

A bad input ends with one clear message on standard error and exit code 2; an export that is not
the artifact's model, with 1; a run that SIGTERM or Ctrl-C ended, after saving, with 143 or 130.
"""

import errno
import json
import os
import shutil
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import cyclopts
from cyclopts import App, Parameter

from askewq import config, contradictions, disk, processes, recipe_files
from askewq.errors import AskewError, OutputError, RecipeError
from askewq.flags import flags_of, name_or_place, place, whole
from askewq.text import printable
from askewq.vocabulary import Bits, DenseType, Estimate

# A path of which the shell may have left the ~.
Place = Annotated[Path, Parameter(converter=place)]
NameOrPlace = Annotated[str, Parameter(converter=name_or_place)]
StartFrom = Annotated[NameOrPlace | None, Parameter(help="recipe to start from: a name or a file")]
Factory = Annotated[NameOrPlace | None, Parameter(help="file.py:factory of your own module")]
# A number that is whole.
Whole = Annotated[int, Parameter(converter=whole)]

app = App(
    name="askewq",
    help="Fine-tune pretrained models to 1- to 8-bit weights with AskewSGD, and pack them.",
    suppress_keyboard_interrupt=False,  # `main` says so
)
recipes = App(name="recipes", help="The recipes that come with askewq.")
app.command(recipes)

# Why a file cannot be opened that somebody named, whatever its name was read for.
_UNREACHABLE = (errno.ENAMETOOLONG, errno.EACCES, errno.ELOOP)
_PLAN_KEYS = ("bits", "grid", "group_size", "act_bits", "include", "exclude", "bits_override")
_MODEL_KEYS = ("task", "trust_remote_code", "image_size")
_DATA_KEYS = (
    "dataset",
    "dataset_config",
    "eval_split",
    "image_column",
    "text_columns",
    "label_column",
    "max_length",
    "max_eval_samples",
    "num_workers",
    "batch_size",
    "mixed_precision",
)
# What a plan's measurements depend on, and its output.
_CALIBRATION_KEYS = (
    *("model", "weights", "pretrained", "task", "tokenizer", "trust_remote_code"),
    *("dataset", "dataset_config", "train_split", "eval_split"),
    *("image_column", "text_columns", "label_column", "image_size", "mean", "std"),
    *("max_length", "max_train_samples", "num_workers"),
    *("grid", "group_size", "include", "exclude"),
    *("method", "batch_size", "mixed_precision", "seed", "output"),
)


_FinetuneFlags = flags_of("FinetuneFlags", tuple(config.Recipe.model_fields))
_PlanFlags = flags_of("PlanFlags", _CALIBRATION_KEYS)
_InspectFlags = flags_of("InspectFlags", (*_PLAN_KEYS, *_MODEL_KEYS))
_EvalFlags = flags_of("EvalFlags", _DATA_KEYS)


@app.command
def finetune(
    *,
    recipe: StartFrom = None,
    num_processes: Annotated[
        Whole | None,
        Parameter(
            help="train in so many processes of this machine, one a GPU if it has any, by "
            "Accelerate's launcher"
        ),
    ] = None,
    flags: Annotated[_FinetuneFlags, Parameter(name="*")] = {},  # type: ignore[valid-type]  # noqa: B006
) -> None:
    """Fine-tune a model to low-bit weights and write a packed, verified artifact.

    askewq finetune --model resnet50 --bits 2 --dataset D --output out
    """
    given: dict[str, Any] = dict(flags)
    values = _with_recipe(recipe, given)
    if given.get("resume") and recipe is None and "output" in given:
        values = _over_stored(Path(given["output"]), given)
    made = config.build(values, recipe or "the command line")
    from askewq import launch

    if launch.wanted(num_processes):
        named = {} if recipe is None else {"recipe": recipe}
        sys.exit(launch.launch(num_processes or 1, ["finetune", *launch.words_of(named | given)]))
    from askewq.train import finetune as run

    run(made)


def _with_recipe(recipe: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a recipe, if there is one, and the flags, which win over it."""
    if recipe is None:
        return given
    stored = recipe_files.read_yaml(recipe_files.find_recipe(recipe))
    useless = contradictions.overruled(stored, given)
    return {key: value for key, value in stored.items() if key not in useless} | given


def _over_stored(output: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the run in a folder, and the flags, so that no flag is needed."""
    from askewq.output import stored_recipe

    path, stored = output / recipe_files.RECIPE, stored_recipe(output)
    for flag, other in contradictions.INSTEAD.items():
        if flag in given and (has := getattr(stored, other)) != _default(other):
            raise RecipeError(
                f"--resume goes on with the run in {output} as it was, of {other} = {has}, and "
                f"--{flag.replace('_', '-')} would replace that; leave it out, or start again with "
                "--overwrite."
            )
    others = {key: value for key, value in given.items() if value != getattr(stored, key)}
    values = _with_recipe(str(path), others) | given
    return {key: value for key, value in values.items() if key != "overwrite" or key in given}


def _default(key: str) -> Any:
    return config.Recipe.model_fields[key].default


@app.command(name="eval")
def evaluate(
    folder: Place,
    *,
    model: Factory = None,
    teacher: Annotated[
        NameOrPlace | None,
        Parameter(help="for embeddings: the model to compare with, if not the original"),
    ] = None,
    teacher_weights: Annotated[
        Place | None, Parameter(help="state dict of it, by default of a network like the model")
    ] = None,
    json_only: Annotated[bool, Parameter(name="--json", help="print only the JSON line")] = False,
    flags: Annotated[_EvalFlags, Parameter(name="*")] = {},  # type: ignore[valid-type]  # noqa: B006
) -> None:
    """Evaluate an artifact; the last line of standard output is one JSON object.

    Columns that no flag names are those of its run, where the data set has them.
    """
    given: dict[str, Any] = dict(flags)
    recipe = config.build(
        {"model": str(folder), "output": str(folder), **given}, "the command line"
    )
    from askewq import processes
    from askewq.evaluate import evaluate_artifact
    from askewq.terminal import note, say

    result = evaluate_artifact(
        folder, recipe, factory=model, teacher=teacher, teacher_weights=teacher_weights
    )
    if not processes.is_first():
        return
    if not json_only:
        for text in result.notes:
            note(text)
        say(
            f"{folder}: {result.metric} {result.value:.2f}, "
            f"loss {result.loss:.4f}, {result.samples} samples"
        )
    say(json.dumps({result.metric: result.value, "loss": result.loss, "samples": result.samples}))


@app.command
def inspect(
    model_or_folder: NameOrPlace,
    *,
    verify: Annotated[
        bool, Parameter(help="of an artifact: check its digests, and that it fits its network")
    ] = False,
    trial: Annotated[
        bool | None,
        Parameter(
            help="wrap, pack and load a model once, on random weights and a random input "
            "[default: up to 30 million parameters]"
        ),
    ] = None,
    flags: Annotated[_InspectFlags, Parameter(name="*")] = {},  # type: ignore[valid-type]  # noqa: B006
) -> None:
    """Print every layer of a model with its grid or why it stays float, and whether it will work.

    Of an artifact, print what it holds.
    """
    values = {"model": model_or_folder, "dataset": "", "output": ""}
    recipe = config.build({**values, **dict(flags)}, "the command line")
    from askewq import inspection

    inspection.inspect(recipe, verify=verify, try_out=trial)


@app.command
def plan(
    *,
    average_bits: Annotated[
        float | None, Parameter(help="budget: bits of a quantized weight, on average")
    ] = None,
    size: Annotated[
        str | None, Parameter(help="budget: of the artifact's weights file, such as 10MB")
    ] = None,
    candidates: Annotated[
        tuple[Bits, ...] | None,
        Parameter(
            help="widths that a layer may get [default: 1 ternary 2 3 4 8]",
            negative_iterable="",
            consume_multiple=True,
            converter=whole,
        ),
    ] = None,
    sensitivity: Annotated[
        Estimate,
        Parameter(help="measured: round one layer at a time; estimated: from gradients, cheaper"),
    ] = "measured",
    samples: Annotated[Whole, Parameter(help="of the training split, to find them with")] = 1024,
    recipe: StartFrom = None,
    flags: Annotated[_PlanFlags, Parameter(name="*")] = {},  # type: ignore[valid-type]  # noqa: B006
) -> None:
    """Find how many bits each layer should get within a budget, and write it as a recipe.

    askewq plan --model resnet50 --dataset D --average-bits 2.5 --output plan
    """
    values = _with_recipe(recipe, dict(flags))
    chosen = config.build(values, recipe or "the command line")
    from askewq import planning

    settings = planning.Settings(
        average_bits, size, candidates or planning.CANDIDATES, sensitivity, samples
    )
    planning.plan(chosen, values.keys(), settings)


@app.command
def export(
    folder: Place,
    *,
    to: Annotated[str, Parameter(help="dense, compressed-tensors, onnx or gguf")],
    output: Annotated[Place, Parameter(help="folder to write, new or empty")],
    dtype: Annotated[
        DenseType | None, Parameter(help="dense: of the floating-point tensors [default: fp32]")
    ] = None,
    dense_rest: Annotated[
        bool | None,
        Parameter(help="write layers that the format cannot hold packed as ordinary weights"),
    ] = None,
    allow_lossy: Annotated[
        bool | None, Parameter(help="write what the format holds only approximately")
    ] = None,
    model: Factory = None,
    image_size: Annotated[
        Whole | None, Parameter(help="of its images, where the artifact does not say it")
    ] = None,
) -> None:
    """Write an artifact in another format, read it back by that format's own loader and compare.

    askewq export out --to onnx --output out-onnx
    """
    flags = {"dtype": dtype, "dense_rest": dense_rest, "allow_lossy": allow_lossy}
    given: dict[str, Any] = {key: value for key, value in flags.items() if value is not None}
    from askewq import export as formats
    from askewq.target import Options

    formats.check_settings(to, given)
    formats.export(folder, to, output, Options(**given), factory=model, image_size=image_size)


@app.command
def push(
    folder: Place,
    repo: str,
    *,
    private: Annotated[bool, Parameter(help="if the repository is made by this")] = False,
    dry_run: Annotated[
        bool, Parameter(help="print files and commit message, send nothing")
    ] = False,
) -> None:
    """Upload an artifact to a repository of the Hugging Face Hub: owner/name."""
    from askewq import hub
    from askewq.terminal import say

    say(*hub.push(folder, repo, private=private, dry_run=dry_run))


@recipes.command(name="ls")
def list_recipes() -> None:
    """List the recipes with what each is for."""
    from askewq.terminal import say

    for name, path in recipe_files.shipped_recipes().items():
        first = path.read_text(encoding="utf-8").split("\n", 1)[0].lstrip("# ")
        say(f"{name:32} {first}")


@recipes.command
def show(name: NameOrPlace) -> None:
    """Print a recipe."""
    from askewq.terminal import say

    say(*recipe_files.text_of(recipe_files.find_recipe(name)).splitlines())


@recipes.command(name="cp")
def copy(name: NameOrPlace, destination: Place) -> None:
    """Copy a recipe to a file or folder of yours, to change it."""
    from askewq.terminal import say

    source = recipe_files.find_recipe(name)
    target = destination / source.name if destination.is_dir() else destination
    if target.exists():
        raise OutputError(f"{target} exists; name another file.")
    if not target.parent.is_dir():
        raise OutputError(f"the folder {target.parent} does not exist; make it first.")
    try:
        with disk.appearing(target) as partial:
            shutil.copyfile(source, partial)
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error}.") from error
    say(str(target))


@app.command
def demo(
    *,
    output: Annotated[Place, Parameter(help="folder to write to; replaced")] = Path("out/demo"),
) -> None:
    """Train, quantize, pack and reload a small network on handwritten digits: three minutes."""
    from askewq.demo import run

    run(output)


def main() -> None:
    """Run the command line; `python -m askewq` and `accelerate launch cli.py` come here too."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # silences a warning about forks
    try:
        app(exit_on_error=False, print_error=False)
    except cyclopts.CycloptsError as error:
        _end(f"{error} (askewq --help)", 2)
    except AskewError as error:
        _end(str(error), error.exit_code)
    except KeyboardInterrupt:  # before training began, or in another command
        _end("interrupted.", 130)
    except SystemExit as end:  # so cyclopts ends a command, a successful one as well
        if processes.several():
            _leave(int(end.code or 0))
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _UNREACHABLE and error.filename:
            _end(f"{error.filename} cannot be opened: {error.strerror}.", 2)
        if "WORLD_SIZE" not in os.environ:
            raise
        _end_together(error)


def _end_together(error: Exception) -> None:
    """End a process among several with an error that nobody raised on purpose."""
    if processes.lost_another(error):
        _end("another process ended without saying why.", 1)
    traceback.print_exc()
    _end(f"{type(error).__name__}: {error}", 1)


def _end(message: str, code: int) -> None:
    """Say what went wrong, and exit; of several processes one does, for the first that failed."""
    if not processes.several():
        sys.exit(_fail(message, code))
    process, first, code = processes.failed_first(message, code)
    if process == int(os.environ.get("RANK") or 0):
        _fail(first)
    _leave(code)


def _leave(code: int) -> None:
    """End one process of several at once, with what it has printed.

    An ordinary exit would wait for exchanges with the others that nobody finishes. Where all are
    finished, gloo's threads may still hold a tensor's Python object, and abort the process when
    they let go of it in an interpreter that is shutting down.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _fail(message: str, code: int = 2) -> int:
    print(f"askewq: {printable(message, lines=True)}", file=sys.stderr)
    return code
