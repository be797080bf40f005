"""Modules by their old names."""

import importlib
import sys

import pytest

from spar_d2.deprecated import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_old_names_give_the_moved_module_and_a_warning(old):
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} is now {MOVED[old]}"):
        module = importlib.import_module(old)
    moved = importlib.import_module(MOVED[old])
    public = [name for name in vars(moved) if not name.startswith("_")]
    assert public and all(getattr(module, name) is getattr(moved, name) for name in public)
    sys.modules.pop(old, None)
