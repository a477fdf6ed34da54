"""Recipe -> `Job`, on all ranks together."""

from __future__ import annotations

import copy
import hashlib
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

import lrd
from lrd import __version__, console
from lrd import recipe as recipes
from lrd.checkpoint import store
from lrd.checkpoint.async_writer import AsyncWriter
from lrd.checkpoint.mirror import fetching
from lrd.checkpoint.mirror.claim import Claim
from lrd.checkpoint.mirror.layout import whole_steps
from lrd.checkpoint.mirror.remote import Remote
from lrd.checkpoint.run_dir import RunDir, read_status
from lrd.checkpoint.starts import describe_fork
from lrd.checkpoint.transfer import fetch_newest
from lrd.data import datasets
from lrd.data.batches import Batches, TrainingBatches
from lrd.data.images import Images, Part
from lrd.data.mixing import build_mixing
from lrd.distributed import communication, hardware
from lrd.distributed.accelerator import start_rank
from lrd.distributed.replica_check import compare_replicas
from lrd.distributed.roll_call import RollCall
from lrd.errors import UserError, first_line
from lrd.exchange.bf16 import bf16_all_reduce_hook
from lrd.exchange.kept import exchange_kept
from lrd.generators import preserved_generators
from lrd.job import sharding
from lrd.job.buffers import BufferSnapshot
from lrd.job.ema import WeightAverage
from lrd.job.progress import describe_start
from lrd.job.rank_speed import ComputeTimer
from lrd.job.state import Job
from lrd.parts.checks import check_optimizer, check_schedule
from lrd.parts.losses import build_loss, check_loss
from lrd.parts.models import build_model, check_model, residual_blocks
from lrd.parts.optimizers import build_optimizer
from lrd.parts.schedules import Schedule, result_settings, total_steps
from lrd.parts.sync_batchnorm import convert_sync_batchnorm
from lrd.parts.weights import load_weights
from lrd.recipe import named
from lrd.tracking.lost_records import describe_lost_records
from lrd.tracking.recorder import Recorder
from lrd.tracking.tracker import Tracker


def set_up(recipe: recipes.Recipe, roll_call: RollCall) -> Job:
    """Build all parts of a job and go on from the newest valid checkpoint in `run_dir`.

    Nothing is written to `run_dir` before every rank has checked all that can be wrong with the
    recipe and the data.

    Args:
        roll_call: answers for this rank as soon as the ranks have met.

    Raises:
        UserError: the same on every rank.
    """
    recipe = hardware.resolve_auto(recipe)
    accelerator = _meet(recipe, roll_call)
    claim = _connect_mirror(recipe)
    starts_anew = not _has_checkpoint(recipe, claim)
    job = _build_together(recipe, accelerator, roll_call, starts_anew)

    job.claim = claim
    communication.run_on_main_process(lambda: _require_same_run_in_mirror(job))

    # From here on the run directory is this run's, and the mirror too.
    with ExitStack() as stack:
        if claim is not None:  # a start that ends here must not seem to use the mirror
            stack.callback(claim.close)
            stack.callback(claim.release)

        communication.run_on_main_process(lambda: _lock_run_dir(job))
        _resume(job)

        wrap_model(job)
        communication.run_on_main_process(lambda: _open_outputs(job))
        stack.pop_all()
    return job


def set_up_replay(recipe: recipes.Recipe, roll_call: RollCall, checkpoint: Path | None) -> Job:
    """Build all parts of a job whose steps are computed again. It has no outputs.

    Args:
        recipe: by which the steps were computed.
        roll_call: answers for this rank as soon as the ranks have met.
        checkpoint: the state to begin with, verified; None: that of a run before its first step.

    Raises:
        UserError: the same on every rank.
    """
    recipe = hardware.resolve_auto(recipe)
    accelerator = _meet(recipe, roll_call)
    job = _build_together(recipe, accelerator, roll_call, starts_anew=checkpoint is None)
    if checkpoint is not None:
        load_checkpoint(job, checkpoint)
    wrap_model(job)
    return job


