"""The rules about who imports whom."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lrd

PACKAGE = Path(__file__).parents[1] / "lrd"
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
FLOORS = {
    0: (
        "errors",
        "philox",
        "mask",
        "kernels",
        "kept",
        "fused",
        "trial",
        "cpu_kernels",
        "cpu_step",
        "cuda_kernels",
        "cuda_step",
        "controls",
        "settings",
        "dropout",
        "magma",
        "schema",
        "recipe",
        "vision",
        "manifest",
        "network",
    ),
    1: (
        "optim",
        "schedules",
        "models",
        "data",
        "distributed",
        "console",
        "rundir",
        "signals",
        "replicas",
        "rendezvous",
        "batchnorm",
        "peers",
        "hosts",
        "compression",
        "hardware",
    ),
    2: (
        "checkpoint",
        "tracking",
        "evaluate",
        "report",
        "doctor",
        "writer",
        "handover",
        "events",
        "guard",
        "job",
        "profile",
        "progress",
        "plots",
    ),
    3: ("train", "cli"),
}
FLOOR_OF = {module: floor for floor, modules in FLOORS.items() for module in modules}
MAY_IMPORT_ACCELERATE = {"distributed", "checkpoint", "evaluate", "job", "train"}


def imported(module: str) -> set[str]:
    """Dotted names that a module of the package imports, wherever in it the import stands."""
    names = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(["lrd"] * bool(node.level) + ([node.module] if node.module else []))
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def rooms_imported(module: str) -> set[str]:
    """Modules of the package that a module imports."""
    parts = [name.split(".") for name in imported(module)]
    return {name[1] for name in parts if name[0] == "lrd" and len(name) > 1 and name[1] in MODULES}


def test_the_rooms_are_seen():
    assert {"recipe", "data", "train", "cli"} <= set(MODULES)
    assert {"data", "errors", "recipe"} <= rooms_imported("schedules") | rooms_imported("plots")
    assert "train" in rooms_imported("cli")
    assert any(name.startswith("accelerate") for name in imported("distributed"))


@pytest.mark.parametrize("module", MODULES)
def test_nobody_imports_cli_and_cli_alone_imports_train(module):
    assert "cli" not in rooms_imported(module)
    assert "train" not in rooms_imported(module) or module == "cli"


@pytest.mark.parametrize("module", sorted(set(MODULES) - MAY_IMPORT_ACCELERATE))
def test_accelerate_stays_where_it_belongs(module):
    assert not [name for name in imported(module) if name.split(".")[0] == "accelerate"]


@pytest.mark.parametrize("module", sorted(set(MODULES) & set(FLOOR_OF)))
def test_imports_do_not_run_upwards(module):
    above = {room for room in rooms_imported(module) if FLOOR_OF.get(room, 0) > FLOOR_OF[module]}
    assert above == set()


@pytest.mark.parametrize("module", sorted(set(MODULES) & set(FLOORS[0])))
def test_the_ground_floor_imports_itself_alone(module):
    assert rooms_imported(module) <= set(FLOORS[0])


def test_no_room_imports_itself_by_way_of_others():
    order = list(TopologicalSorter({module: rooms_imported(module) for module in MODULES}).static_order())
    assert sorted(order) == MODULES


@pytest.mark.parametrize(
    ("code", "dear"),
    [
        ("import lrd, lrd.cli", ["torch", "numpy", "yaml", "pydantic"]),
        ("import lrd; lrd.LRDropout", ["accelerate", "triton", "numba", "torch._dynamo", "torchvision", "pydantic"]),
        (
            "import lrd.train; from lrd import data, recipe; data.load(recipe.Data(dataset='digits'), 0)",
            ["matplotlib", "sklearn", "scipy", "pandas", "torchvision.transforms.v2", "torch._inductor.compile_fx",
             "tensorboard.backend.event_processing.event_accumulator"],
        ),
    ],
    ids=["lrd", "LRDropout", "train"],
)  # fmt: skip
def test_an_import_brings_nothing_dear_along(code, dear):
    code = f"import sys; {code}; print([name for name in {dear} if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert ended.stdout.strip() == "[]"


def test_all_of_lrd_can_be_had_by_name():
    assert dir(lrd) == sorted(lrd.__all__)
    assert [getattr(lrd, name).__name__ for name in ("LRDropout", "Magma")] == ["LRDropout", "Magma"]
    code = "import lrd; print(lrd.optim.SGD.__name__, lrd.mask.draw.__name__)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert ended.stdout.strip() == "SGD draw"
    with pytest.raises(AttributeError, match="'lrd' has no attribute 'Dropout'"):
        lrd.Dropout  # noqa: B018
