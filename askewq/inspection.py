"""`askewq inspect`: the plan for a model before any training, or what an artifact holds."""

from pathlib import Path

from askewq import artifact, checkpoint, models, report, wrap
from askewq.config import Recipe


def inspect(recipe: Recipe, *, verify: bool = False) -> None:
    """Print the plan for the model of a recipe, or the content of the artifact it names.

    Args:
        verify: say what was checked of the artifact instead.

    Raises:
        AskewError: a model that cannot be loaded or has nothing to quantize; a damaged artifact.
    """
    folder = Path(recipe.model)
    if verify:
        report.print_lines(artifact.verify(folder))
        return
    if artifact.is_artifact(folder):
        spec, _ = artifact.read_spec(folder)
        report.print_artifact(spec, checkpoint.read(folder / artifact.ARTIFACT))
        return
    source = models.find_source(recipe.model)
    trust = recipe.trust_remote_code
    task = recipe.task or models.guess_task(recipe.model, source, trust_remote_code=trust)
    network = models.load_bare(
        recipe.model, source, task, trust_remote_code=trust, image_size=recipe.image_size
    )
    plan = wrap.plan(
        network,
        recipe.bits,
        grid=recipe.grid,
        group_size=recipe.group_size,
        include=recipe.include,
        exclude=recipe.exclude,
        act_bits=recipe.act_bits,
        bits_override=recipe.overrides,
    )
    report.print_plan(plan)