def _meet(recipe: recipes.Recipe, roll_call: RollCall) -> Accelerator:
    """Meet the other ranks, and refuse to start where they have another code or recipe."""
    facts = {
        "lrd": __version__,
        "lrd's source files": source_digest(),
        "torch": torch.__version__,
        **named.describe_sources(recipe),
        **recipe.settings_shared_by_ranks(),
    }
    return start_rank(recipe.trainer, facts, roll_call)


def _build_together(
    recipe: recipes.Recipe, accelerator: Accelerator, roll_call: RollCall, starts_anew: bool
) -> Job:
    """Load the data and build the job on all ranks, and compare what each has built."""
    # One rank of each host is first: it downloads or decodes, the others find the result.
    dataset = communication.local_main_process_first(
        accelerator, lambda: datasets.load_dataset(recipe.data, recipe.seed)
    )
    job = communication.run_on_all_ranks(
        lambda: build_job(recipe, accelerator, dataset, roll_call, starts_anew)
    )
    job.sources = named.describe_sources(recipe)
    job.source_digest = source_digest()
    communication.require_equal_on_all_ranks(
        {
            "data.fingerprint": job.result_settings["data.fingerprint"],
            "the file of model.weights": job.start_weights_digest,
            "model.arch": _describe_parameters(job.raw_model),
        }
    )
    return job


def _describe_parameters(model: nn.Module) -> str:
    """What the ranks compare of their networks: one may depend on the host or on the rank."""
    shapes = [
        (name, tuple(value.shape), str(value.dtype)) for name, value in model.named_parameters()
    ]
    digest = hashlib.sha256(repr(shapes).encode()).hexdigest()[:12]
    num_elements = sum(value.numel() for value in model.parameters())
    return (
        f"{num_elements:,} parameters in {len(shapes)} tensors, digest {digest} of names and shapes"
    )


def source_digest() -> str:
    """A digest of this package's source files.

    Hosts with different checkouts of one version are found by it at the start.
    """
    return named.source_digest(Path(lrd.__file__).parent)


def _connect_mirror(recipe: recipes.Recipe) -> Claim | None:
    """Try out the mirror, on the main process, if the recipe names one. Nothing stays there.

    Raises:
        UserError: it cannot be used; on every rank.
    """
    url = recipe.checkpoint.mirror
    if url is None:
        return None

    claims: list[Claim] = []

    def connect() -> None:
        remote = Remote(url, creates_folder=True)
        remote.require_access()
        claims.append(Claim(remote, Path(recipe.run_dir)))

    communication.run_on_main_process(connect)
    return claims[0] if claims else None


def _has_checkpoint(recipe: recipes.Recipe, claim: Claim | None) -> bool:
    """Whether any rank sees a checkpoint in its run directory, or rank 0 one in the mirror."""

    def find() -> bool:
        if store.list_steps(Path(recipe.run_dir)):
            return True
        return claim is not None and bool(whole_steps(fetching.list_checkpoints(claim.remote)))

    has_one = communication.run_on_all_ranks(find)
    return any(communication.all_gather_values(has_one))


