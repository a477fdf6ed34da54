"""What does not fit into memory is refused before it is allocated."""

import resource

import pytest
import torch

from lrd import host, train
from lrd.distributed.roll_call import RollCall
from lrd.errors import UserError
from lrd.parts import resnet
from tests.helpers.processes import in_child


def test_what_fits_passes():
    host.require_memory(1, "data.image_size: is 8", "the images")


@pytest.mark.parametrize("num_bytes", [10**15, 10**60])
def test_what_does_not_fit_is_one_line_with_the_key(num_bytes):
    with pytest.raises(UserError, match=r"^data.image_size: is 9: the images would take .* GB of"):
        host.require_memory(num_bytes, "data.image_size: is 9", "the images")


def test_a_limit_of_this_process_counts():
    def limit_and_ask():
        soft = 1 << 40
        resource.setrlimit(resource.RLIMIT_AS, (soft, resource.getrlimit(resource.RLIMIT_AS)[1]))
        available = host.available_bytes()
        resource.setrlimit(resource.RLIMIT_AS, (available // 2, -1))
        assert host.available_bytes() == available // 2

    assert in_child(limit_and_ask) == 0


@pytest.mark.parametrize(
    ("name", "content", "limit"), [("max", "4096\n", 4096), ("none", "max\n", None)]
)
def test_the_limit_of_a_container_counts(tmp_path, monkeypatch, name, content, limit):
    file = tmp_path / name
    file.write_text(content)
    monkeypatch.setattr(host, "_MEMORY_LIMITS", (file, tmp_path / "missing"))
    assert (host.available_bytes() == 4096) == (limit is not None)


def test_allocations_that_fail_are_told_from_other_errors():
    def allocate_too_much():
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, -1))
        with pytest.raises(RuntimeError) as raised:
            torch.empty(1 << 40)
        assert host.is_out_of_memory(raised.value)

    assert in_child(allocate_too_much) == 0
    assert host.is_out_of_memory(MemoryError())
    assert host.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not host.is_out_of_memory(RuntimeError("shapes differ"))


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 7 bytes")]
)
def test_a_run_without_memory_ends_in_one_line(error, capsys):
    assert train.report_failure(None, RollCall(), error) == 1
    output, errors = capsys.readouterr()
    assert output == ""
    (line,) = errors.splitlines()
    assert line.startswith("lrd: rank 0 on ")
    assert "before the first step: out of memory" in line
    assert "data.batch_size" in line


@pytest.mark.parametrize("arch", resnet.ARCHITECTURES)
@pytest.mark.parametrize(("width", "num_classes"), [(8, 10), (16, 1000), (3, 5000)])
def test_the_estimate_of_a_network_is_a_little_below_its_weights(
    arch, width, num_classes, monkeypatch
):
    needed = []
    monkeypatch.setattr(resnet, "require_memory", lambda *arguments: needed.append(arguments[0]))
    resnet.require_memory_of_resnet(arch, num_classes, width)

    network = resnet.ResNet(arch, num_classes, width)
    with_gradients = 2 * sum(parameter.nbytes for parameter in network.parameters())
    assert 0.75 * with_gradients < needed[0] <= with_gradients


@pytest.mark.parametrize(
    ("width", "num_classes", "key"),
    [(10**8, 10, "model.width: is 100000000"), (8, 10**12, "model.num_classes: is 1000000000000")],
)
def test_the_key_that_makes_a_network_too_large_is_named(width, num_classes, key):
    with pytest.raises(UserError, match=f"^{key}: resnet34 and its gradients would take"):
        resnet.require_memory_of_resnet("resnet34", num_classes, width)
