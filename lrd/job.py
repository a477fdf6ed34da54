"""A training job: all its parts, set up on every rank together, with the state that a checkpoint carries."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.optim import Optimizer

from lrd import __version__, checkpoint, console, data, distributed, hardware
from lrd import recipe as recipes
from lrd.batchnorm import synchronized
from lrd.compression import all_reduce_in_bf16
from lrd.errors import UserError
from lrd.handover import bring_newest
from lrd.models import build_model
from lrd.optim import build_optimizer
from lrd.peers import RollCall
from lrd.replicas import compare_replicas
from lrd.rundir import RunDir
from lrd.schedules import Schedule, depends_on_length, run_length
from lrd.tracking import Tracker, recorded_at
from lrd.writer import Writer


@dataclass
class Job:
    """One run on one rank. `step` is the position: with the state_dicts it is all that a resume needs."""

    recipe: recipes.Recipe
    accelerator: Accelerator
    dataset: data.Dataset
    batches: data.Batches
    network: nn.Module  # the network itself
    model: nn.Module  # as Accelerate prepared it: under DDP where there are several ranks
    optimizer: Optimizer  # torch's own, which LRDropout and the schedule hold on to
    prepared_optimizer: AcceleratedOptimizer
    schedule: Schedule
    total_steps: int
    identity: dict[str, Any]  # what decides about the numbers: ranks compare it at the start, resumes with the past
    run_dir: RunDir | None = None  # on the main process
    tracker: Tracker | None = None  # on the main process
    writer: Writer | None = None  # on the main process
    roll_call: RollCall = field(default_factory=RollCall)
    step: int = 0
    skipped: int = 0  # steps whose gradient was not finite
    evaluated: int = 0  # the step after which the latest evaluation was
    best: dict[str, Any] | None = None
    latest: dict[str, float] = field(default_factory=dict)  # the latest evaluation

    @property
    def is_evaluation_due(self) -> bool:
        """After the step it has come to; of a state that was saved in an evaluation it still is."""
        epochs, rest = divmod(self.step, self.batches.steps_per_epoch)
        ends_epochs = self.step > 0 and rest == 0 and epochs % self.recipe.trainer.eval_every == 0
        return (self.step == self.total_steps or ends_epochs) and self.evaluated != self.step

    def report(self, state: str, **more: Any) -> None:
        """Put `state` and how far the run is into the run directory, from the main process, if that can be written."""
        if self.run_dir is not None:
            best, ranks = (self.best or {}).get("accuracy"), self.accelerator.num_processes
            facts = {"step": self.step, "total_steps": self.total_steps, "best_accuracy": best, "ranks": ranks}
            with suppress(UserError):  # a full disk is for `checkpoint.on_error` to decide about
                self.run_dir.status(state, **facts, skipped=self.skipped, **more)

    def close(self) -> None:
        """Let others take the run directory."""
        if self.run_dir is not None:
            self.run_dir.close()

    def state(self) -> checkpoint.State:
        """What `restore` needs. The tensors are the living ones: whoever keeps it copies it."""
        trainer = {
            "step": self.step,
            "epoch": self.step // self.batches.steps_per_epoch,
            "samples": self.step * self.batches.batch_size,
            "skipped": self.skipped,
            "evaluated": self.evaluated,
            "best": self.best,
            "latest": self.latest,
            "identity": self.identity,
            "world_size": self.accelerator.num_processes,
        }
        weights = {key: value.detach() for key, value in self.network.state_dict().items()}
        optimizer = {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}
        return checkpoint.State(weights, optimizer, trainer)

    def restore(self, state: checkpoint.State, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            UserError: it belongs to another model, optimizer or recipe.
        """
        changed = _changes(state.trainer["identity"], self.identity)
        if changed and not self.recipe.checkpoint.allow_changed:
            lines = [f"{key}: the run in {path} had {was!r}, the recipe now says {now!r}" for key, was, now in changed]
            raise UserError("\n".join([*lines, "checkpoint.allow_changed=true goes on all the same"]))
        try:
            self.network.load_state_dict(state.model)
        except RuntimeError as error:
            raise UserError(f"{path}: is of another model: {str(error).splitlines()[-1].strip()}") from None
        self.step, self.best, self.latest = state.step, state.trainer["best"], state.trainer["latest"]
        self.skipped, self.evaluated = state.trainer["skipped"], state.trainer["evaluated"]
        if changed:
            self._adopt(state, path)
            return
        try:
            self.optimizer.load_state_dict(state.optimizer["optimizer"])
            self.schedule.load_state_dict(state.optimizer["schedule"])
        except (ValueError, KeyError) as error:
            raise UserError(f"{path}: is of another optimizer: {error}") from None

    def _adopt(self, state: checkpoint.State, path: Path) -> None:
        """Go on under a changed recipe: momentum and update counts go on, lr and all settings are the new recipe's."""
        was = state.optimizer["optimizer"]
        now = self.optimizer.state_dict()
        same = state.trainer["identity"].get("optimizer.name") == self.identity["optimizer.name"]
        sizes = [[len(group["params"]) for group in groups["param_groups"]] for groups in (was, now)]
        if same and sizes[0] == sizes[1]:
            for new_group, old_group in zip(now["param_groups"], was["param_groups"], strict=True):
                new_group["mask_step"] = old_group.get("mask_step", self.step)
            self.optimizer.load_state_dict({"state": was["state"], "param_groups": now["param_groups"]})
        else:
            console.say(f"{path}: the optimizer or its groups changed; its state begins anew")
        self.schedule.replay(self.step, self.batches.steps_per_epoch)