def build_job(
    recipe: recipes.Recipe,
    accelerator: Accelerator,
    dataset: datasets.Dataset,
    roll_call: RollCall,
    starts_anew: bool = True,
) -> Job:
    """Data, network, optimizer and schedule, before anything of an earlier run is read.

    All parts that are the user's own are tried out here.

    Args:
        starts_anew: whether the run begins, with `model.weights` if the recipe names a file. The
            weights of a run that goes on come from its checkpoint.
    """
    device = accelerator.device
    num_classes = len(dataset.classes)
    if recipe.model.num_classes is not None and recipe.model.num_classes < num_classes:
        raise UserError(
            f"model.num_classes: is {recipe.model.num_classes}, "
            f"but the data has {num_classes} classes"
        )

    fingerprint = dataset.fingerprint()
    dataset = dataset.to(device)
    batches = build_batches(
        dataset.train,
        recipe,
        num_classes=recipe.model.num_classes or num_classes,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )

    model = build_model(recipe.model, num_classes, recipe.seed).to(device)
    start_weights_digest = None
    if starts_anew and recipe.model.weights is not None:
        start_weights_digest = load_weights(model, recipe.model)
    check_model(model, recipe.model, batches.image_shape, num_classes)
    if batches.micro_batch_size == 1:
        _require_values_for_batchnorm(model, recipe, batches)

    loss_function = build_loss(recipe.trainer, device)
    num_outputs = recipe.model.num_classes or num_classes
    check_loss(recipe.trainer, loss_function, num_outputs, device, recipe.data)
    check_optimizer(model, recipe)
    check_schedule(model, recipe, batches.steps_per_epoch)

    if recipe.model.sync_batchnorm:
        model = convert_sync_batchnorm(model, device)
    # A rank that is alone has nothing to share.
    is_sharded = recipe.trainer.sharding == "full" and accelerator.num_processes > 1

    # On a CPU it is enough that the inputs are channels_last; with such parameters the masked step
    # is slower. FSDP2 refuses them.
    if recipe.trainer.channels_last and device.type != "cpu" and not is_sharded:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if is_sharded:
        sharding.shard_model(model, residual_blocks(model), device)

    optimizer = build_optimizer(model, recipe)
    if is_sharded:
        sharding.require_optimizer_support(optimizer)
    schedule = Schedule(
        optimizer,
        recipe.schedule,
        steps_of_all_epochs=recipe.trainer.epochs * batches.steps_per_epoch,
        steps_per_epoch=batches.steps_per_epoch,
    )

    all_steps = total_steps(recipe, batches.steps_per_epoch)
    batches.end_step = all_steps
    return Job(
        recipe=recipe,
        accelerator=accelerator,
        dataset=dataset,
        batches=batches,
        raw_model=model,
        ddp_model=model,  # until `wrap_model`
        raw_optimizer=optimizer,
        accelerated_optimizer=AcceleratedOptimizer(optimizer),
        schedule=schedule,
        loss_function=loss_function,
        total_steps=all_steps,
        result_settings={**result_settings(recipe), "data.fingerprint": fingerprint},
        sources={},
        start_weights_digest=start_weights_digest,
        roll_call=roll_call,
        recorder=Recorder(model, optimizer, recipe.tracking.probes),
        buffers=BufferSnapshot(model),
        compute_timer=ComputeTimer(device),
        weight_average=_build_weight_average(model, recipe),
    )


def build_batches(
    images: Part, recipe: recipes.Recipe, num_classes: int, rank: int, world_size: int
) -> TrainingBatches:
    """The training batches of one rank, from images in memory or from those that are read.

    Args:
        images: the training images, on the training device.
        recipe: the recipe.
        num_classes: size of the network's output.
        rank: the rank whose part of each batch this is.
        world_size: the number of ranks.

    Raises:
        UserError: the batch cannot be split evenly, or it is larger than the training set.
    """
    mixing = build_mixing(recipe.data, num_classes, recipe.seed)
    accumulation_steps = recipe.trainer.accumulation_steps
    if isinstance(images, Images):
        return Batches(
            images, recipe.data, recipe.seed, rank, world_size, accumulation_steps, mixing
        )

    from lrd.data.streaming.streamed import (  # only here: it takes a while
        StreamedBatches,
        StreamedImages,
    )

    assert isinstance(images, StreamedImages)
    return StreamedBatches(
        images,
        recipe.data.batch_size,
        recipe.seed,
        rank,
        world_size,
        accumulation_steps,
        mixing,
    )


def _require_values_for_batchnorm(
    model: nn.Module, recipe: recipes.Recipe, batches: TrainingBatches
) -> None:
    """Refuse a network whose BatchNorm would have one value for each channel: it needs two."""
    if recipe.model.sync_batchnorm and batches.world_size > 1:
        return

    inputs = torch.zeros((1, *batches.image_shape), device=batches.mean.device)
    try:
        with torch.no_grad(), preserved_generators():
            copy.deepcopy(model).train()(inputs)
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            f"data.batch_size: is {batches.batch_size}, which leaves one image for each rank and "
            "micro step; BatchNorm needs two values for each channel, and images of this size give "
            "it one"
        ) from None


