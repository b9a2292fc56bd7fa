"""`askewq inspect`: the plan for a model and whether it will work, or what an artifact holds."""

from pathlib import Path

import torch
from torch import Tensor, nn

from askewq import artifact, checkpoint, choices, models, report, terminal, trial
from askewq.config import Recipe
from askewq.errors import CALLING, ModelError, RecipeError
from askewq.plan_table import Plan
from askewq.spec import ModelSpec, first_line
from askewq.tasks import logits_of


def inspect(recipe: Recipe, *, verify: bool = False, try_out: bool | None = None) -> None:
    """Print the plan for the model of a recipe, or the content of the artifact it names.

    Args:
        verify: say what was checked of the artifact instead.
        try_out: whether to wrap, pack and load the model once, on random weights and a random
            input; by default if it is not too large.

    Raises:
        AskewError: a model that cannot be loaded, has nothing to quantize, or will not work; a
            damaged artifact.
    """
    folder = Path(recipe.model)
    if verify or artifact.is_artifact(folder):
        _check_alone(recipe, try_out)
    if verify:
        terminal.say(*artifact.verify(folder))
        return
    if artifact.is_artifact(folder):
        spec, _ = artifact.read_spec(folder)
        report.print_artifact(spec, checkpoint.read(folder / artifact.ARTIFACT))
        return
    spec = _spec(recipe)
    network = _bare(recipe, spec)
    plan = choices.plan_of(recipe, network, spec.task)
    report.print_plan(plan)
    if try_out is False:
        return
    if plan.total_parameters > trial.UP_TO and not try_out:
        terminal.note(
            f"not tried, because it has more than {trial.UP_TO // 10**6} million parameters; "
            "--trial wraps, packs and loads it once on a random input"
        )
        return
    terminal.say(_verdict(recipe, spec, network, plan))


def _check_alone(recipe: Recipe, try_out: bool | None) -> None:
    """Refuse what decides something of a model, where an artifact is looked at."""
    given = sorted(recipe.model_fields_set - {"model", "dataset", "output"})
    flags = [f"--{key.replace('_', '-')}" for key in given]
    if try_out is not None:
        flags += ["--trial and --no-trial"]
    if flags:
        raise RecipeError(f"{', '.join(flags)}: for a model, not for an artifact; leave it out.")


def _spec(recipe: Recipe) -> ModelSpec:
    source = models.find_source(recipe.model)
    trust = recipe.trust_remote_code
    task = recipe.task or models.guess_task(recipe.model, source, trust_remote_code=trust)
    if recipe.image_size is not None and source == "transformers":
        raise RecipeError(
            f"--image-size does not go with {recipe.model!r}, whose own config says the size of "
            "its images, if it takes any; leave it out."
        )
    return ModelSpec(source, recipe.model, task, (), {})


def _bare(recipe: Recipe, spec: ModelSpec) -> nn.Module:
    return models.load_bare(
        spec.name,
        spec.source,
        spec.task,
        trust_remote_code=recipe.trust_remote_code,
        image_size=recipe.image_size,
    ).float()


def _verdict(recipe: Recipe, spec: ModelSpec, network: nn.Module, plan: Plan) -> str:
    """Try the network out, and say how that went.

    Raises:
        ModelError: it will not work.
    """
    inputs = trial.inputs_of(network, spec.source, spec.task, recipe.image_size)
    if inputs is None:
        return "not tried: the size of its images is not known; pass --image-size"

    def run(model: nn.Module) -> Tensor:
        return logits_of(model, spec, inputs)

    try:
        with torch.no_grad():
            run(network.eval())
    except CALLING as error:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in inputs.items())
        return f"not tried: the plain network fails on a random {shapes}: {first_line(error)}"
    try:
        idle = trial.attempt(network, _bare(recipe, spec), plan, run)
    except ModelError as error:
        raise ModelError(f"{spec.name} will not work: {error}") from error
    rest = (
        f"; no gradient reached {', '.join(idle)}, so that training would only round it"
        if idle
        else ""
    )
    return (
        "works: wrapped, packed and loaded, its output for a random input stayed the same to the "
        f"bit{rest}"
    )
