"""torchvision can be imported beside the torch that is installed, whatever it was built for."""

import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch

from lrd import torchvision_compat


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def undeclared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """As if nothing were declared yet; the names of the operators that are declared from here on.

    Nothing is really declared: this process has declared them already.
    """
    declared: list[str] = []

    class Library:
        def __init__(self, namespace: str, kind: str) -> None:
            assert (namespace, kind) == ("torchvision", "FRAGMENT")

        def define(self, schema: str) -> None:
            declared.append(schema.partition("(")[0])

    monkeypatch.setattr(torch.library, "Library", Library)
    monkeypatch.setattr(torch.version, "cuda", None)

    # Not through the cache, which remembers this process's own import of torch.
    declare = torchvision_compat._declare_once.__wrapped__
    monkeypatch.setattr(torchvision_compat, "_declare_once", declare)
    return declared


def fail_to_load(path: str) -> None:
    raise OSError(f"Could not load this library: {path}")


def test_torch_calls_the_entry_point() -> None:
    (entry_point,) = [
        point for point in entry_points(group="torch.backends") if point.name == "lrd"
    ]
    assert entry_point.load() is torchvision_compat.declare_missing_operators


def test_a_plain_import_works_after_which_torchvision_is_whole() -> None:
    code = "import torchvision; torchvision.models.resnet18(); print(torchvision.__name__)"
    ended = run_python(code, TORCH_DEVICE_BACKEND_AUTOLOAD="1")
    assert ended.stdout.strip() == "torchvision", ended.stderr


@pytest.mark.parametrize(
    ("autoload", "first"),
    [
        pytest.param("0", "", marks=pytest.mark.slow),
        pytest.param("1", "", marks=pytest.mark.slow),
        pytest.param("1", "import lrd.optim; ", marks=pytest.mark.slow),
    ],
)
def test_lrd_imports_it_in_any_order_and_without_entry_points(autoload: str, first: str) -> None:
    code = f"{first}from lrd.torchvision_compat import torchvision; print(torchvision.__name__)"
    ended = run_python(code, TORCH_DEVICE_BACKEND_AUTOLOAD=autoload)
    assert ended.stdout.strip() == "torchvision", ended.stderr


def test_importing_torch_does_not_import_torchvision() -> None:
    ended = run_python("import sys, torch; print('torchvision' in sys.modules)")
    assert ended.stdout.strip() == "False", ended.stderr


def test_operators_that_do_not_load_are_declared(
    undeclared: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops, "load_library", fail_to_load)
    torchvision_compat.declare_missing_operators()
    assert undeclared == ["nms", "qnms"]


def test_operators_that_load_are_not_declared(
    undeclared: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To declare them too would make `import torchvision` fail."""
    loaded: list[str] = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    torchvision_compat.declare_missing_operators()
    assert undeclared == []
    assert os.path.basename(os.path.dirname(loaded[0])) == "torchvision"


def test_a_torch_with_cuda_is_left_alone(
    undeclared: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.ops, "load_library", fail_to_load)
    torchvision_compat.declare_missing_operators()
    assert undeclared == []


def test_nothing_is_declared_where_there_is_no_torchvision(
    undeclared: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchvision_compat.PathFinder, "find_spec", lambda name: None)
    torchvision_compat.declare_missing_operators()
    assert undeclared == []