def _build_weight_average(model: nn.Module, recipe: recipes.Recipe) -> WeightAverage | None:
    decay = recipe.trainer.ema_decay
    if decay is None:
        return None

    try:
        return WeightAverage(model, decay)
    except RuntimeError as error:  # `copy.deepcopy` refuses a network with computed parameters
        raise UserError(
            f"trainer.ema_decay: is {decay}, but the network cannot be copied: {first_line(error)}"
        ) from None


def _require_same_run_in_mirror(job: Job) -> None:
    """Refuse a mirror that another run has. Nothing is written."""
    if job.claim is None:
        return
    saved = job.claim.find_settings()
    if saved is not None:
        job.has_other_settings(saved, job.claim.remote.url, "checkpoint.mirror")


def _lock_run_dir(job: Job) -> None:
    job.run_dir = RunDir(Path(job.recipe.run_dir))
    console.open_log(job.run_dir.path / "train.log")

    # The lock was free, so a run that still says this of itself is gone.
    status = read_status(job.run_dir.path)
    if status is not None and status["state"] == "running":
        console.log(
            "the start before this one did not report its end: it was killed, or its host failed; "
            f"it last reported step {status.get('step')}"
        )
    console.log(describe_start(job))
    if job.claim is not None:
        job.claim.take(job.result_settings)


def _resume(job: Job) -> None:
    """Load the newest valid checkpoint of any host, or of the mirror, into all ranks.

    There need not be one.
    """
    run_dir = Path(job.recipe.run_dir)
    fetch_newest(run_dir)
    communication.run_on_main_process(lambda: _fetch_from_mirror(job, run_dir))

    files: dict[str, bytes] = {}  # on rank 0, until the others have them too

    def read_newest() -> list[Any]:
        newest_path, newest_files = _read_newest(job.recipe)
        files.update(newest_files)
        return [str(newest_path), list(newest_files)]

    path, names = communication.run_on_main_process(read_newest)
    if names:
        console.info(f"{path}: going on after step {store.parse_name(Path(path).name)}")
        _load_on_all_ranks(job, Path(path), names, files)


def load_checkpoint(job: Job, path: Path) -> None:
    """Load a checkpoint, which was verified before, into all ranks. Rank 0 reads it."""
    files: dict[str, bytes] = {}

    def read() -> list[str]:
        files.update(store.read_files(path))
        return list(files)

    names = communication.run_on_main_process(read)
    _load_on_all_ranks(job, path, names, files)


def _load_on_all_ranks(job: Job, path: Path, names: list[str], files: dict[str, bytes]) -> None:
    """Send the files of a checkpoint from rank 0 to all ranks and load them.

    Args:
        names: of the files.
        files: their content, on rank 0.
    """
    for name in names:
        files[name] = communication.broadcast_bytes(files.get(name, b""), source=0)
    communication.run_on_all_ranks(lambda: _load(job, path, files))
    # What one rank has read must have arrived on all.
    compare_replicas(job.raw_model, job.raw_optimizer, job.step)


def _fetch_from_mirror(job: Job, run_dir: Path) -> None:
    if job.claim is not None:
        fetching.fetch_newest(job.claim.remote, run_dir)


def _read_newest(recipe: recipes.Recipe) -> tuple[Path, dict[str, bytes]]:
    """The files of the newest valid checkpoint. Only rank 0 reads; the others get what it read."""
    run_dir = Path(recipe.run_dir)
    path, passed_over = store.recover_newest(run_dir)
    for line in passed_over:
        console.info(line)
    if path is not None:
        return path, store.read_files(path)

    if passed_over and recipe.model.weights is not None:
        raise UserError(
            f"{run_dir}: no valid checkpoint is left; name another run_dir to start from "
            "model.weights again"
        )
    if passed_over:
        console.info(f"{run_dir}: no valid checkpoint is left; starting from the beginning")
    return run_dir, {}


def _load(job: Job, path: Path, files: dict[str, bytes]) -> None:
    job.load_train_state(store.parse_files(path, files), path)


