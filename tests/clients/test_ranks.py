"""Two ranks: DistributedDataParallel, ZeRO, FSDP1 and FSDP2. All draw the masks of one process."""

import os
import subprocess
import sys

import pytest
import torch

from tests.clients.reference import assert_same_bits, fraction_equal, restore_dropped, values
from tests.clients.run_two_ranks import KEEP_PROB, MOMENTUM, SEED, STEPS
from tests.clients.small_training import make_batch, make_model

pytestmark = pytest.mark.slow  # about ten seconds

RANKS = (0, 1)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the scenarios of run_two_ranks.py found: a function of a scenario's name and a rank."""
    folder = tmp_path_factory.mktemp("ranks")
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.clients.run_two_ranks", str(rank), "2", str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in RANKS
    ]
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)

    def result_of(name, rank):
        return torch.load(folder / f"{name}.{rank}.pt", weights_only=True)

    return result_of


def train_by_hand(gradients):
    """One process that is given the averaged gradients of each step and masks by hand."""
    model = make_model()
    params = list(model.parameters())
    optimizer = torch.optim.SGD(params, **MOMENTUM)
    for step, step_gradients in enumerate(gradients):
        for param, gradient in zip(params, step_gradients, strict=True):
            param.grad = gradient
        old_values = values(params)
        optimizer.step()
        restore_dropped(params, old_values, seed=SEED, step=step, keep_prob=KEEP_PROB)
    return values(params)


def by_hand_on_whole_batches():
    """One process without ranks: the gradients differ from averaged ones in their rounding."""
    model = make_model()
    params = list(model.parameters())
    optimizer = torch.optim.SGD(params, **MOMENTUM)
    for step in range(STEPS):
        features, labels = make_batch(step)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(features), labels).backward()
        old_values = values(params)
        optimizer.step()
        restore_dropped(params, old_values, seed=SEED, step=step, keep_prob=KEEP_PROB)
    return values(params)


@pytest.mark.parametrize("rank", RANKS)
def test_distributed_data_parallel(results, rank):
    result = results("ddp", rank)
    assert len(result["gradients"]) == STEPS
    assert_same_bits(result["params"], train_by_hand(result["gradients"]))
    for param, other in zip(result["params"], by_hand_on_whole_batches(), strict=True):
        torch.testing.assert_close(param, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("name", ["zero", "zero_resumed"])
def test_zero_redundancy_optimizer(results, name, rank):
    """The same bits as DDP with the stock optimizer on every rank."""
    assert_same_bits(results(name, rank), results("ddp", rank)["params"])


@pytest.mark.parametrize("rank", RANKS)
def test_zero_with_optimizers_of_lrd_is_refused_and_told_what_works(results, rank):
    error = results("zero_of_lrd_optimizers", rank)
    assert error.startswith("ValueError")
    assert "LRDropout(ZeroRedundancyOptimizer(" in error


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("name", ["fsdp1_original_params", "fsdp1_flat_params"])
def test_fsdp1_is_refused_before_anything_moves(results, name, rank):
    result = results(name, rank)
    assert "FSDP2" in result["error"]
    assert not result["moved"]
    assert "keep_prob" not in result["keys"]


@pytest.mark.parametrize("rank", RANKS)
def test_fsdp1_around_a_model_whose_optimizer_is_finished_is_refused_at_the_first_step(
    results, rank
):
    result = results("fsdp1_after_attaching", rank)
    assert "FSDP2" in result["error"]
    assert not result["moved"]


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("name", ["fsdp2", "fsdp2_resumed"])
def test_fsdp2_shards(results, name, rank):
    """Up to the rounding of averaged gradients the parameters are those of DDP."""
    params = results(name, rank)
    ddp_params = results("ddp", rank)["params"]
    for param, other in zip(params, ddp_params, strict=True):
        torch.testing.assert_close(param, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rank", RANKS)
def test_elements_that_no_step_kept_are_where_they_began_on_every_rank(results, rank):
    """After four steps that is one element in sixteen; their bits show the masks themselves."""
    expected = results("ddp", rank)["params"]
    start = values(list(make_model().parameters()))
    never_kept = [param == before for param, before in zip(expected, start, strict=True)]
    assert 0.02 < fraction_equal(expected, start) < 0.13
    for name in ("zero", "fsdp2", "fsdp2_resumed"):
        params = results(name, rank)
        stayed = [param == before for param, before in zip(params, start, strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(stayed, never_kept, strict=True)), name
