"""The training loop: `transformers.Trainer`, wired so that a killed run resumes to the same numbers.

A run writes into its output folder: `checkpoint/` (the trained model), `checkpoints/checkpoint-N/` (what a resume
needs), `logs/` (TensorBoard), `training.json` (the loss curve; there only once the run is finished).
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_pt_utils import safe_globals
from transformers.utils import logging as transformers_logging

from foveate.errors import CheckpointError, RecipeError
from foveate.files import atomic_folder, atomic_write
from foveate.language.pretrained import first_line
from foveate.training.optimizers import MuonAdamW
from foveate.training.recipes import TrainingSettings
from foveate.training.sampling import EpochSampler, LengthGroupedSampler, SampleLengths
from foveate.training.schedules import learning_rate_factor

logger = logging.getLogger(__name__)


@dataclass
class TrainingTask:
    """What a method's `build(recipe)` returns: the parts that the loop trains.

    Attributes:
        model: its forward takes the collated batch as keywords and returns an object (or dict) with `loss` (scalar,
            a mean over the micro-batch: gradient accumulation takes the mean of these) and, if it has parts worth a
            curve of their own, `losses` (name -> scalar). Only parameters with `requires_grad` are trained.
        train_dataset: map-style, best a `SeededDataset`; or an endless iterable one.
        collate: list of samples -> dict of tensors; torch's default collation where None.
        save: writes the finished model (and its processor) into a folder; `save_pretrained` where None.
        after_training: called once, in the main process, with the trained and saved model in eval mode and the output
            folder; the model is saved again after it, with what it changed (a calibration, say).
        parameter_groups: model -> AdamW parameter groups, in place of `parameter_groups(model, weight_decay)`.
        save_frozen: False leaves frozen parameters out of the checkpoints to resume from, where building the task
            again gives them anyway. Keep True if something else than the optimiser changes them (a moving average).
        shard: frozen modules, such as the layers of a language model, that `training.shard_frozen` splits between the
            processes; each is gathered while it runs. `save` must not need them.
        lengths: of each sample, to make batches of similar lengths; None for batches of any.
        save_state: writes the finished model into a folder from its whole state dict, for runs in which accelerate's
            FSDP or DeepSpeed splits what is trained between the processes; None refuses such runs.
    """

    model: nn.Module
    train_dataset: Dataset[Any]
    collate: Callable[[list[Any]], dict[str, Any]] | None = None
    save: Callable[[Path], None] | None = None
    after_training: Callable[[nn.Module, Path], None] | None = None
    parameter_groups: Callable[[nn.Module], list[dict[str, Any]]] | None = None
    save_frozen: bool = True
    shard: Sequence[nn.Module] = ()
    lengths: SampleLengths | None = None
    save_state: Callable[[Path, dict[str, torch.Tensor]], None] | None = None


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Attributes:
        output: the run's folder.
        checkpoint: the trained model's folder.
        steps: optimiser steps in all, those before a resume included.
        seconds: wall-clock time of this call.
        history: a dict for each logged step: step, epoch, loss (mean since the last one), its parts, learning_rate,
            grad_norm (of that step, before clipping).
    """

    output: Path
    checkpoint: Path
    steps: int
    seconds: float
    history: list[dict[str, float]] = field(repr=False)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two AdamW groups of the trainable parameters: no decay below two dimensions (biases, norms, scales)."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]


def resolve_precision(precision: str) -> str:
    """Gives "fp32" or "bf16"; "auto" is bf16 where the GPU, or without one the CPU (AVX-512 BF16, AMX), computes in it.

    Raises:
        RecipeError: bf16 is asked for and the GPU cannot.
    """
    if torch.cuda.is_available():
        hardware = torch.cuda.is_bf16_supported(including_emulation=False)
        if precision == "bf16" and not hardware:
            name = torch.cuda.get_device_name()
            raise RecipeError(f"training.precision is bf16, which {name} does not compute in; set it to auto or fp32.")
    else:
        hardware = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if precision == "auto":
        return "bf16" if hardware else "fp32"
    return precision