def wrap_model(job: Job) -> None:
    """Put the network under DDP, where there are several ranks, and compile it, where asked for.

    A sharded network needs no DDP.
    """
    trainer = job.recipe.trainer
    if job.is_sharded:
        # Autocast as under DDP, and nothing else.
        job.ddp_model = job.accelerator.prepare_model(
            job.raw_model, device_placement=False, evaluation_mode=True
        )
        job.accelerated_optimizer = job.accelerator.prepare_optimizer(
            job.raw_optimizer, device_placement=False
        )
    else:
        with warnings.catch_warnings():
            # Accelerate passes it on; torch 2.13 has a new name for it, which older ones lack.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            job.ddp_model, job.accelerated_optimizer = job.accelerator.prepare(
                job.raw_model, job.raw_optimizer
            )

    _choose_exchange(job)
    if trainer.compile:
        if job.is_sharded:
            _allow_compiled_blocks(len(residual_blocks(job.raw_model)))
        # In shards the blocks are compiled one by one, with other image sizes. With these as
        # symbols torch 2.13 fails to compile the backward pass.
        job.raw_model.compile(dynamic=False if job.is_sharded else None)
    if job.accelerator.num_processes > 2 and not job.is_sharded:
        _warm_up_ddp_buckets(job)


def _allow_compiled_blocks(num_blocks: int) -> None:
    """Let torch compile each block for training, for evaluation, and for two smaller last batches.

    Blocks of a class share their code, of which torch compiles eight variants. It would run what
    comes later as it is, which for a ResNet is most of an evaluation.
    """
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, 4 * num_blocks)


def _choose_exchange(job: Job) -> None:
    """Choose what the ranks send each other of their gradients."""
    trainer = job.recipe.trainer
    sends_bf16 = trainer.gradient_compression == "bf16"
    if job.accelerator.num_processes == 1:
        if trainer.gradient_exchange == "kept":
            console.info("trainer.gradient_exchange=kept: one rank sends nothing to others")
        return

    if trainer.gradient_exchange == "kept":
        wire_dtype = torch.bfloat16 if sends_bf16 else None
        try:
            job.exchange = exchange_kept(job.ddp_model, job.raw_optimizer, wire_dtype)  # type: ignore[arg-type]
        except ValueError as error:  # a network of the user's own with complex numbers, for example
            raise UserError(f"trainer.gradient_exchange: {error}") from None
    elif sends_bf16:
        job.ddp_model.register_comm_hook(None, bf16_all_reduce_hook)  # type: ignore[operator]


def _warm_up_ddp_buckets(job: Job) -> None:
    """Run two passes that leave no trace, so that the first step after a resume has final buckets.

    After its first backward pass DDP regroups the gradients into other buckets, and the order in
    which the ranks' gradients are summed changes with them. Two ranks do not notice, because a + b
    = b + a; with three or more, a resumed run would differ from one that was not interrupted.
    """
    # A compiled network is compiled anew for each batch size.
    batch_size = job.batches.micro_batch_size if job.recipe.trainer.compile else 2
    inputs = job.make_inputs(batch_size)
    job.buffers.take(job.step)

    for _ in range(2):
        job.accelerator.backward(job.ddp_model(inputs).sum())

    job.buffers.restore()
    job.raw_model.zero_grad()


def _open_outputs(job: Job) -> None:
    """Write the resolved recipe and open the records and the checkpoint writer."""
    assert job.run_dir is not None
    heading = "" if job.forked_from is None else f"# {describe_fork(job.forked_from)}\n"
    job.run_dir.write("recipe.yaml", heading + job.recipe.dump())

    last_step = min(job.rescued_scalars, default=job.step + 1) - 1  # the files must have these
    if last_step:
        every_steps = job.recipe.tracking.every_steps
        for line in describe_lost_records(job.run_dir.path, last_step, every_steps):
            console.info(line)

    job.tracker = Tracker(
        run_dir=job.run_dir.path,
        step=job.step,
        steps_per_epoch=job.batches.steps_per_epoch,
        recipe=job.recipe,
        network=job.raw_model,
        optimizer=job.raw_optimizer,
        rescued=job.rescued_scalars,
        looks_for_evaluation=job.is_evaluation_due,
    )
    job.recorder = job.tracker
    job.writer = AsyncWriter(job.run_dir.path, job.recipe.checkpoint, job.tracker, job.claim)
    if job.writer.uploader is not None and job.step:
        # An earlier start may have ended before its last upload.
        job.writer.uploader.offer(job.step, job.kept_best_step)
