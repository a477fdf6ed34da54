"""`Job`: all parts of one training job on one rank, and the state that a checkpoint carries."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from lrd import __version__, console
from lrd import recipe as recipes
from lrd.checkpoint import network_config, store
from lrd.checkpoint.async_writer import AsyncWriter
from lrd.checkpoint.mirror.claim import Claim
from lrd.checkpoint.run_dir import RunDir
from lrd.checkpoint.starts import LENGTH_KEYS, add_start
from lrd.data.batches import TrainingBatches
from lrd.data.images import Dataset, storage_of_fingerprint
from lrd.distributed import hardware
from lrd.distributed.roll_call import RollCall
from lrd.errors import UserError
from lrd.exchange.kept import KeptExchange
from lrd.job import sharding
from lrd.job.buffers import BufferSnapshot
from lrd.job.ema import WeightAverage
from lrd.job.rank_speed import ComputeTimer
from lrd.parts import random_layers
from lrd.parts.schedules import Schedule
from lrd.tracking.recorder import Recorder
from lrd.tracking.tracker import Tracker

_MAX_CHANGES_NAMED = 8  # settings that differ from those of a checkpoint


@dataclass
class Job:
    """One run on one rank.

    `step` is the position in the run: batches, augmentation and masks are functions of it, so with
    the state_dicts a resume needs no state of a random generator.

    Attributes:
        recipe: what is trained; its `auto` precision and layout are resolved.
        accelerator: Accelerate's, on this rank's device.
        dataset: training and test images, on the device, or read when they are needed.
        batches: the training batches, by position.
        schedule: sets the lr of `raw_optimizer`.
        loss_function: of logits, float (N, C), and labels, int64 (N,), or probabilities, float
            (N, C), if samples are mixed: the mean loss, float ().
        raw_model: the network itself.
        ddp_model: the network as Accelerate prepared it, under DDP where there are several ranks. A
            network that is sharded is `raw_model` itself.
        raw_optimizer: torch's optimizer, which LRDropout and the schedule work on.
        accelerated_optimizer: the same one, wrapped by Accelerate.
        total_steps: optimizer steps of the whole run.
        result_settings: all settings that affect the results, as `section.key` -> value, and the
            data's fingerprint. A resume compares them with those of the checkpoint.
        sources: a digest of the source files of each own part that the recipe names.
        start_weights_digest: SHA-256 of the file `model.weights`; None if it was not read.
        roll_call: answers for this rank when another one is lost.
        recorder: computes the scalars that are recorded; on the main process it is the tracker.
        buffers: the network's buffers as they were before the step that is being taken.
        compute_timer: measures for how long this rank computes in each step.
        exchange: sends the kept elements of updates alone; None: DDP averages whole gradients.
        weight_average: the moving average of the weights; None if the recipe asks for none.
        run_dir, tracker, writer: on the main process; None elsewhere.
        claim: the right to write to `checkpoint.mirror`, on the main process; None elsewhere.
        step: optimizer steps done.
        first_step: those that were done when this start began.
        is_updating: whether the step is being completed: weights, optimizer and schedule belong
            neither to `step` steps nor to the next one.
        skipped_steps: steps that were skipped because a loss or the gradient was not finite.
        replaced_images: training images so far, of all ranks, in whose place another one was taken
            because they could not be decoded.
        replaced_before: those of earlier starts.
        last_eval_step, last_eval_metrics: the latest evaluation.
        best: the evaluation that was best by `best_metric`: `step`, `metric` (its name), and all
            metrics.
        source_digest: a digest of lrd's own source files.
        starts: the starts of the run up to this one, see `lrd.checkpoint.starts`.
        forked_from: the run that this one was forked from: `run`, `step` and `manifest` (SHA-256);
            None if it was not forked.
        rescued_scalars: scalars of the last steps, by step and tag, if this start goes on from what
            a survivor saved, see `lrd.job.survivor`.
    """

    recipe: recipes.Recipe
    accelerator: Accelerator
    dataset: Dataset
    batches: TrainingBatches
    raw_model: nn.Module
    ddp_model: nn.Module
    raw_optimizer: Optimizer
    accelerated_optimizer: AcceleratedOptimizer
    schedule: Schedule
    loss_function: Callable[[Tensor, Tensor], Tensor]
    total_steps: int
    result_settings: dict[str, Any]
    sources: dict[str, str]
    roll_call: RollCall
    recorder: Recorder
    buffers: BufferSnapshot
    compute_timer: ComputeTimer

    start_weights_digest: str | None = None
    exchange: KeptExchange | None = None
    weight_average: WeightAverage | None = None
    run_dir: RunDir | None = None
    tracker: Tracker | None = None
    writer: AsyncWriter | None = None
    claim: Claim | None = None

    step: int = 0
    first_step: int = 0
    is_updating: bool = False
    skipped_steps: int = 0
    replaced_images: int = 0
    replaced_before: int = 0
    last_eval_step: int = 0
    last_eval_metrics: dict[str, float] = field(default_factory=dict)
    best: dict[str, Any] | None = None
    source_digest: str = ""
    starts: list[dict[str, Any]] = field(default_factory=list)
    forked_from: dict[str, Any] | None = None
    rescued_scalars: dict[int, dict[str, float]] = field(default_factory=dict)

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds only shards of the parameters (`trainer.sharding`)."""
        return sharding.is_sharded(self.raw_model)

    @property
    def has_local_momentum(self) -> bool:
        """Whether the momentum is this rank's own (`trainer.gradient_exchange: kept`)."""
        return self.exchange is not None and not self.exchange.is_averaged

    @property
    def is_evaluation_due(self) -> bool:
        """Whether the state after `step` steps is still to be evaluated.

        That is after every `trainer.eval_every`-th epoch and after the last step. It is still due
        after a resume if a signal cut the evaluation short. The state before the first step is
        never evaluated.
        """
        if self.last_eval_step == self.step:
            return False
        if self.step == self.total_steps:
            return True

        epochs, steps_into_epoch = divmod(self.step, self.batches.steps_per_epoch)
        is_epoch_end = self.step > 0 and steps_into_epoch == 0
        return is_epoch_end and epochs % self.recipe.trainer.eval_every == 0

    @property
    def best_metric(self) -> str:
        """The metric by which evaluations are compared: an accuracy.

        It is measured on the images held out, or on the test images if there are none; and of the
        average of the weights, or of the network if there is none.
        """
        part = "" if self.dataset.validation is None else "validation_"
        weights = "" if self.weight_average is None else "ema_"
        return f"{part}{weights}accuracy"

    @property
    def best_accuracy(self) -> float | None:
        """The best accuracy so far, by `best_metric`; None before the first evaluation."""
        return None if self.best is None else float(self.best[self.best_metric])

    @property
    def kept_best_step(self) -> int | None:
        """The step of the best checkpoint, if it is kept; else None."""
        if not self.recipe.checkpoint.keep_best or self.best is None:
            return None
        return int(self.best["step"])

    def load_micro_batch(self, step: int, micro_step: int) -> tuple[Tensor, Tensor]:
        """This rank's batch of a micro step, in the memory layout that training uses.

        Returns:
            Inputs, float32 (micro_batch, 3, H, W), and labels, int64 (micro_batch,). If the samples
            are mixed, the labels are probabilities, float32 (micro_batch, classes).
        """
        inputs, labels = self.batches.micro_batch(step, micro_step)
        return self._arrange(inputs), labels

    def make_inputs(self, batch_size: int) -> Tensor:
        """Inputs of zeros, in the memory layout that training uses.

        Returns:
            float32 (batch_size, 3, H, W).
        """
        shape = (batch_size, *self.batches.image_shape)
        return self._arrange(torch.zeros(shape, device=self.accelerator.device))

    def _arrange(self, inputs: Tensor) -> Tensor:
        if self.recipe.trainer.channels_last:
            return inputs.contiguous(memory_format=torch.channels_last)
        return inputs

    def seed_layers(self, step: int, micro_step: int) -> None:
        """Seed what random layers and losses draw from, before the forward pass of a micro step.

        It does nothing where no part of the user's or of another package could draw.
        """
        if random_layers.needs_seeds(self.recipe):
            random_layers.seed_generators(
                seed=self.recipe.seed,
                step=step,
                micro_step=micro_step,
                rank=self.accelerator.process_index,
                device=self.accelerator.device,
            )

    def no_sync(self) -> AbstractContextManager[None]:
        """A context in which backward passes accumulate this rank's gradients alone."""
        if self.is_sharded:
            return sharding.no_sync(self.raw_model)
        context: AbstractContextManager[None] = self.accelerator.no_sync(self.ddp_model)
        return context

    def write_status(self, state: str, **more: Any) -> None:
        """Write `state` and the progress of the run to `status.json`, from the main process.

        A disk that cannot be written is no error here: `checkpoint.on_error` decides about that.
        """
        if self.run_dir is None:
            return

        with suppress(UserError):
            self.run_dir.write_status(
                state,
                step=self.step,
                total_steps=self.total_steps,
                best_accuracy=self.best_accuracy,
                ranks=self.accelerator.num_processes,
                skipped=self.skipped_steps,
                **more,
            )

    def close(self) -> None:
        """End the processes that load images, and release the run directory."""
        self.batches.close()
        if self.run_dir is not None:
            self.run_dir.close()

    def train_state(self) -> store.TrainState:
        """What `load_train_state` needs.

        Its tensors are the living ones, not copies: whoever keeps the state must copy them. Where
        the network is sharded they are gathered, by all ranks together, and only the main process
        has them.
        """
        model = {name: tensor.detach() for name, tensor in self.raw_model.state_dict().items()}
        optimizer = {
            "optimizer": self.raw_optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }
        trainer = {
            "step": self.step,
            "epoch": self.step // self.batches.steps_per_epoch,
            "samples": self.step * self.batches.batch_size,
            "steps_per_epoch": self.batches.steps_per_epoch,
            "skipped": self.skipped_steps,
            "replaced": self.replaced_images,
            "evaluated": self.last_eval_step,
            "best": self.best,
            "latest": self.last_eval_metrics,
            "identity": self.result_settings,
            "sources": self.sources,
            "world_size": self.accelerator.num_processes,
            "starts": self.starts or add_start([], self.first_step, self._circumstances()),
        }
        if self.forked_from is not None:
            trainer["forked_from"] = self.forked_from
        ema = None if self.weight_average is None else self.weight_average.state_dict()
        state = store.TrainState(model, optimizer, trainer, ema, self._describe_network())
        if self.is_sharded:
            state = sharding.gather_state(state, is_kept=self.accelerator.is_main_process)
        return state

    def _circumstances(self) -> dict[str, Any]:
        """What the last bits of this start's steps depend on, see `lrd.checkpoint.starts`."""
        device = self.accelerator.device
        is_cpu = device.type == "cpu"
        return {
            "ranks": self.accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "device": "cpu" if is_cpu else torch.cuda.get_device_name(device),
            "processor": hardware.describe_processor(),
            "versions": {"lrd": __version__, **store.package_versions()},
            "lrd_source": self.source_digest,
            "sources": self.sources,
            "trainer": self.recipe.trainer.model_dump(mode="json", include=LENGTH_KEYS),
            "tracking": self.recipe.tracking.model_dump(mode="json"),
            "checkpoint": self.recipe.checkpoint.model_dump(mode="json", exclude={"mirror"}),
        }

    def _describe_network(self) -> dict[str, Any]:
        """What inference needs to know, for `config.json`."""
        config = network_config.describe_network(
            recipe=self.recipe,
            classes=self.dataset.classes,
            mean=self.batches.mean,
            std=self.batches.std,
            image_size=self.batches.image_shape[1:],
            world_size=self.accelerator.num_processes,
        )
        return network_config.with_results(
            config,
            step=self.step,
            epoch=self.step // self.batches.steps_per_epoch,
            evaluated=self.last_eval_step,
            metrics=self.last_eval_metrics,
            best=self.best,
        )

    def load_train_state(self, state: store.TrainState, path: Path) -> None:
        """Go on from a checkpoint.

        Args:
            path: of the checkpoint, for messages.

        Raises:
            UserError: the checkpoint belongs to another model, optimizer or recipe.
        """
        identity = state.trainer.get("identity")
        if not isinstance(identity, dict):
            raise UserError(f"{path}: does not say with which settings it was made")
        self.forked_from = state.trainer.get("forked_from")
        has_changed = self._has_changed_since(state, identity, path)

        if self.is_sharded:
            state = sharding.shard_state(state, self.raw_model, self.raw_optimizer)
        try:
            self.raw_model.load_state_dict(state.model)
        except RuntimeError as error:
            last_line = str(error).splitlines()[-1].strip()
            raise UserError(f"{path}: is of another model: {last_line}") from None

        self.step = self.first_step = state.step
        self.skipped_steps = state.trainer["skipped"]
        self.replaced_images = self.replaced_before = int(state.trainer.get("replaced", 0))
        self.last_eval_step = state.trainer["evaluated"]
        self.last_eval_metrics = state.trainer["latest"]
        self.best = state.trainer["best"]
        self.starts = add_start(
            state.trainer.get("starts", []),
            self.step,
            self._circumstances(),
            changed_recipe=network_config.read_recipe(state.config) if has_changed else None,
        )
        rescued = state.trainer.get("rescued", {}).get("scalars", {})
        self.rescued_scalars = {int(step): scalars for step, scalars in rescued.items()}
        # With a changed recipe it may be an accuracy on other images.
        if self.best is not None and self.best.get("metric", "accuracy") != self.best_metric:
            self.best = None

        self._report_changed_sources(state, path)
        self._load_weight_average(state, path)

        if has_changed:
            self._load_with_changed_recipe(state, path)
            return
        try:
            self.raw_optimizer.load_state_dict(state.optimizer["optimizer"])
            self.schedule.load_state_dict(state.optimizer["schedule"])
        except (ValueError, KeyError) as error:
            raise UserError(f"{path}: is of another optimizer: {error}") from None

    def _has_changed_since(
        self, state: store.TrainState, identity: dict[str, Any], path: Path
    ) -> bool:
        """Whether settings that affect the results are not those of a checkpoint.

        The first start of a fork may have others.

        Raises:
            UserError: they are not, and nothing allows it.
        """
        if self.forked_from is None or self.forked_from["step"] != state.step:
            return self.has_other_settings(identity, str(path), "run_dir")

        changes = describe_changes(identity, self.result_settings, self.forked_from["run"])
        if self.run_dir is not None:  # no replay, in which this was said before
            for line in changes:
                console.info(line)
        return bool(changes)

    def has_other_settings(self, saved: dict[str, Any], place: str, key: str) -> bool:
        """Compare the settings that affect the results with those of the run in some place.

        Args:
            saved: the settings of that run.
            place: where it is, for messages.
            key: of the recipe, which names the place.

        Returns:
            Whether they differ.

        Raises:
            UserError: they differ, and `checkpoint.allow_changed` does not allow it.
        """
        changes = describe_changes(saved, self.result_settings, place)
        if changes and not self.recipe.checkpoint.allow_changed:
            advice = (
                f"name another {key} to start a new run; "
                "checkpoint.allow_changed=true goes on with this one"
            )
            raise UserError("\n".join([*changes, advice]))
        return bool(changes)

    def _report_changed_sources(self, state: store.TrainState, path: Path) -> None:
        saved = state.trainer.get("sources", {})
        for key, digest in self.sources.items():
            if saved.get(key, digest) != digest:
                console.info(f"{key}: its source files are not those that {path} was made with")

    def _load_weight_average(self, state: store.TrainState, path: Path) -> None:
        """Go on from the saved average; without one it begins at the network's weights.

        Raises:
            UserError: it is of another network.
        """
        if self.weight_average is None:
            return
        if state.ema is None:  # the key is new, and checkpoint.allow_changed says go on
            self.weight_average.begin_at(self.raw_model)
            return

        try:
            self.weight_average.load_state_dict(state.ema, self.step - self.skipped_steps)
        except RuntimeError as error:
            last_line = str(error).splitlines()[-1].strip()
            raise UserError(f"{path}: its average is of another model: {last_line}") from None

    def _load_with_changed_recipe(self, state: store.TrainState, path: Path) -> None:
        """Take lr and all settings from the new recipe, momentum and update counts from the state.

        The schedule is replayed up to the present step; what ReduceLROnPlateau has reduced is lost.
        """
        saved = state.optimizer["optimizer"]
        current = self.raw_optimizer.state_dict()

        saved_name = state.trainer["identity"].get("optimizer.name")
        has_same_name = saved_name == self.result_settings["optimizer.name"]
        if has_same_name and _have_same_state(saved, current):
            # The masks go on too. A group that is new to LRDropout begins where it would be by now.
            for group, saved_group in zip(
                current["param_groups"], saved["param_groups"], strict=True
            ):
                if "mask_step" in group:
                    group["mask_step"] = saved_group.get("mask_step", self.step)
            self.raw_optimizer.load_state_dict(
                {"state": saved["state"], "param_groups": current["param_groups"]}
            )
        else:
            console.info(f"{path}: the optimizer or its groups changed; its state begins anew")
            for group in self.raw_optimizer.param_groups:
                if "mask_step" in group:
                    group["mask_step"] = self.step

        self.schedule.fast_forward(self.step, self.batches.steps_per_epoch)


