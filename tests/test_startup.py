"""Garbage collection while a rank's modules are imported, and after."""

from __future__ import annotations

import ast
import gc
import importlib
from pathlib import Path
from types import ModuleType

import pytest

from lrd import startup, train
from lrd.replay.computing import ranks


@pytest.mark.parametrize("was_enabled", [True, False])
def test_garbage_is_collected_again_where_it_was(was_enabled: bool) -> None:
    assert gc.isenabled()  # lrd.train was imported before
    try:
        if not was_enabled:
            gc.disable()
        importlib.reload(startup)  # as at the first import
        assert not gc.isenabled()
        startup.imports_are_done()
        assert gc.isenabled() == was_enabled
    finally:
        gc.enable()
        importlib.reload(startup).imports_are_done()


def test_a_rank_exempts_what_it_has_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    statuses: list[int] = []
    monkeypatch.setattr(train, "exit_process", statuses.append)
    gc.unfreeze()
    assert gc.get_freeze_count() == 0
    train.run_rank(lambda: 3)
    assert gc.get_freeze_count() > 100_000
    assert statuses == [3]


@pytest.mark.parametrize("module", [train, ranks])
def test_programs_of_ranks_import_it_first(module: ModuleType) -> None:
    tree = ast.parse(Path(str(module.__file__)).read_text())
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    first = imports[1]  # after __future__
    assert isinstance(first, ast.ImportFrom)
    assert (first.module, first.names[0].name) == ("lrd", "startup")
