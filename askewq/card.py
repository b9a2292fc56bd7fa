"""The model card of an artifact: README.md, with what the Hub reads at its top."""

from pathlib import Path
from typing import Any

import yaml

from askewq.config import Recipe
from askewq.hf_models import auto_class_name
from askewq.recipe_files import to_yaml
from askewq.spec import LoadedModel, ModelSpec, path_of
from askewq.text import fence, markdown
from askewq.vocabulary import EMBEDDING_TASKS
from askewq.wording import size_text, weights_name, width_name

_PIPELINE: dict[str, str] = {
    "image-classification": "image-classification",
    "text-classification": "text-classification",
    "causal-lm": "text-generation",
    "feature-extraction": "feature-extraction",
    "image-feature-extraction": "image-feature-extraction",
}
# Keys of a recipe that may name a file or folder.
NAMES = (
    *("model", "weights", "tokenizer", "dataset"),
    *("teacher", "teacher_weights", "output"),
)


def model_card(metrics: dict[str, Any], recipe: Recipe, loaded: LoadedModel) -> str:
    """Return README.md of an artifact: how to load it, what it measures, how it was made."""
    header = yaml.safe_dump(_metadata(metrics, recipe, loaded.spec), sort_keys=False)
    recipe = _without_folders(recipe)
    settings = to_yaml(recipe)
    block = fence(settings)
    sizes, metric = metrics["bytes"], metrics["metric"]
    rows = "\n".join(
        f"| {name} | {metrics[key]:.2f} |"
        for name, key in (
            ("full precision", "full_precision"),
            ("rounded, no training", "rounded"),
            ("this model", "reloaded"),
        )
    )
    return f"""---
{header.strip()}
---
# {markdown(recipe.model)} at {width_name(metrics)}

**Load it with askewq.** The weights are packed; without askewq, transformers and timm refuse them.

{_how_to_load(loaded)}
{_similarity(loaded.spec, recipe)}
| | {metric} on {markdown(recipe.dataset)} |
|---|---|
{rows}

{metrics["parameters"]["share"]:.1%} of {metrics["parameters"]["total"]:,} parameters are packed at
{metrics["bits_per_weight"]:.2f} bits a weight: {size_text(sizes["packed"])} instead of
{size_text(sizes["full_precision"])}. The {metric} is that of the reloaded file.

Fine-tuned by askewq with the method `{recipe.method}`{_source(recipe)}; the recipe:

{block}yaml
{settings}{block}
"""


def _without_folders(recipe: Recipe) -> Recipe:
    """Return a recipe for a page: where its files lie on this machine is nobody's business."""
    given = {key: getattr(recipe, key) for key in NAMES}
    local = {
        key: type(name)(Path(name).name)
        for key, name in given.items()
        if name is not None and path_of(str(name)).exists()
    }
    return recipe.model_copy(update=local)


def _metadata(metrics: dict[str, Any], recipe: Recipe, spec: ModelSpec) -> dict[str, Any]:
    """Return what the Hub reads of a model card."""
    header: dict[str, Any] = {
        "library_name": "askewq",
        "pipeline_tag": _PIPELINE[spec.task],
        "tags": ["askewq", "quantized", "low-bit", weights_name(metrics).replace(" ", "-")],
    }
    if spec.task == "feature-extraction":
        header["tags"].append("sentence-similarity")
    if base := _base_model(recipe, spec):
        header["base_model"] = base
        header["base_model_relation"] = "quantized"
    public = not path_of(recipe.dataset).exists()
    if public:
        header["datasets"] = [recipe.dataset]
    header["metrics"] = [metrics["metric"]]
    measured = {"type": metrics["metric"], "value": round(metrics["reloaded"], 4)}
    dataset = {"name": Path(recipe.dataset).name, "type": recipe.dataset if public else "local"}
    task = {"type": _PIPELINE[spec.task]}
    result = {"task": task, "dataset": dataset, "metrics": [measured]}
    name = f"{Path(recipe.model).name} at {width_name(metrics)}"
    header["model-index"] = [{"name": name, "results": [result]}]
    return header


def _base_model(recipe: Recipe, spec: ModelSpec) -> str | None:
    """Return the Hub's id of the weights that a run started from, if they are there."""
    pretrained = recipe.pretrained and recipe.weights is None
    if spec.source == "module" or not pretrained or path_of(recipe.model).exists():
        return None
    name = recipe.model.removeprefix("hf-hub:").removeprefix("hf_hub:")
    if spec.source == "transformers" or "/" in name:
        return name
    import timm

    known = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return (known.hf_hub_id or None) if known else None


def _how_to_load(loaded: LoadedModel) -> str:
    """Return the calls that load an artifact, in every library that can."""
    spec = loaded.spec
    own = spec.source == "module"
    call = "folder, model=factory()" if own else "folder"
    text = f"""```python
import askewq
folder = "..."  # of these files: huggingface_hub.snapshot_download("owner/name") returns it
model = askewq.load({call})  # a plain {spec.source} network with dense float32 weights
model = askewq.load({call}, packed=True)  # same logits under torch.no_grad(); unpacks on use
```"""
    if spec.source == "transformers":
        text += f"""

With transformers, packed:

```python
import askewq
from transformers import {auto_class_name(spec.task)}
model = {auto_class_name(spec.task)}.from_pretrained(folder_or_repo)
```"""
    # Without its files sentence-transformers takes the mean.
    if spec.task == "feature-extraction" and (loaded.beside or spec.pooling == "mean"):
        text += """

With sentence-transformers, packed:

```python
import askewq
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(folder_or_repo)
```"""
    return text


def _similarity(spec: ModelSpec, recipe: Recipe) -> str:
    """Return what the metric of a task without labels is; nothing for other tasks."""
    if spec.task not in EMBEDDING_TASKS:
        return ""
    teacher = "the full-precision model"
    if recipe.teacher not in (None, "self"):
        teacher = markdown(f"the teacher {recipe.teacher}")
    elif recipe.teacher_weights is not None:
        teacher = "its teacher, the same network with other weights"
    return f"""
{_embedding(spec)}; similarity is 100 times the mean cosine to
the embeddings of {teacher}.
"""


def _embedding(spec: ModelSpec) -> str:
    """Return how an embedding is read off the network's output."""
    if spec.source != "transformers":
        return "The network's output for an image is its embedding"
    if spec.task == "image-feature-extraction":
        return "An image's embedding is `pooler_output`"
    states = {
        "mean": "the mean of `last_hidden_state` over the tokens",
        "cls": "the `last_hidden_state` of the first token",
        "lasttoken": "the `last_hidden_state` of the last token",
    }
    return f"A text's embedding is {states[spec.pooling]} whose\n`attention_mask` is 1"


def _source(recipe: Recipe) -> str:
    ours = recipe.method.startswith("askewsgd")
    return " (Leconte, Schechtman, Moulines, AISTATS 2023)" if ours else ""
