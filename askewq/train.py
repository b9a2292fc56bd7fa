"""`finetune(recipe)`: from a pretrained model to a packed, verified artifact, on Accelerate.

One way down: load, evaluate, plan, train with the skewed step, snap once, evaluate, pack, reload
and compare to the bit. Every step is a function of (seed, step): data order, augmentation and
dropout are drawn anew from them, so an interrupted run goes on exactly as it would have.
"""

import copy
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from askewq import (
    anneal,
    artifact,
    checkpoint,
    choices,
    distill,
    layers,
    models,
    output,
    report,
    wrap,
)
from askewq.batches import loaders, prepare_batch
from askewq.config import Recipe
from askewq.data import OpenData, open_data
from askewq.errors import DataError, DivergenceError, ModelError, OutputError, RecipeError
from askewq.evaluate import Evaluation, evaluate
from askewq.kernels import can_compile
from askewq.output import Progress
from askewq.spec import LoadedModel
from askewq.tasks import check_logits, logits_and_labels, score


def finetune(recipe: Recipe) -> dict[str, Any]:
    """Run a recipe; see the command `askewq finetune`.

    Returns:
        The content of metrics.json.

    Raises:
        AskewError: any bad input, before anything is written; a loss that diverges.
    """
    return _Run(recipe).execute()


