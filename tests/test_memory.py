"""What does not fit into memory is refused before it is allocated."""

import resource

import pytest
import torch

from lrd import memory
from lrd.errors import UserError
from tests.helpers.processes import in_child


def test_what_fits_passes():
    memory.require_memory(1, "data.image_size: is 8", "the images")


@pytest.mark.parametrize("num_bytes", [10**15, 10**60])
def test_what_does_not_fit_is_one_line_with_the_key(num_bytes):
    with pytest.raises(UserError, match=r"^data.image_size: is 9: the images would take .* GB of"):
        memory.require_memory(num_bytes, "data.image_size: is 9", "the images")


def test_a_limit_of_this_process_counts():
    def limit_and_ask():
        soft = 1 << 40
        resource.setrlimit(resource.RLIMIT_AS, (soft, resource.getrlimit(resource.RLIMIT_AS)[1]))
        available = memory.available_bytes()
        resource.setrlimit(resource.RLIMIT_AS, (available // 2, -1))
        assert memory.available_bytes() == available // 2

    assert in_child(limit_and_ask) == 0


@pytest.mark.parametrize(
    ("name", "content", "limit"), [("max", "4096\n", 4096), ("none", "max\n", None)]
)
def test_the_limit_of_a_container_counts(tmp_path, monkeypatch, name, content, limit):
    file = tmp_path / name
    file.write_text(content)
    monkeypatch.setattr(memory, "_CGROUP_LIMITS", (file, tmp_path / "missing"))
    assert (memory.available_bytes() == 4096) == (limit is not None)


def test_allocations_that_fail_are_told_from_other_errors():
    def allocate_too_much():
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, -1))
        with pytest.raises(RuntimeError) as raised:
            torch.empty(1 << 40)
        assert memory.is_out_of_memory(raised.value)

    assert in_child(allocate_too_much) == 0
    assert memory.is_out_of_memory(MemoryError())
    assert memory.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not memory.is_out_of_memory(RuntimeError("shapes differ"))