def _changes(was: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    return [
        (key, was.get(key), now.get(key)) for key in sorted(was.keys() | now.keys()) if was.get(key) != now.get(key)
    ]


def set_up(recipe: recipes.Recipe) -> Job:
    """Build every part, agree with the other ranks, and go on from the newest good checkpoint in `run_dir`.

    Nothing is written before all that can be wrong with recipe and data has been looked at on every rank.

    Raises:
        UserError: the same on every rank.
    """
    recipe = hardware.settle(recipe)
    code = {"lrd": __version__, "lrd's source files": source_digest(), "torch": torch.__version__}
    accelerator = distributed.start(recipe.trainer, {**code, **recipe.agreed()})
    roll_call = RollCall()
    roll_call.start()
    dataset = distributed.once_per_host(accelerator, lambda: data.load(recipe.data, recipe.seed))
    job = distributed.together(lambda: _build(recipe, accelerator, dataset))
    job.roll_call = roll_call
    distributed.handshake({"data.fingerprint": job.identity["data.fingerprint"]})
    distributed.on_main(lambda: _take_run_dir(job))
    bring_newest(Path(recipe.run_dir))
    path, files = distributed.on_main(lambda: _read_newest(Path(recipe.run_dir)))
    if files:
        distributed.together(lambda: _go_on(job, path, files))
        compare_replicas(job.network, job.optimizer, job.step)  # what was read on one rank arrived on all
    job.model, job.prepared_optimizer = accelerator.prepare(job.network, job.optimizer)
    if recipe.trainer.gradient_compression == "bf16" and accelerator.num_processes > 1:
        job.model.register_comm_hook(None, all_reduce_in_bf16)  # type: ignore[operator]
    if recipe.trainer.compile:
        job.network.compile()
    if accelerator.num_processes > 2:
        _settle_buckets(job)
    distributed.on_main(lambda: _open_books(job))
    return job


def _build(recipe: recipes.Recipe, accelerator: Accelerator, dataset: data.Dataset) -> Job:
    rank, world_size = accelerator.process_index, accelerator.num_processes
    device = accelerator.device
    if recipe.model.num_classes is not None and recipe.model.num_classes < len(dataset.classes):
        raise UserError(
            f"model.num_classes: is {recipe.model.num_classes}, but the data has {len(dataset.classes)} classes"
        )
    fingerprint = dataset.fingerprint()
    dataset = dataset.to(device)
    accumulation_steps = recipe.trainer.accumulation_steps
    batches = data.Batches(dataset.train, recipe.data, recipe.seed, rank, world_size, accumulation_steps)
    network = build_model(recipe.model, len(dataset.classes), recipe.seed).to(device)
    if recipe.model.sync_batchnorm:
        network = synchronized(network, device)
    if recipe.trainer.channels_last and device.type != "cpu":  # there the inputs are enough, and the masked step slower
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = build_optimizer(network, recipe)
    planned = recipe.trainer.epochs * batches.steps_per_epoch
    schedule = Schedule(optimizer, recipe.schedule, planned, batches.steps_per_epoch)
    identity = {**recipe.mathematics(), "data.fingerprint": fingerprint}
    if depends_on_length(recipe.schedule):
        identity["trainer.epochs"] = recipe.trainer.epochs
    return Job(
        recipe, accelerator, dataset, batches, network, network, optimizer, AcceleratedOptimizer(optimizer), schedule,
        total_steps=run_length(recipe, batches.steps_per_epoch), identity=identity,
    )  # fmt: skip


def _settle_buckets(job: Job) -> None:
    """Two passes that leave no trace, so that DDP's buckets are the same in the first step of each start.

    After its first backward DDP regroups the gradients into other buckets, and with them the order in which the ranks'
    sums are taken. Two ranks do not notice, for a + b = b + a; from three on a resumed run would differ from one that
    was not interrupted.
    """
    inputs, _ = job.batches(0)
    buffers = [buffer.clone() for buffer in job.network.buffers()]
    for _ in range(2):
        job.accelerator.backward(job.model(inputs if job.recipe.trainer.compile else inputs[:2]).sum())
    for buffer, before in zip(job.network.buffers(), buffers, strict=True):
        buffer.copy_(before)
    job.network.zero_grad()


def _open_books(job: Job) -> None:
    assert job.run_dir is not None
    job.run_dir.write("recipe.yaml", job.recipe.dump())
    known = recorded_at(job.run_dir.path, job.step) if job.is_evaluation_due else set()
    job.tracker = Tracker(job.run_dir.path, job.step, job.recipe, job.network, job.optimizer, known)
    job.writer = Writer(job.run_dir.path, job.recipe.checkpoint, job.tracker.events)


def source_digest() -> str:
    """Of this package's files: hosts with other checkouts of the same version are found at the start."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def _take_run_dir(job: Job) -> None:
    job.run_dir = RunDir(Path(job.recipe.run_dir))


def _read_newest(run_dir: Path) -> tuple[Path, dict[str, bytes]]:
    """The newest good checkpoint's files. For rank 0 alone: what it read is what all get."""
    path, passed_over = checkpoint.newest(run_dir)
    for line in passed_over:
        console.say(line)
    if path is None:
        if passed_over:
            console.say(f"{run_dir}: no whole checkpoint is left; starting from the beginning")
        return run_dir, {}
    return path, checkpoint.content(path)


def _go_on(job: Job, path: Path, files: dict[str, bytes]) -> None:
    state = checkpoint.parse(path, files)
    console.say(f"{path}: going on after step {state.step}")
    job.restore(state, path)
