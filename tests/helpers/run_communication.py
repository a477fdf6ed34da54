"""What each of two ranks of a test runs: they tell each other values, then one sends a pickle.

    run_communication.py FOLDER

Prints a JSON object. FOLDER/ran appears if a pickle was loaded.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lrd.distributed import accelerator, communication
from lrd.errors import RunError

SMALLEST = 5e-324
FLOATS = [0.1, -0.0, 1 / 3, SMALLEST, 1.7976931348623157e308, float("inf"), float("-inf")]
VALUE = {"floats": FLOATS, "whole": -(2**63), "text": "\udcff é", "none": None, "is": True}


class Pickled:
    """Creates a file when its pickle is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def refusal(receive: Any) -> str:
    """What is said of what the other rank sends."""
    try:
        receive()
    except RunError as error:
        return str(error)
    return "not refused"


def main(folder: Path) -> dict[str, object]:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    facts: dict[str, object] = {}

    values: list[Any] = communication.all_gather_values([rank, VALUE])
    told = communication.broadcast_value(VALUE if rank == 1 else None, source=1)
    facts["values"] = [
        number == other and value == VALUE and told == VALUE
        for other, (number, value) in enumerate(values)
    ]
    packed = [struct.pack("<7d", *value["floats"]) for _, value in values]
    facts["bits"] = [bits == struct.pack("<7d", *FLOATS) for bits in packed]
    (nan,) = communication.broadcast_from_main([float("nan")])
    facts["nan"] = nan != nan

    sent = bytes(range(256)) * 5000 if rank == 1 else b""
    received = [communication.broadcast_bytes(data, source=1) for data in (sent, b"")]
    facts["bytes"] = received == [bytes(range(256)) * 5000, b""]

    # What torch's collectives of objects send: sizes, then pickles.
    if rank == 1:
        pickled = torch.frombuffer(
            bytearray(pickle.dumps(Pickled(folder / "ran"))), dtype=torch.uint8
        )
        size = torch.tensor([pickled.numel()])
        dist.all_gather([torch.empty_like(size), torch.empty_like(size)], size)
        dist.all_gather([torch.empty_like(pickled), torch.empty_like(pickled)], pickled)
        dist.broadcast(size, src=1)
        dist.broadcast(pickled, src=1)
        dist.broadcast(torch.tensor([1 << 50]), src=1)
    else:
        facts["gathered"] = refusal(lambda: communication.all_gather_values(0))
        facts["broadcast"] = refusal(lambda: communication.broadcast_value(0, source=1))
        facts["too large"] = refusal(lambda: communication.broadcast_bytes(b"", source=1))

    try:
        communication.all_gather_values((1, 2))
    except TypeError as error:
        facts["tuple"] = str(error)
    return facts


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))), flush=True)
    accelerator.exit_process(0)
