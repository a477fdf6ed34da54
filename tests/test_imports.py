"""Who may import whom: the floors of the house, and what an import may cost."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lrd

PACKAGE = Path(lrd.__file__).parent

# From the ground up. A module imports from its own folder and from lower floors, never from the
# same floor's other folders or from above.
FLOORS = [
    {"errors", "philox", "console", "files", "generators", "host", "startup", "torchvision_compat"},
    {"optim"},
    {"exchange", "recipe"},
    {"data", "distributed", "parts", "tracking"},
    {"checkpoint", "doctor"},
    {"job"},
    {"inference", "study", "train"},
    {"replay"},
    {"cli"},
    {"__main__"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MAX_FILES_IN_A_FOLDER = 12
MAY_IMPORT_ACCELERATE = {
    "lrd.cli.launch",
    "lrd.distributed.accelerator",
    "lrd.distributed.communication",
    "lrd.inference.evaluation",
    "lrd.job.evaluation",
    "lrd.job.setup",
    "lrd.job.state",
}
NEED_TORCH_AND_NUMPY_ALONE = {
    "lrd.optim.mask",
    "lrd.optim.dropout",
    "lrd.optim.magma",
    "lrd.philox",
}


def module_name(file: Path) -> str:
    """lrd/optim/mask.py -> lrd.optim.mask, lrd/optim/__init__.py -> lrd.optim."""
    parts = list(file.relative_to(PACKAGE.parent).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


FILES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}
MODULES = sorted(FILES)


def imported_names(module: str) -> set[str]:
    """Dotted names that a module imports, wherever in it the import stands."""
    names = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported_modules(module: str) -> set[str]:
    """Modules of the package that a module imports; a folder's `__init__` does not count as
    itself.
    """
    return {name for name in imported_names(module) if name in FILES} - {"lrd", module}


def room(module: str) -> str:
    """The folder, or the file beside the folders, that a module belongs to."""
    return module.split(".")[1]


def test_every_module_has_a_floor() -> None:
    rooms = {room(module) for module in MODULES if module != "lrd"}
    assert rooms == set(FLOOR_OF), "a new folder or file needs a floor in this test"


def test_a_module_without_a_floor_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FILES, "lrd.attic.chest", PACKAGE / "errors.py")
    monkeypatch.setattr(sys.modules[__name__], "MODULES", sorted(FILES))
    with pytest.raises(AssertionError, match="needs a floor"):
        test_every_module_has_a_floor()


def test_the_imports_are_seen() -> None:
    assert "lrd.errors" in imported_modules("lrd.parts.schedules")
    assert "lrd.train" in imported_modules("lrd.cli.app")
    assert "accelerate" in imported_names("lrd.distributed.accelerator")
    assert len(MODULES) > 50


@pytest.mark.parametrize("module", [module for module in MODULES if module != "lrd"])
def test_imports_run_downwards_only(module: str) -> None:
    upwards = {
        name
        for name in imported_modules(module)
        if room(name) != room(module) and FLOOR_OF[room(name)] >= FLOOR_OF[room(module)]
    }
    # On the ground floor there are files and no folders; among themselves they may import.
    if FLOOR_OF[room(module)] == 0:
        upwards = {name for name in upwards if FLOOR_OF[room(name)] > 0}
    assert upwards == set()


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {}
    for module in MODULES:
        is_folder = FILES[module].name == "__init__.py"
        # Importing from a folder runs its __init__, which imports from its own files: no circle
        # there.
        graph[module] = {
            name
            for name in imported_modules(module)
            if is_folder or not module.startswith(f"{name}.")
        }
    order = list(TopologicalSorter(graph).static_order())
    assert sorted(order) == MODULES


def test_no_folder_has_more_than_a_dozen_files() -> None:
    for folder in {file.parent for file in FILES.values()}:
        assert len(list(folder.glob("*.py"))) <= MAX_FILES_IN_A_FOLDER, folder


@pytest.mark.parametrize("module", sorted(set(MODULES) - MAY_IMPORT_ACCELERATE))
def test_accelerate_is_imported_only_where_it_is_needed(module: str) -> None:
    assert not {name for name in imported_names(module) if name.split(".")[0] == "accelerate"}


@pytest.mark.parametrize("module", sorted(NEED_TORCH_AND_NUMPY_ALONE))
def test_learning_rate_dropout_needs_torch_and_numpy_alone(module: str) -> None:
    packages = {name.split(".")[0] for name in imported_names(module)}
    assert packages - set(sys.stdlib_module_names) <= {"torch", "numpy", "lrd"}


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        ("import lrd, lrd.data, lrd.cli.app", ["torch", "numpy", "yaml", "pydantic"]),
        (
            "import lrd; lrd.LRDropout",
            ["accelerate", "triton", "numba", "torch._dynamo", "torchvision", "pydantic"],
        ),
        (
            "import lrd.train; from lrd import recipe; from lrd.data import datasets; "
            "datasets.load_dataset(recipe.Data(dataset='digits'), 0)",
            [
                "matplotlib",
                "sklearn",
                "scipy",
                "pandas",
                "torchvision.transforms.v2",
                "torch._inductor.compile_fx",
                "tensorboard.backend.event_processing.event_accumulator",
            ],
        ),
    ],
    ids=["lrd", "LRDropout", "train"],
)
def test_an_import_does_not_load_what_it_does_not_need(code: str, unwanted: list[str]) -> None:
    code = f"import sys; {code}; print([name for name in {unwanted} if name in sys.modules])"
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert ended.stdout.strip() == "[]"


def test_the_public_names_of_lrd() -> None:
    assert dir(lrd) == sorted(lrd.__all__)
    assert [lrd.LRDropout.__name__, lrd.Magma.__name__] == ["LRDropout", "Magma"]
    with pytest.raises(AttributeError, match="'lrd' has no attribute 'Dropout'"):
        lrd.Dropout  # noqa: B018

    code = "import lrd; print(lrd.optim.SGD.__name__, lrd.mask.draw.__name__)"
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert ended.stdout.strip() == "SGD draw"