class _Run:
    """One fine-tuning run: its parts, made once, and the order in which they are used."""

    def __init__(self, recipe: Recipe) -> None:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import (
            DataLoaderConfiguration,
            GradientAccumulationPlugin,
            ProjectConfiguration,
            set_seed,
        )

        # A process may run several recipes; Accelerate keeps the first one's precision otherwise.
        AcceleratorState._reset_state()
        recipe = output.resumed(recipe) if recipe.resume else recipe
        output.check(recipe)
        # Heads that are new to the task and own modules draw their first weights from this seed.
        set_seed(recipe.seed)
        self.loaded, self.data = _load(recipe)
        self.recipe = choices.resolve(recipe, self.loaded.spec.task, self.loaded.model)
        self.out = recipe.output
        self.accelerator = Accelerator(
            mixed_precision=recipe.mixed_precision,
            dynamo_backend="inductor" if recipe.compile else "no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=recipe.grad_accumulation, sync_with_dataloader=False
            ),
            dataloader_config=DataLoaderConfiguration(
                use_seedable_sampler=True, data_seed=recipe.seed
            ),
            log_with=None if recipe.report_to == "none" else recipe.report_to,
            project_config=ProjectConfiguration(str(self.out), logging_dir=str(self.out / "logs")),
        )
        if recipe.compile and not can_compile(self.accelerator.device.type):
            raise RecipeError(
                "compile: torch.compile does not work here, see the warning; leave it out."
            )
        train, evaluation = loaders(self.recipe, self.data, self.loaded.preprocessing)
        self.train_loader, self.eval_loader = self.accelerator.prepare(train, evaluation)
        self.model: nn.Module = self.loaded.model.to(self.accelerator.device)
        self.teacher = distill.load_teacher(recipe, self.loaded) if recipe.distill else None
        if self.teacher is not None:
            self.teacher.model.to(self.accelerator.device)
        self.taught_by: distill.Teacher | None = None  # in the low-bit steps
        self.plan = wrap.plan(
            self.model,
            recipe.bits,
            grid=recipe.grid,
            group_size=recipe.group_size,
            include=recipe.include,
            exclude=recipe.exclude,
        )
        self.steps = recipe.max_steps or max(
            1, math.ceil(recipe.epochs * len(self.train_loader) / recipe.grad_accumulation)
        )
        self.progress = Progress()
        self.step_seconds: list[float] = []

    def execute(self) -> dict[str, Any]:
        """Run from the start, or from the newest checkpoint, to the report."""
        self._try_one_batch()
        folder = output.newest_checkpoint(self.out) if self.recipe.resume else None
        if folder is not None:
            self.progress = output.read_progress(folder)
        elif self.recipe.resume:
            raise OutputError(
                f"--resume: {self.out} holds no checkpoint; start again with --overwrite."
            )
        self._prepare_output()
        if self.accelerator.is_main_process:
            report.print_start(self.loaded, self.plan, self.recipe, self.steps)
        full_precision = self.progress.step < self.recipe.full_precision_steps
        self._train_full_precision(folder if full_precision else None)
        self._train_low_bit(None if full_precision else folder)
        return self._finish()

    def _try_one_batch(self) -> None:
        """Find out what does not fit (labels, shapes, inputs) before anything is written."""
        spec = self.loaded.spec
        try:
            raw = next(iter(self.eval_loader))
        except (RuntimeError, ValueError) as error:
            raise DataError(
                f"the samples do not make a batch: {error}\nImages of different sizes need "
                "--image-size; texts need a tokenizer with a padding token."
            ) from error
        batch = prepare_batch(raw, self.loaded.preprocessing)
        self.model.eval()
        try:
            with torch.no_grad():
                logits, _ = logits_and_labels(self.model, spec, batch)
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
            shapes = {key: list(tensor.shape) for key, tensor in batch.items()}
            raise ModelError(
                f"the model fails on a first batch of {shapes}: {type(error).__name__}: {error}\n"
                "For images, --image-size sets the size and the number of values of --mean and "
                "--std the channels (1 or 3)."
            ) from error
        check_logits(logits, spec)
        if self.teacher is not None:
            distill.check_teacher(self.teacher, batch, logits)

    def _prepare_output(self) -> None:
        if self.accelerator.is_main_process:
            output.prepare(self.recipe)
        self.accelerator.wait_for_everyone()
        if self.recipe.report_to != "none":
            settings = {key: str(value) for key, value in self.recipe.model_dump().items()}
            self.accelerator.init_trackers("askewq", settings)

    def _train_full_precision(self, folder: Path | None) -> None:
        """Fine-tune ordinarily for the first steps, if the recipe asks for it, and evaluate."""
        recipe, count = self.recipe, self.recipe.full_precision_steps
        if self.progress.step < count:
            lr = recipe.full_precision_lr or 0.0
            optimizer = choices.plain_optimizer(recipe, self.model, lr)
            self._loop("full precision", optimizer, 0, count, folder, lambda _: {})
        if self.progress.full_precision is None:
            self.progress.full_precision = self._evaluate().value

    def _train_low_bit(self, folder: Path | None) -> None:
        """Wrap the model, evaluate plain rounding, and fine-tune under the constraint."""
        recipe, start = self.recipe, self.recipe.full_precision_steps
        if recipe.distill:
            self.taught_by = self.teacher or self._own_teacher(resumed=folder is not None)
        wrap.apply(self.model, self.plan)
        if self.progress.rounded is None:
            with layers.snapped(self.model):
                self.progress.rounded = self._evaluate().value
        lr = recipe.lr or 0.0
        optimizer, pacer = choices.low_bit_optimizer(recipe, self.model, lr)
        inside = pacer.feasible_share()
        counted_at = 0.0

        def before_step(progress: float) -> dict[str, float]:
            nonlocal inside, counted_at
            pacer.anneal(progress)
            if progress - counted_at > 0.02:  # counting reads every weight: fifty times a run
                inside, counted_at = pacer.feasible_share(), progress
            return {**pacer.shown(progress), "inside": inside}

        self._loop("low-bit", optimizer, start, start + self.steps, folder, before_step)
        self.inside = pacer.feasible_share()

    def _own_teacher(self, *, resumed: bool) -> distill.Teacher:
        """Return the network as it is before it is quantized; a resumed run reads it back."""
        path = self.out / output.CHECKPOINTS / "teacher.safetensors"
        if self.accelerator.is_main_process and not resumed:
            partial = path.with_suffix(".partial")
            save_model(self.model, str(partial))
            partial.replace(path)
        self.accelerator.wait_for_everyone()
        if not path.is_file():
            raise OutputError(f"--resume: {path} is missing; start again with --overwrite.")
        teacher = copy.deepcopy(self.model)
        load_model(teacher, str(path))
        return distill.Teacher(teacher, self.loaded.spec)

    def _loop(
        self,
        phase: str,
        optimizer: torch.optim.Optimizer,
        first: int,
        end: int,
        folder: Path | None,
        before_step: Callable[[float], dict[str, float]],
    ) -> None:
        """Train from step `first` (or the checkpoint in `folder`) to step `end`."""
        recipe, accelerator = self.recipe, self.accelerator
        full_lrs = [group["lr"] for group in optimizer.param_groups]
        model, prepared = accelerator.prepare(self.model, optimizer)
        if folder is not None:
            output.load_state(accelerator, folder)
        save_every = recipe.save_every or max(1, (end - first) // 10)
        batches = self._batches(self.progress.step * recipe.grad_accumulation)
        main = accelerator.is_main_process
        with report.progress_bar(phase, self.progress.step - first, end - first, main) as bar:
            while self.progress.step < end:
                began = time.perf_counter()
                step = self.progress.step
                share = (step - first) / (end - first)
                factor = anneal.lr_factor(share, recipe.lr_hold)
                for group, full_lr in zip(optimizer.param_groups, full_lrs, strict=True):
                    group["lr"] = full_lr * factor
                # The interval at the end of this step, so that the last step closes everything.
                shown = before_step((step + 1 - first) / (end - first))
                micro = [next(batches) for _ in range(recipe.grad_accumulation)]
                # After the batches are drawn: a loader that starts anew draws numbers of its own.
                torch.manual_seed(_mix(recipe.seed, step, accelerator.process_index))
                loss = self._step(model, prepared, micro, step)
                self.progress.step += 1
                elapsed = time.perf_counter() - began
                self.progress.seconds += elapsed
                self.step_seconds.append(elapsed)
                shown = {"loss": loss, "lr": optimizer.param_groups[-1]["lr"], **shown}
                report.advance(bar, shown)
                if recipe.report_to != "none":
                    accelerator.log(shown, step=self.progress.step)
                self._visit(phase, end, save_every)
        # Takes what `prepare` put on the model off again, so that the next phase can prepare it.
        for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
            self.model.__dict__.pop(name, None)
        accelerator.free_memory()

    def _step(
        self, model: nn.Module, optimizer: Any, micro: list[dict[str, Tensor]], step: int
    ) -> float:
        """Make one optimizer step out of some batches; return their mean loss."""
        total = 0.0
        model.train()
        for raw in micro:
            with self.accelerator.accumulate(model):
                batch = prepare_batch(raw, self.loaded.preprocessing, self.recipe.augment)
                with self.accelerator.autocast(), self._prepared_weights():
                    logits, labels = logits_and_labels(model, self.loaded.spec, batch)
                scores = score(logits, labels)
                loss = scores.loss.sum() / scores.count.sum()
                if self.taught_by is not None:
                    with self.accelerator.autocast():
                        taught = self.taught_by.logits(batch)
                    distance = distill.distance(logits, taught, labels, self.recipe.temperature)
                    loss = torch.lerp(loss, distance, self.recipe.distill)
                value = float(loss.detach())
                if not math.isfinite(value):
                    self._diverged(value, step)
                self.accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            total += value
        return total / len(micro)

    def _prepared_weights(self) -> AbstractContextManager[None]:
        return layers.prepared(self.model) if self.recipe.compile else nullcontext()

    def _diverged(self, loss: float, step: int) -> NoReturn:
        """Drop the checkpoint of the very weights that gave this loss, and say what is left."""
        if self.accelerator.is_main_process:
            output.drop_checkpoint(self.out, step)
        raise DivergenceError(
            f"the loss is {loss} at step {step}; the last checkpoint is "
            f"{output.newest_checkpoint(self.out) or 'the start'}. Try a smaller --lr than "
            f"{self.recipe.lr:g}, or --mixed-precision no."
        )

    def _batches(self, consumed: int) -> Iterator[dict[str, Tensor]]:
        """Yield training batches without end, from the place after `consumed` ones."""
        epoch, skip = divmod(consumed, len(self.train_loader))
        while True:
            self.train_loader.set_epoch(epoch)
            loader = self.train_loader
            yield from self.accelerator.skip_first_batches(loader, skip) if skip else loader
            epoch, skip = epoch + 1, 0

    def _visit(self, phase: str, end: int, save_every: int) -> None:
        """After a step: evaluate and save where it is time to."""
        step, recipe = self.progress.step, self.recipe
        if recipe.eval_every and step % recipe.eval_every == 0 and step < end:
            with layers.snapped(self.model):
                result = self._evaluate()
            if self.accelerator.is_main_process:
                report.print_evaluation(phase, step, result)
            if recipe.report_to != "none":
                self.accelerator.log({result.metric: result.value}, step=step)
        if step % save_every == 0 and step < end:
            output.save_checkpoint(self.accelerator, self.out, self.progress)

    def _evaluate(self, *also: nn.Module) -> Evaluation:
        """Evaluate the model; `also` names models that must equal it to the bit."""
        return evaluate(
            [self.model, *also],
            self.loaded.spec,
            self.loaded.preprocessing,
            self.eval_loader,
            self.accelerator,
        )

    def _finish(self) -> dict[str, Any]:
        """Snap, evaluate, pack, reload, compare, report."""
        relaxed = self._evaluate()
        if not math.isfinite(relaxed.loss):
            raise DivergenceError(
                f"the loss is {relaxed.loss} after the last step; nothing was packed. Try a "
                f"smaller --lr than {self.recipe.lr:g}."
            )
        layers.snap_(self.model)
        snapped = self._evaluate().value
        path = self.out / artifact.ARTIFACT
        if self.accelerator.is_main_process:
            checkpoint.save(self.model, path)
            artifact.save_config(self.loaded, self.out)
        self.accelerator.wait_for_everyone()
        reloaded = models.build(self.loaded.spec)
        checkpoint.load_into(reloaded, checkpoint.read(path))
        same = self._evaluate(reloaded.to(self.accelerator.device))
        metrics = {
            "model": self.recipe.model,
            "task": self.recipe.task,
            "bits": self.recipe.bits,
            "method": self.recipe.method,
            "metric": same.metric,
            "full_precision": self.progress.full_precision,
            "rounded": self.progress.rounded,
            "relaxed": relaxed.value,
            "snapped": snapped,
            "reloaded": same.value,
            "parameters": {
                "total": self.plan.total_parameters,
                "quantized": self.plan.quantized_parameters,
                "share": self.plan.quantized_parameters / self.plan.total_parameters,
            },
            "bytes": {
                "full_precision": 4 * self.plan.total_parameters + _buffer_bytes(reloaded),
                "packed": path.stat().st_size,
            },
            "bits_per_weight": self.plan.bits_per_weight,
            "inside_interval": self.inside,
            "steps": self.progress.step,
            "seconds": self.progress.seconds,
            "step_seconds": statistics.median(self.step_seconds) if self.step_seconds else None,
            "peak_memory_bytes": report.peak_memory(),
        }
        if self.accelerator.is_main_process:
            output.write(self.out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
            output.write(
                self.out / "README.md", report.model_card(metrics, self.recipe, self.loaded)
            )
            report.print_result(metrics, self.out)
        if self.recipe.report_to != "none":
            self.accelerator.end_training()
        return metrics


def _load(recipe: Recipe) -> tuple[LoadedModel, OpenData]:
    source = models.find_source(recipe.model)
    trust = recipe.trust_remote_code
    task = recipe.task or models.guess_task(recipe.model, source, trust_remote_code=trust)
    data = open_data(recipe, task)
    loaded = models.load(
        recipe.model,
        task,
        data.labels,
        source=source,
        pretrained=recipe.pretrained,
        weights=recipe.weights,
        tokenizer=recipe.tokenizer,
        trust_remote_code=trust,
        image_size=recipe.image_size,
        mean=recipe.mean,
        std=recipe.std,
        max_length=recipe.max_length,
    )
    return loaded, data


def _buffer_bytes(model: nn.Module) -> int:
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return sum(t.nbytes for name, t in model.state_dict().items() if name not in parameters)


def _mix(*numbers: int) -> int:
    """Return one seed for a tuple of numbers, without the overlaps of their sum."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return mixed