def run(
    task: TrainingTask,
    settings: TrainingSettings,
    output: str | Path,
    seed: int,
    resume: bool | Path = False,
    on_start: Callable[[Path], Any] | None = None,
) -> TrainResult:
    """Train `task.model` and save it to `output/checkpoint`.

    Args:
        task: model and data; build it after seeding, so that a resumed run builds the same one.
        settings: the recipe's `training` section.
        output: folder of the run.
        seed: of data order, per-sample randomness, dropout.
        resume: True goes on from the newest checkpoint of `output` (from the start if the run was killed before its
            first one), a path from that checkpoint. The loss curve is the one of an uninterrupted run.
        on_start: called with the output folder in the main process once it is clear that the run may use it and, where
            it resumes, that all of the checkpoint fits: a refused run changes nothing in `output`.

    Raises:
        RecipeError: the data has less than a batch; nothing is trainable; `output` holds an unfinished run and
            `resume` is False; the loss or a weight becomes NaN or infinite (no such checkpoint is ever written).
        CheckpointError: the checkpoint to resume from is incomplete or of another model.
    """
    started = time.perf_counter()
    output = Path(output)
    folder = output / "checkpoints"
    _ensure_log_lines()
    if not any(parameter.requires_grad for parameter in task.model.parameters()):
        raise RecipeError("No parameter of the model is trainable; check which parts the recipe freezes.")
    splitter = split_by()
    if splitter is not None and (task.save_state is None or task.after_training is not None):
        # It would split what is trained too, which this method saves whole only.
        raise RecipeError(
            f"accelerate was set up with {splitter}; launch with recipes/accelerate/gpus.yaml, and let "
            "training.shard_frozen split the frozen language model."
        )
    if splitter is not None and (settings.shard_frozen or settings.optimizer != "adamw"):
        raise RecipeError(
            f"accelerate was set up with {splitter}, which splits all of the model and its AdamW; set "
            "training.shard_frozen to false and training.optimizer to adamw."
        )
    if settings.shard_frozen and (task.save_frozen or not task.shard):
        raise RecipeError("This model has no frozen part that can be split; set training.shard_frozen to false.")
    if not resume:
        _refuse_unfinished(output)

    cuda = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=not cuda,
        bf16=resolve_precision(settings.precision) == "bf16",
        max_steps=1,  # set below, once the number of processes is known
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        max_grad_norm=settings.max_grad_norm,
        learning_rate=settings.learning_rate,
        logging_strategy="steps",
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps" if settings.save_every else "no",
        save_steps=settings.save_every or 1,
        seed=seed,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
    )
    steps_per_epoch, total_steps = _count_steps(task, settings, arguments.world_size)
    arguments.max_steps = total_steps
    rank = arguments.process_index if arguments.world_size > 1 else None
    from_checkpoint = _resume_point(folder, resume, rank) if resume else None
    start_step = _trainer_state(from_checkpoint).global_step if from_checkpoint else 0

    config = getattr(task.model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    progress = _Progress(settings, total_steps, start_step)
    callbacks: list[TrainerCallback] = [progress]
    start = _Start(output, start_step, fresh=not resume, then=on_start)
    if arguments.process_index == 0:
        callbacks = [start, progress, start.tensorboard]
    trainer = _Trainer(task, settings, arguments, callbacks, steps_per_epoch)
    trainer.accelerator.wait_for_everyone()

    if start_step >= total_steps and from_checkpoint is not None and splitter is not None:
        raise RecipeError(f"{from_checkpoint} is of the last step; {_without(from_checkpoint)}.")
    if start_step >= total_steps and from_checkpoint is not None:
        # Killed between its last checkpoint and the final save: the loop would do one step too many.
        trainer._load_from_checkpoint(str(from_checkpoint))
        trainer.state.log_history = _trainer_state(from_checkpoint).log_history
        trainer.state.global_step = start_step
        if arguments.process_index == 0:
            start.claim()
    else:
        try:
            trainer.train(resume_from_checkpoint=str(from_checkpoint) if from_checkpoint else None)
        finally:
            progress.close()
            trainer.stop_workers()

    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    model = task.model
    if config is not None:
        # The Trainer switches the cache off in the config; generation after loading wants it as it was.
        if use_cache is None:
            config.__dict__.pop("use_cache", None)
        else:
            config.use_cache = use_cache
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    seconds = time.perf_counter() - started
    result = TrainResult(output, output / "checkpoint", trainer.state.global_step, seconds, history)
    # Every process takes part in putting a split model together.
    whole: Any = trainer.accelerator.get_state_dict(trainer.model_wrapped) if splitter is not None else None
    if arguments.process_index == 0:
        model.eval()
        if task.after_training is not None:
            _check_finite_parameters(model, trainer)
            _save_model(task, result.checkpoint)  # what was trained stays, should the next step fail
            task.after_training(model, output)
        _check_finite_parameters(model, trainer)
        _save_model(task, result.checkpoint, whole)
        with atomic_write(output / "training.json") as file:
            json.dump({"steps": result.steps, "seconds": round(seconds, 2), "history": history}, file, indent=1)
    trainer.accelerator.wait_for_everyone()
    return result


class _Trainer(Trainer):
    """The parts of the loop that differ from the stock Trainer: data order, optimiser, curve, checkpoints, NaN."""

    def __init__(
        self,
        task: TrainingTask,
        settings: TrainingSettings,
        arguments: TrainingArguments,
        callbacks: list[TrainerCallback],
        steps_per_epoch: int,
    ) -> None:
        self.task, self.settings, self.steps_per_epoch = task, settings, steps_per_epoch
        self.epoch_sampler: EpochSampler | None = None
        self.part_sums: dict[str, torch.Tensor] = {}
        self.part_count = 0
        self.loader: Any = None
        super().__init__(
            model=task.model,
            args=arguments,
            train_dataset=task.train_dataset,
            callbacks=[*callbacks, _Guard(self)],
        )
        self.remove_callback(PrinterCallback)
        # A forward with **kwargs is no promise to divide by `num_items_in_batch`: losses are means, see TrainingTask.
        self.model_accepts_loss_kwargs = False
        self.trainable = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
        self.sharded = settings.shard_frozen and arguments.world_size > 1
        if self.sharded:
            # Else it would keep the whole of them alive. Every process has read the same files.
            frozen = [name for name, parameter in task.model.named_parameters() if not parameter.requires_grad]
            nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(task.model, frozen)
        # On a GPU, reading a value makes the CPU wait: there the check comes with each log line and checkpoint.
        self.check_every_step = arguments.device.type == "cpu"

    def get_train_dataloader(self) -> Any:
        dataset = self.task.train_dataset
        self.epoch_sampler = None if isinstance(dataset, IterableDataset) else self._sampler(dataset)
        workers = self.settings.workers
        loader = DataLoader(
            dataset,
            batch_size=self.settings.batch_size,
            sampler=self.epoch_sampler,
            collate_fn=self.task.collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            drop_last=True,
            # Without one of its own, each new iterator draws from the global generator, which dropout uses too:
            # the numbers would depend on how often workers are started.
            generator=torch.Generator().manual_seed(self.args.seed),
        )
        self.loader = self.accelerator.prepare(loader)
        return self.loader

    def _sampler(self, dataset: Dataset[Any]) -> EpochSampler:
        if self.task.lengths is None:
            return EpochSampler(dataset, self.args.seed)
        # Consecutive batches go to the processes in turn, so that those of a step are neighbours in length.
        together = self.settings.batch_size * self.args.world_size
        return LengthGroupedSampler(dataset, self.args.seed, **self.task.lengths._asdict(), batch_size=together)

    def stop_workers(self) -> None:
        # Left to the garbage collector, which closes their queues first, each worker would be waited for 5 seconds.
        iterator = getattr(getattr(self.loader, "base_dataloader", None), "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = model or self.task.model
            if self.task.parameter_groups is not None:
                groups = self.task.parameter_groups(model)
            else:
                groups = parameter_groups(model, self.settings.weight_decay)
            if self.settings.optimizer == "muon":
                self.optimizer = MuonAdamW(
                    model,
                    learning_rate=self.settings.learning_rate,
                    matrix_learning_rate=self.settings.matrix_learning_rate,
                    weight_decay=self.settings.weight_decay,
                    betas=self.settings.betas,
                )
            else:
                self.optimizer = torch.optim.AdamW(
                    groups, lr=self.settings.learning_rate, betas=self.settings.betas, fused=True
                )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if self.lr_scheduler is None:
            factor = learning_rate_factor(self.settings, num_training_steps, self.steps_per_epoch)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # the stock estimate walks over all modules in every step

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        # The stock step calls model.train() each time, a walk over all modules; _Guard does so once.
        loss = self.compute_loss(model, self._prepare_inputs(inputs)) / self.current_gradient_accumulation_steps
        # Else DeepSpeed would divide by the accumulation once more.
        self.accelerator.backward(loss, **({"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}))
        return loss.detach()

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor | None:
        return None  # all of it is in _get_grad_norm, which the loop calls next

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> torch.Tensor:
        """The norm before clipping; one pass over the gradients, where the stock one walks over all modules."""
        limit = self.settings.max_grad_norm
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return self.accelerator.clip_grad_norm_(model.parameters(), limit or math.inf)  # pyright: ignore
        norm = nn.utils.get_total_norm([p.grad for p in self.trainable if p.grad is not None])
        if self.check_every_step and not math.isfinite(norm.item()):
            raise self.non_finite(f"The gradient norm is {norm.item()}")
        if limit:
            nn.utils.clip_grads_with_norm_(self.trainable, limit, norm)
        return norm

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        with _fast_attention_backward(model):
            outputs = model(**inputs)
        as_dict = isinstance(outputs, dict)
        loss = outputs["loss"] if as_dict else outputs.loss
        parts = outputs.get("losses") if as_dict else getattr(outputs, "losses", None)
        if self.check_every_step and not math.isfinite(loss.item()):
            raise self.non_finite(f"The loss is {loss.item()}", parts)
        for name, value in (parts or {}).items():
            value = value.detach().float()
            self.part_sums[name] = self.part_sums[name] + value if name in self.part_sums else value
        self.part_count += 1
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            if self.part_sums:
                reduced: Any = self.accelerator.reduce(torch.stack(list(self.part_sums.values())), "mean")
                sums = reduced.tolist()
                means = {name: value / self.part_count for name, value in zip(self.part_sums, sums, strict=True)}
                logs = {"loss": logs["loss"], **means, **{k: v for k, v in logs.items() if k != "loss"}}
            self.part_sums, self.part_count = {}, 0
            if not math.isfinite(logs["loss"]):
                raise self.non_finite(f"The loss is {logs['loss']}")
        super().log(logs, start_time)

    def non_finite(self, what: str, parts: dict[str, torch.Tensor] | None = None) -> RecipeError:
        shown = ", ".join(f"{name} {value.item():.4g}" for name, value in (parts or {}).items())
        newest = _complete_checkpoints(Path(str(self.args.output_dir)))
        safe = f"; the newest good checkpoint is {newest[-1]}" if newest else ""
        advice = f"lower training.learning_rate (it is {self.settings.learning_rate:g})"
        if not self.settings.max_grad_norm:
            advice += ", clip gradients with training.max_grad_norm=1"
        if self.args.bf16:
            advice += ", or train with training.precision=fp32"
        step = self.state.global_step + 1
        return RecipeError(f"{what} at step {step}{f' ({shown})' if shown else ''}: {advice}{safe}.")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if not self.args.should_save:  # asked of every process where the model is split
            return
        state = _state_to_save(self.task.model, self.task.save_frozen, state_dict)
        path = Path(output_dir or str(self.args.output_dir))
        path.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(state, path / "model.safetensors", metadata={"format": "pt"})

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write under a temporary name, flush, rename: a kill leaves the older checkpoints and nothing else."""
        folder = Path(str(self.args.output_dir))
        name = f"checkpoint-{self.state.global_step}"
        staging = folder / ".staging"
        if self.args.process_index == 0:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.args.output_dir = str(staging)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.output_dir = str(folder)
        self.accelerator.wait_for_everyone()
        if self.args.process_index == 0:
            with atomic_folder(folder / name, overwrite=True) as partial:
                for item in (staging / name).iterdir():
                    item.rename(partial / item.name)
            shutil.rmtree(staging, ignore_errors=True)
            for old in _complete_checkpoints(folder)[: -self.settings.keep_checkpoints]:
                shutil.rmtree(old, ignore_errors=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            try:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            except Exception as error:  # torch raises many types on files that are damaged or not its own
                advice = _without(resume_from_checkpoint)
                raise CheckpointError(
                    f"{resume_from_checkpoint} cannot be read ({first_line(error)}); {advice}."
                ) from None
            return
        model = model or self.task.model
        path = Path(resume_from_checkpoint) / "model.safetensors"
        try:
            state = safetensors.torch.load_file(path, device="cpu")
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); {_without(path.parent)}.") from None
        if not self.task.save_frozen:  # earlier versions saved a shared one under its second name
            frozen = _frozen(model)
            state = {name: tensor for name, tensor in state.items() if name not in frozen}
        expected = _state_to_save(model, self.task.save_frozen)
        wrong = sorted(set(state) ^ set(expected)) or [
            name for name, tensor in state.items() if tensor.shape != expected[name].shape
        ]
        if wrong:
            raise CheckpointError(
                f"{path} is of another model than the recipe builds ({len(wrong)} tensors differ, such as {wrong[0]}); "
                "resume with the recipe.yaml that started the run."
            )
        model.load_state_dict(state, strict=False)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except Exception as error:  # torch and the optimisers raise many types on a state that is damaged or not theirs
            advice = f"resume with the recipe.yaml that started the run, or {_without(str(checkpoint))}"
            raise CheckpointError(
                f"The optimiser state of {checkpoint} is damaged or of another model or optimiser "
                f"({first_line(error)}); {advice}."
            ) from None


class _Start(TrainerCallback):
    """Takes the output folder over when everything is loaded, so that a resume that fails leaves the run as it was."""

    def __init__(self, output: Path, start_step: int, *, fresh: bool, then: Callable[[Path], Any] | None) -> None:
        from transformers.integrations.integration_utils import TensorBoardCallback

        self.output, self.start_step, self.fresh, self.then = output, start_step, fresh, then
        self.tensorboard: Any = TensorBoardCallback()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.claim()
        # Purging hides the steps that a killed run logged after its last checkpoint.
        self.tensorboard.tb_writer = SummaryWriter(str(self.output / "logs"), purge_step=self.start_step + 1)

    def claim(self) -> None:
        if self.fresh and _complete_checkpoints(self.output / "checkpoints"):
            shutil.rmtree(self.output / "checkpoints")  # of a finished run, or this one had been refused
        (self.output / "training.json").unlink(missing_ok=True)
        self.output.mkdir(parents=True, exist_ok=True)
        if self.then is not None:
            self.then(self.output)


class _Guard(TrainerCallback):
    """Runs after the Trainer's own flow: sets the epoch of the data order, and lets no broken weights be saved."""

    def __init__(self, trainer: _Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.sharded:  # now that DistributedDataParallel, which takes no split parameters, is around it
            for module in self.trainer.task.shard:
                fully_shard(module)
        kwargs["model"].train()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # accelerate forwards set_epoch through one wrapper of the batch sampler only; a resumed run has two.
        if self.trainer.epoch_sampler is not None:
            self.trainer.epoch_sampler.set_epoch(int(state.epoch or 0))

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.epoch_sampler is None and state.global_step < state.max_steps:
            raise RecipeError(
                f"The iterable training data ended after {state.global_step} of {state.max_steps} steps; "
                "make it endless or lower training.max_steps."
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True
        if control.should_save:
            # A mean over steps before and after a checkpoint could not be had again after a resume.
            control.should_log = True
            _check_finite_parameters(self.trainer.task.model, self.trainer)


class _Progress(TrainerCallback):
    """A bar on a terminal, a log line for each logged loss otherwise."""

    def __init__(self, settings: TrainingSettings, total_steps: int, start_step: int) -> None:
        self.total, self.start_step = total_steps, start_step
        self.use_bar = settings.progress and sys.stderr.isatty()
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()
        if self.use_bar and state.is_world_process_zero:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self.bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[curve]}"),
                console=Console(stderr=True),
            )
            self.row = self.bar.add_task("", total=self.total, completed=state.global_step, curve="")
            self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.row, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        curve = "  ".join(f"{name} {value:.4g}" for name, value in logs.items() if name != "epoch")
        if self.bar is not None:
            self.bar.update(self.row, curve=curve)
        else:
            speed = (state.global_step - self.start_step) / max(time.perf_counter() - self.started, 1e-9)
            left = (self.total - state.global_step) / speed
            logger.info("step %d/%d  %s  %.1f steps/s  %.0f s left", state.global_step, self.total, curve, speed, left)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def _fast_attention_backward(model: nn.Module) -> AbstractContextManager[Any]:
    """On a CPU, attention as plain matrix products: the backward pass of the fused kernel is several times slower there
    for the short sequences that are trained on CPUs (about 4 times at 37 tokens and 128 channels)."""
    if next(model.parameters()).device.type == "cpu":
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def split_by() -> str | None:
    """What splits the trained parameters between the processes, as `accelerate launch` was told."""
    for name, variable in (("FSDP", "ACCELERATE_USE_FSDP"), ("DeepSpeed", "ACCELERATE_USE_DEEPSPEED")):
        if os.environ.get(variable, "").lower() == "true":
            return name
    return None


def _count_steps(task: TrainingTask, settings: TrainingSettings, processes: int) -> tuple[int, int]:
    """(optimiser steps per epoch, optimiser steps in all)."""
    if isinstance(task.train_dataset, IterableDataset):
        if settings.max_steps is None:
            raise RecipeError("The training data is a stream without a length; give training.max_steps, not epochs.")
        return settings.max_steps, settings.max_steps
    samples = len(task.train_dataset)  # pyright: ignore[reportArgumentType] - map-style datasets have a length
    batches = samples // (settings.batch_size * processes)
    if not batches:
        asked = f"{settings.batch_size} on each of {processes} processes" if processes > 1 else f"{settings.batch_size}"
        raise RecipeError(f"{samples} training samples are fewer than training.batch_size ({asked}); lower it.")
    per_epoch = math.ceil(batches / settings.gradient_accumulation)
    ends = [] if settings.max_steps is None else [settings.max_steps]
    if settings.epochs is not None:
        ends.append(max(round(settings.epochs * per_epoch), 1))
    return per_epoch, min(ends)


def _frozen(model: nn.Module) -> set[str]:
    """Names of frozen parameters, all of those that share one."""
    return {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}


def _state_to_save(
    model: nn.Module, save_frozen: bool, state: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """The state dict with each shared tensor once, and without frozen parameters if so wished."""
    frozen = set() if save_frozen else _frozen(model)
    kept: dict[str, torch.Tensor] = {}
    seen: set[tuple[Any, ...]] = set()
    for name, tensor in (model.state_dict() if state is None else state).items():
        if name in frozen:
            continue
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        kept[name] = tensor.detach().contiguous()
    return kept


def _save_model(task: TrainingTask, folder: Path, whole: dict[str, torch.Tensor] | None = None) -> None:
    with atomic_folder(folder, overwrite=True) as partial:
        if whole is not None and task.save_state is not None:
            task.save_state(partial, whole)
        elif task.save is not None:
            task.save(partial)
        elif isinstance(task.model, PreTrainedModel):
            shown = transformers_logging.is_progress_bar_enabled()
            transformers_logging.disable_progress_bar()
            try:
                task.model.save_pretrained(partial)
            finally:
                if shown:
                    transformers_logging.enable_progress_bar()
        else:
            safetensors.torch.save_file(_state_to_save(task.model, True), partial / "model.safetensors")


def _check_finite_parameters(model: nn.Module, trainer: _Trainer) -> None:
    for name, parameter in model.named_parameters():
        own = parameter.to_local() if isinstance(parameter, DTensor) else parameter  # of a split one each has its part
        if parameter.requires_grad and not torch.isfinite(own.detach()).all():
            trainer.state.global_step -= 1  # the step that broke it has been counted already
            raise trainer.non_finite(f"The parameter {name} became NaN or infinite")


def _complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints to resume from, oldest first. Unfinished ones have other names."""
    steps = {path: path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")}
    found = [path for path, step in steps.items() if step.isdecimal() and (path / "trainer_state.json").is_file()]
    return sorted(found, key=lambda path: int(steps[path]))


def _without(checkpoint: str | Path) -> str:
    """What to do about a checkpoint that cannot be resumed from."""
    return f"delete the folder {checkpoint} to resume from the checkpoint before it, or from the start if there is none"


def _trainer_state(checkpoint: Path) -> TrainerState:
    path = checkpoint / "trainer_state.json"
    try:
        state = TrainerState.load_from_json(str(path))
        if type(state.global_step) is not int or state.global_step < 0:
            raise ValueError(f"global_step is {state.global_step!r}")
        int(state.epoch or 0)
        if not isinstance(state.log_history, list) or not all(isinstance(entry, dict) for entry in state.log_history):
            raise ValueError("log_history is not a list of mappings")
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({first_line(error)}); {_without(checkpoint)}.") from None
    return state


def _resume_point(folder: Path, resume: bool | Path, rank: int | None) -> Path | None:
    """The checkpoint to go on from, if there is one. `rank` is that of this process, None if it is the only one."""
    if isinstance(resume, bool):
        checkpoints = _complete_checkpoints(folder)
        if not checkpoints:
            logger.info("%s holds no checkpoint yet: starting from step 0", folder)
            return None
        checkpoint = checkpoints[-1]
    else:
        checkpoint = Path(resume)
    _trainer_state(checkpoint)
    for name in ("scheduler.pt",) if split_by() is not None else ("optimizer.pt", "scheduler.pt"):
        # torch.save writes zip archives, whose directory stands at their end: a truncated file has none.
        if not zipfile.is_zipfile(checkpoint / name):
            raise CheckpointError(f"{checkpoint / name} is missing or truncated; {_without(checkpoint)}.")
    _check_random_state(checkpoint, rank)
    return checkpoint


def _check_random_state(checkpoint: Path, rank: int | None) -> None:
    """The Trainer goes on without a random state that is missing, with other numbers and only a word in the log."""
    path = checkpoint / ("rng_state.pth" if rank is None else f"rng_state_{rank}.pth")
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing; resume on as many processes as the run was started on, or {_without(checkpoint)}."
        )
    try:
        with safe_globals():  # the arrays of numpy's state
            state = torch.load(path, weights_only=True)
        # Into generators that nobody uses: what is of the wrong kind shows when it is set.
        random.Random().setstate(state["python"])
        np.random.RandomState().set_state(state["numpy"])
        torch.Generator().set_state(state["cpu"])
    except Exception as error:  # a damaged pickle raises anything
        raise CheckpointError(f"{path} cannot be read ({first_line(error)}); {_without(checkpoint)}.") from None


def _refuse_unfinished(output: Path) -> None:
    """A fresh start over a run that is unfinished would lose it."""
    checkpoints = _complete_checkpoints(output / "checkpoints")
    if checkpoints and not (output / "training.json").exists():
        raise RecipeError(
            f"{output} holds an unfinished run ({checkpoints[-1].name}); "
            "resume it, choose another output, or delete the folder."
        )


def _ensure_log_lines() -> None:
    """Progress lines reach stderr also in a program that has not set up logging."""
    package = logging.getLogger("foveate")
    if not package.hasHandlers():
        package.addHandler(logging.StreamHandler())
    if package.level == logging.NOTSET:
        package.setLevel(logging.INFO)
    transformers_logging.set_verbosity_warning()
