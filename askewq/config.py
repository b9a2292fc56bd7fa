"""Recipe: the one typed object behind YAML recipes and command-line flags.

Every field is a recipe key and a flag of the same name; the command line is generated from this
class. A recipe read back from the file that a run wrote equals the recipe of that run.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from askewq.contradictions import complaints
from askewq.errors import RecipeError, near
from askewq.vocabulary import (
    EMBEDDING_TASKS,
    ActBits,
    Augmentation,
    Bits,
    Closing,
    GridKind,
    GroupSize,
    Method,
    Pull,
    Task,
)

MODEL, DATA, BITS, TRAIN, DISTILL, METHOD, CLOSING, OUTPUT = (
    "Model",
    "Data",
    "Low-bit weights",
    "Training",
    "Distillation",
    "Method",
    "Interval constraint of AskewSGD",
    "Output",
)


def _key(default: Any, group: str, help: str, **limits: Any) -> Any:
    """Declare a recipe key: its default, the group it is listed in, and its help line."""
    extra = {"group": group}
    return Field(default, description=help, json_schema_extra=extra, **limits)  # type: ignore[arg-type]  # pydantic's dict type is wider


def at_home(path: str | Path) -> Path:
    """Return a path whose ~ is resolved, as a shell does where it has no quotes around it.

    Raises:
        ValueError: ~NAME of nobody.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"starts at a home that is not known ({error})") from error


