"""What ranks tell each other; tests/launchers has more of it."""

from __future__ import annotations

import ast
import errno
import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lrd
from lrd.distributed import communication
from lrd.errors import UserError
from tests.helpers.launching import (
    RECIPE,
    ROOT,
    SMALL,
    command,
    environment,
    final_state,
    launch,
)


def raise_user_error() -> None:
    raise UserError("data.root: not there")


def raise_disk_error() -> None:
    raise OSError(errno.EIO, "Input/output error", "shard-3.bin")


@pytest.mark.parametrize("run", [communication.run_on_all_ranks, communication.run_on_main_process])
def test_errors_of_users_and_disks_become_one_line(
    run: Callable[[Callable[[], object]], object],
) -> None:
    with pytest.raises(UserError, match=r"^data.root: not there$"):
        run(raise_user_error)
    with pytest.raises(UserError, match=r"^shard-3.bin: Input/output error$"):
        run(raise_disk_error)
    assert run(lambda: 3) == 3


def test_the_statistics_of_a_step() -> None:
    statistics = communication.gather_step_statistics(
        torch.tensor(2.5),
        torch.tensor(float("inf")),
        torch.tensor(0.75),
        stop_signal=15,
        has_checkpoint_error=True,
    )
    assert statistics.losses == [2.5]
    assert statistics.mean_accuracy == 0.75
    assert statistics.mean_loss == 2.5
    assert statistics.stop_signal == 15
    assert statistics.has_checkpoint_error
    assert statistics.has_finite_losses
    assert not statistics.is_finite


# ---------------------------------------------------------------------------
# No pickle from another rank is loaded

PICKLING = {
    "all_gather_object",
    "gather_object",
    "broadcast_object_list",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
    "gather_for_metrics",
    "Unpickler",
}


def test_no_code_of_lrd_loads_pickles_or_calls_collectives_of_objects() -> None:
    """`torch.load` is called with `weights_only=True`, which runs no code."""
    found = []
    for file in sorted(Path(lrd.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
            if name in PICKLING:
                found.append(f"{file.name}:{node.lineno}: {name}")
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            is_safe = any(
                keyword.arg == "weights_only" and ast.unparse(keyword.value) == "True"
                for keyword in node.keywords
            )
            allows = [keyword.arg for keyword in node.keywords if keyword.arg == "allow_pickle"]
            if called in ("pickle.loads", "pickle.load") or allows:
                found.append(f"{file.name}:{node.lineno}: {called}")
            if called == "torch.load" and not is_safe:
                found.append(f"{file.name}:{node.lineno}: torch.load without weights_only")
    assert found == []


def test_values_arrive_exactly_and_a_pickle_is_refused_in_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    program = str(ROOT / "tests" / "helpers" / "run_communication.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, program, str(tmp_path)],
            env={**environment(), **variables, "RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs

    facts, other_facts = (json.loads(output) for output, _ in outputs)
    for rank_facts in (facts, other_facts):
        assert rank_facts["values"] == rank_facts["bits"] == [True, True]
        assert rank_facts["nan"]
        assert rank_facts["bytes"]
        assert rank_facts["tuple"].startswith("tuple is nothing that ranks tell each other")

    refusal = "rank 1 sent something that is not JSON; it was not read any further"
    assert facts["gathered"] == facts["broadcast"] == refusal
    assert facts["too large"].startswith(f"rank 1 announced {1 << 50} bytes")
    assert not (tmp_path / "ran").exists()


# Slow, because the test above has what the ranks send each other.
@pytest.mark.slow
def test_training_and_resuming_load_no_pickle_of_another_rank(tmp_path: Path) -> None:
    program = str(ROOT / "tests" / "helpers" / "run_without_pickles.py")
    overrides = [*SMALL, "trainer.epochs=1", f"run_dir={tmp_path / 'run'}"]
    done = launch(command(2, [program, RECIPE, *overrides]))
    assert done.returncode == 0, done.stdout + done.stderr
    assert final_state(tmp_path / "run")[2].name == "step-00000006"