def _have_same_state(saved: dict[str, Any], current: dict[str, Any]) -> bool:
    """Whether two state_dicts of one optimizer class have the same tensors for each parameter."""
    saved_groups = saved["param_groups"]
    groups = current["param_groups"]
    if len(saved_groups) != len(groups):
        return False

    for saved_group, group in zip(saved_groups, groups, strict=True):
        if len(saved_group["params"]) != len(group["params"]):
            return False
        # These add tensors to the state of Adam, RMSprop and SGD.
        for key in ("amsgrad", "centered", "momentum"):
            if bool(saved_group.get(key)) != bool(group.get(key)):
                return False
    return True


def describe_changes(saved: dict[str, Any], current: dict[str, Any], place: str) -> list[str]:
    """A line for each setting that differs. An absent one equals None: it was not used."""
    lines = []
    for key in sorted(saved.keys() | current.keys()):
        before = saved.get(key)
        now = current.get(key)
        if before == now:
            continue
        if key == "data.fingerprint":
            lines.append(_describe_other_images(str(before), str(now), place))
        else:
            had, says = ("nothing" if value is None else repr(value) for value in (before, now))
            lines.append(f"{key}: the run in {place} had {had}, the recipe now says {says}")
    if len(lines) > _MAX_CHANGES_NAMED:
        lines[_MAX_CHANGES_NAMED:] = [f"and {len(lines) - _MAX_CHANGES_NAMED} more settings differ"]
    return lines


def _describe_other_images(before: str, now: str, place: str) -> str:
    storage_before = storage_of_fingerprint(before)
    storage_now = storage_of_fingerprint(now)
    if storage_before != storage_now:
        return (
            f"data.storage: the run in {place} had its images in {storage_before!r}, this start "
            f"has them in {storage_now!r} (what auto chooses depends on the host's memory)"
        )
    return f"data.fingerprint: the images or labels are not those of the run in {place}"
