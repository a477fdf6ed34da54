"""Garbage collection while a rank's modules are imported, and after."""

from __future__ import annotations

import gc
import importlib

import pytest

from lrd import startup


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


def test_what_was_imported_is_exempt() -> None:
    assert gc.get_freeze_count() > 100_000  # by tests/conftest.py, as a rank does it