class Recipe(BaseModel):
    """All settings of `askewq finetune`: each field is the flag of the same name.

    Raises:
        RecipeError: with every unknown key, wrong value and contradiction in one message.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    if not TYPE_CHECKING:  # a checker knows the fields

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise _refusal(error, "the settings") from error

    model: str = _key(
        ..., MODEL, "timm name, Hugging Face id or folder, or path/to/file.py:factory"
    )
    weights: Path | None = _key(None, MODEL, "state dict to start from (safetensors)")
    pretrained: bool = _key(True, MODEL, "start from the pretrained weights")
    task: Task | None = _key(None, MODEL, "guessed from the model where that is safe")
    tokenizer: str | None = _key(None, MODEL, "Hugging Face id or folder, if not the model's own")
    trust_remote_code: bool = _key(False, MODEL, "run code that comes with a tokenizer or teacher")

    dataset: str = _key(
        ..., DATA, "Hub id, or a local file or folder (parquet, csv, json, text, images)"
    )
    dataset_config: str | None = _key(None, DATA, "configuration of a Hub data set")
    train_split: str = _key("train", DATA, "such as train or 'train[:90%]'")
    eval_split: str | None = _key(None, DATA, "validation if there is one, else test")
    image_column: str | None = _key(None, DATA, "guessed from the features")
    text_columns: tuple[str, ...] = _key((), DATA, "one, or two for pairs; guessed")
    label_column: str | None = _key(None, DATA, "guessed from the features")
    image_size: int | None = _key(None, DATA, "pixels; the model's own by default", ge=1)
    mean: tuple[float, ...] | None = _key(None, DATA, "per channel, images in 0..1")
    std: tuple[float, ...] | None = _key(None, DATA, "per channel, images in 0..1")
    augment: Augmentation = _key("none", DATA, "light training augmentation of images")
    max_length: int | None = _key(
        None,
        DATA,
        "tokens of a text; by default the model's own limit, at most 512, in eval the run's",
        ge=2,
    )
    max_train_samples: int | None = _key(None, DATA, "train on a random part", ge=1)
    max_eval_samples: int | None = _key(None, DATA, "evaluate on a random part", ge=1)
    num_workers: int = _key(0, DATA, "processes that decode images", ge=0)
    streaming: bool = _key(
        False, DATA, "read training data as they are needed, for sets larger than memory; max_steps"
    )
    shuffle_buffer: int = _key(1000, DATA, "samples shuffled at a time (streaming)", ge=1)

    bits: Bits = _key(2, BITS, "1: {-1,1}; ternary: {-1,0,1}; 2: four levels; ... 8")
    grid: GridKind = _key(
        "auto",
        BITS,
        "integer (2 bits: {-2,-1,0,1}), half-integer (2 bits: {-1.5,-0.5,0.5,1.5}: more accurate, "
        "but compressed-tensors needs a bit more for it), or auto: half-integer at 2 bits alone",
    )
    group_size: GroupSize = _key(
        "channel", BITS, "weights that share a scale: a number, an output channel, or all"
    )
    act_bits: ActBits = _key(
        "none", BITS, "round the inputs of the quantized layers, too: 1 to 8 bits, or none"
    )
    include: tuple[str, ...] = _key(
        (), BITS, "quantize exactly the layers that match, first, last and embeddings too; globs"
    )
    exclude: tuple[str, ...] = _key((), BITS, "leave matching layers in full precision; globs")
    bits_override: tuple[str, ...] = _key(
        (), BITS, "other bits for the quantized layers that match: PATTERN=B, such as 'layer4.*=4'"
    )

    optimizer: Literal["sgd", "adamw"] | None = _key(
        None,
        TRAIN,
        "by default adamw, or sgd for models with batch norm without level_lr; named, it makes all "
        "steps in the weights' own units, unless level_lr is given, too",
    )
    lr: float | None = _key(
        None,
        TRAIN,
        "0.02 for sgd, 1e-4 for adamw; 1e-2 beside level_lr, where a float matrix moves by that "
        "share of its root mean square",
        gt=0,
    )
    level_lr: float | None = _key(
        None,
        TRAIN,
        "lr of the quantized weights in level spacings (adamw), beside lr for the rest; by default "
        "only for models with batch norm, up to 4 bits and lazy closing: 0.005, and 0.01 at 1 bit "
        "up to 1,500 steps",
        gt=0,
    )
    lr_hold: float = _key(
        0.5, TRAIN, "share of the steps at full lr, before its cosine", ge=0, lt=1
    )
    momentum: float = _key(0.9, TRAIN, "of sgd", ge=0, lt=1)
    weight_decay: float = _key(0.0, TRAIN, "of the base optimizer", ge=0)
    epochs: float = _key(5.0, TRAIN, "passes over the training data", gt=0)
    max_steps: int | None = _key(None, TRAIN, "optimizer steps, instead of epochs", ge=1)
    full_precision_steps: int = _key(
        0, TRAIN, "steps of ordinary fine-tuning first, for a model new to the task", ge=0
    )
    full_precision_lr: float | None = _key(
        None, TRAIN, "lr of those steps; lr by default, 1e-4 beside level_lr", gt=0
    )
    batch_size: int = _key(64, TRAIN, "samples per process and micro-step", ge=1)
    grad_accumulation: int = _key(1, TRAIN, "micro-steps per optimizer step", ge=1)
    mixed_precision: Literal["no", "bf16"] = _key("no", TRAIN, "autocast of the forward pass")
    average: float = _key(
        0.0,
        TRAIN,
        "what a moving average of the parameters that stay float keeps a step, such as 0.99; it "
        "takes their place at the end; 0: none",
        ge=0,
        lt=1,
    )
    recalibrate_bn: int = _key(
        0, TRAIN, "batches that give batch norm new statistics after the snap", ge=0
    )
    polish_steps: int = _key(
        0,
        TRAIN,
        "steps after the snap, in which codes rest, and scales, biases and norms train",
        ge=0,
    )
    polish_lr: float = _key(
        1e-3, TRAIN, "lr of those steps, by adamw; of a scale, a share of it", gt=0, lt=1
    )
    compile: bool = _key(
        False, TRAIN, "compile the network: faster steps, after the time that compiling takes"
    )
    nan_policy: str = _key(
        "stop",
        TRAIN,
        "at a loss or gradient that is NaN or infinite: stop, or skip:N (pass over up to N steps)",
    )
    seed: int = _key(
        0, TRAIN, "of data order, augmentation, dropout and new layers", ge=0, lt=2**32
    )

    distill: float = _key(
        0.0, DISTILL, "share of the loss that a teacher gives, in the low-bit steps", ge=0, le=1
    )
    distill_hidden: float = _key(
        0.0,
        DISTILL,
        "weight of the distance from a teacher's hidden states, beside the loss (transformers)",
        ge=0,
    )
    teacher: str | None = _key(
        None,
        DISTILL,
        "a model, as for --model; self by default: the network before it is quantized",
    )
    teacher_weights: Path | None = _key(
        None, DISTILL, "state dict of the teacher, by default a network like the model"
    )
    temperature: float = _key(2.0, DISTILL, "softens teacher and student alike", gt=0)

    method: Method = _key("askewsgd", METHOD, "how the weights reach the grid (docs/methods.md)")
    strength: float | None = _key(
        None,
        METHOD,
        "final coefficient of proxquant (1.8 over the steps), binaryrelax (500) or mirror-descent "
        "(20,000)",
        gt=0,
    )
    gradient_bits: int | None = _key(
        None,
        METHOD,
        "width of luq's neural gradients (4 as published); float by default",
        ge=2,
        le=7,
    )
    closing: Closing | None = _key(
        None,
        CLOSING,
        "lazy (the forward pass sees the nearest point of the intervals), staggered (weight by "
        "weight, no copy of the weights), or single: one radius for all",
    )
    close_start: float | None = _key(
        None, CLOSING, "progress at which closing starts; 0, of askewsgd-paper 0.5", ge=0, lt=1
    )
    close_end: float | None = _key(
        None, CLOSING, "progress at which all is closed; 0.9, of askewsgd-paper 1", gt=0, le=1
    )
    close_power: float | None = _key(None, CLOSING, "shape 1-(1-t)^power; 3, for single 1", gt=0)
    close_every: int = _key(3, CLOSING, "steps between closings (staggered)", ge=1)
    final_radius: float = _key(0.01, CLOSING, "in level spacings (single)", gt=0, lt=0.5)
    pull: Pull | None = _key(
        None, CLOSING, "decoupled, or coupled: lr multiplies alpha and clip, as in the paper"
    )
    alpha: float | None = _key(
        None, CLOSING, "share of a Newton step toward the interval; 0.5, coupled 5", gt=0
    )
    clip: float | None = _key(
        None, CLOSING, "longest pull in one step, in level spacings; 0.1, coupled 5", gt=0
    )

    output: Path = _key(..., OUTPUT, "folder for the artifact and the checkpoints")
    eval_every: int | None = _key(None, OUTPUT, "steps between evaluations; at the end only", ge=1)
    save_every: int | None = _key(
        None, OUTPUT, "steps between checkpoints; a tenth of a phase", ge=1
    )
    keep: int = _key(2, OUTPUT, "newest checkpoints that are kept", ge=1)
    resume: bool = _key(False, OUTPUT, "go on from the newest checkpoint in output")
    overwrite: bool = _key(False, OUTPUT, "replace what is in output")
    report_to: Literal["none", "tensorboard", "wandb"] = _key("none", OUTPUT, "tracker")

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse yes and no where neither is meant: True equals 1, which is a number of bits."""
        if info.field_name == "mixed_precision" and value is False:
            return "no"  # as YAML reads it without quotes
        wanted = cls.model_fields[info.field_name or ""].annotation
        given = value if isinstance(value, list | tuple) else [value]
        if wanted is not bool and any(isinstance(one, bool) for one in given):
            raise ValueError("must not be yes, no, true or false (quote it where it is a name)")
        return value

    @field_validator("include", "exclude", "bits_override", "text_columns", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("bits_override")
    @classmethod
    def _check_overrides(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        widths: dict[str, Bits] = {}
        for text in value:
            pattern, bits = parse_override(text)
            if widths.setdefault(pattern, bits) != bits:
                raise ValueError(f"gives {pattern!r} both {widths[pattern]} and {bits} bits")
        return value

    @property
    def overrides(self) -> dict[str, Bits]:
        """The bits of layers that match a pattern."""
        return dict(map(parse_override, self.bits_override))

    @property
    def taught(self) -> bool:
        """Whether there is a teacher, be it the network before it is quantized."""
        return self.task in EMBEDDING_TASKS or self.distill > 0 or self.distill_hidden > 0

    @field_validator("model", "teacher", "tokenizer", "dataset")
    @classmethod
    def _expand_name(cls, value: str | None) -> str | None:
        return str(at_home(value)) if value and value[0] == "~" else value

    @field_validator("weights", "teacher_weights", "output")
    @classmethod
    def _expand_path(cls, value: Path | None) -> Path | None:
        return value and at_home(value)

    @field_validator("nan_policy")
    @classmethod
    def _check_policy(cls, value: str) -> str:
        if not re.fullmatch(r"stop|skip:[1-9][0-9]{0,8}", value):
            raise ValueError("must be stop, or skip:N with a whole number N above 0")
        return value

    @model_validator(mode="after")
    def _check_combinations(self) -> "Recipe":
        if wrong := complaints(self):
            raise ValueError("; ".join(wrong))
        return self


def parse_override(text: str) -> tuple[str, Bits]:
    """Return pattern and bits of an override, PATTERN=B.

    Raises:
        ValueError: it is none.
    """
    pattern, _, width = text.rpartition("=")
    allowed = {str(bits): bits for bits in get_args(Bits)}
    if not pattern or width not in allowed:
        raise ValueError(f"{text!r} must be PATTERN=B with B one of {', '.join(allowed)}")
    return pattern, allowed[width]


def check(recipe: Recipe) -> None:
    """Check a recipe again after choices were made in it.

    Raises:
        RecipeError: settings that contradict each other, or that would decide nothing.
    """
    if wrong := complaints(recipe):
        raise RecipeError(f"the settings cannot be used: {'; '.join(wrong)}.")


def build(values: dict[str, Any], source: str = "the settings") -> Recipe:
    """Return the Recipe with these values.

    Raises:
        RecipeError: with every unknown key and wrong value in one message.
    """
    try:
        return Recipe(**values)
    except RecipeError as error:
        if isinstance(error.__cause__, ValidationError):
            raise _refusal(error.__cause__, source) from error.__cause__
        raise


def _refusal(error: ValidationError, source: str) -> RecipeError:
    wrong = [_describe(dict(item)) for item in error.errors()]
    return RecipeError(f"{source} cannot be used:\n  " + "\n  ".join(wrong))


def _describe(item: dict[str, Any]) -> str:
    key = str(item["loc"][0]) if item["loc"] else ""
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        return f"{key}: no such key{near(key, Recipe.model_fields)}"
    if item["type"] == "missing":
        return f"{key}: missing; give --{key.replace('_', '-')} or the recipe key"
    return f"{key}: {message}, not {item['input']!r}" if key else message
