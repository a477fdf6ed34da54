"""How the ranks of a start find each other: behind a prefix of the launcher's store that is this start's own.

With `--max_restarts` that store outlives the ranks, and new ones would take the addresses of dead ones from it
(pytorch issue 135712). Kills of one rank after which the first restart worked, on gloo with static rendezvous on one
host: 5 of 17 without this, 21 of 21 with it.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import register_rendezvous_handler
from torch.distributed.rendezvous import rendezvous as rendezvous_of_torch

from lrd.errors import RunError, first_line

INIT_METHOD = "lrd://"
prefix = ""  # of this start's keys in the store; the same on all its ranks


def _meet(_: str, timeout: timedelta, **__: Any) -> Iterator[tuple[Store, int, int]]:
    """`env://` behind a prefix.

    Each rank counts its starts in the store, and goes on when all have seen the same counts.
    TORCHELASTIC_RESTART_COUNT does not tell starts apart: each host's launcher counts its own.

    Raises:
        RunError: the launcher is gone, or the ranks did not come together in time.
    """
    global prefix
    _refuse_orphans()
    store, rank, world_size = next(rendezvous_of_torch("env://", timeout=timeout))
    starts, seen = ([f"lrd/{what}/{each}" for each in range(world_size)] for what in ("starts", "seen"))
    store.add(starts[rank], 1)
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        counts = b" ".join(store.multi_get(starts))
        store.set(seen[rank], counts)
        if set(store.multi_get(seen)) == {counts}:
            break
        if time.monotonic() > deadline:
            raise RunError(f"rank {rank}: not all of the {world_size} ranks came within {timeout}")
        time.sleep(0.02)
    prefix = f"lrd/start/{counts.decode()}"
    yield PrefixStore(prefix, store), rank, world_size


def _refuse_orphans() -> None:
    """A launcher's store is there before its ranks are; they would wait for one that is gone until time is up."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            socket.create_connection((address, port), timeout=10).close()
        except OSError as error:
            raise RunError(f"the launcher is gone: {address}:{port}: {first_line(error)}") from None


register_rendezvous_handler("lrd", _meet)  # type: ignore[no-untyped-call]
