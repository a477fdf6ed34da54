"""Small runs to replay, replays in the process of the test, and faults in the files of a run."""

from __future__ import annotations

import gc
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch
from accelerate.state import AcceleratorState
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from torch import Tensor

from lrd.checkpoint import manifest, store
from lrd.job.state import Job
from lrd.replay.computing import launching, ranks
from lrd.replay.computing.observers import Observer
from lrd.replay.computing.plan import Leg, Plan
from lrd.tracking.event_file import parse_record, record_offsets
from lrd.train import run

RECIPE = """
data: {dataset: digits, batch_size: 240}
model: {arch: resnet18, width: 2}
optimizer: {lr: 0.05, momentum: 0.9}
lr_dropout: {keep_prob: 0.5}
trainer: {epochs: 3, device: cpu}
checkpoint: {keep_last: 10}
"""  # 5 steps an epoch, a checkpoint after each
STEPS_PER_EPOCH = 5


def train(run_dir: Path, *overrides: str) -> None:
    """Train RECIPE in this process; an existing run goes on."""
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    recipe = run_dir.parent / "recipe.yaml"
    recipe.write_text(RECIPE)
    assert run(str(recipe), [f"run_dir={run_dir}", *overrides]) == 0
    reset()


def train_on_one_thread(run_dir: Path, *overrides: str) -> Path:
    """Train RECIPE for several tests, whose own fixture of the threads is not there yet."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(run_dir, *overrides)
    torch.set_num_threads(threads)
    return run_dir


def train_recipe(path: Path) -> None:
    """Train what a recipe file says, in this process."""
    assert run(str(path), []) == 0
    reset()


def reset() -> None:
    """Forget the Accelerator of the last run in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    gc.collect()


class FlipBit(Observer):
    """Flips the lowest bit of one element after a step of a replay.

    Args:
        step: the step.
        name: of a parameter or buffer; or, with ` (momentum_buffer)` behind it, of its momentum.
        element: the element in the flattened tensor.
    """

    def __init__(self, step: int, name: str, element: int) -> None:
        self.step = step
        self.name = name
        self.element = element

    def after_update(self, job: Job) -> None:
        if job.step == self.step:
            flip_lowest_bit(find_tensor(job, self.name), self.element)


def find_tensor(job: Job, name: str) -> Tensor:
    """A living tensor of a job by its name in `lrd.replay.computing.state`."""
    name, _, key = name.partition(" (")
    tensor = job.raw_model.state_dict()[name]
    if not key:
        return tensor
    parameter = dict(job.raw_model.named_parameters())[name]
    return job.raw_optimizer.state[parameter][key.removesuffix(")")]


def flip_lowest_bit(tensor: Tensor, element: int) -> None:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    flat = tensor.detach().reshape(-1)
    assert flat.data_ptr() == tensor.data_ptr()  # a view, not a copy
    flat.view(integers)[element] ^= 1


@contextmanager
def replays_in_this_process(
    monkeypatch: pytest.MonkeyPatch, *observers: Observer, of_run: Path | None = None
) -> Iterator[None]:
    """A context in which single ranks are replayed here, which saves the imports.

    Args:
        observers: look at the steps too, and may disturb them.
        of_run: the run whose replays they see; None: all.
    """

    def start_here(leg: Leg, path: Path) -> int:
        assert leg.ranks == 1
        plan = Plan.read(path)
        threads = torch.get_num_threads()
        make_observers = ranks.make_observers

        def make_more(*arguments):
            made = make_observers(*arguments)
            is_seen = of_run is None or plan.name == str(of_run)
            return [*observers, *made] if is_seen else made

        with monkeypatch.context() as patch:
            patch.setattr(ranks, "make_observers", make_more)
            status = ranks.run_plan(path)
        torch.set_num_threads(threads)
        reset()
        return status

    with monkeypatch.context() as patch:
        patch.setattr(launching, "start_ranks", start_here)
        yield


def tamper_with_checkpoint(run_dir: Path, step: int, name: str, element: int) -> None:
    """Flip the lowest bit of one weight of a checkpoint, and write a manifest that is valid."""
    path = store.checkpoint_path(run_dir, step)
    file = path / store.MODEL_FILE
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = stream.read(size)
    tensors = safetensors.torch.load_file(file)
    flip_lowest_bit(tensors[name], element)
    body = safetensors.torch.save(tensors)
    own_size = int.from_bytes(body[:8], "little")
    file.write_bytes(size.to_bytes(8, "little") + header + body[8 + own_size :])
    _require_same_layout(header, body[8 : 8 + own_size])
    manifest.write_manifest(
        path, step, list(manifest.read_files(path)), manifest.read_previous(path)
    )


def _require_same_layout(header: bytes, other: bytes) -> None:
    """The tensors must lie in the file as the header says."""
    import json

    first = {key: value for key, value in json.loads(header).items() if key != "__metadata__"}
    assert first == json.loads(other)


def tamper_with_record(run_dir: Path, step: int, tag: str) -> None:
    """Change one scalar in an event file by its last bit, with a checksum that is valid."""
    for path in sorted(run_dir.glob("events.out.tfevents.*")):
        content = path.read_bytes()
        for offset in record_offsets(content):
            event = parse_record(content, offset)
            if event is None or event.step != step or not event.HasField("summary"):
                continue
            for value in event.summary.value:
                if value.tag == tag:
                    bits = struct.unpack("<I", struct.pack("<f", value.simple_value))[0]
                    value.simple_value = struct.unpack("<f", struct.pack("<I", bits ^ 1))[0]
                    path.write_bytes(_replace_record(content, offset, event.SerializeToString()))
                    return
    raise AssertionError(f"no record of {tag} at step {step}")


def _replace_record(content: bytes, offset: int, raw: bytes) -> bytes:
    (length,) = struct.unpack_from("<Q", content, offset)
    end = offset + 12 + length + 4
    header = struct.pack("<Q", len(raw))
    record = header + struct.pack("<I", masked_crc32c(header)) + raw
    record += struct.pack("<I", masked_crc32c(raw))
    return content[:offset] + record + content[end:]
