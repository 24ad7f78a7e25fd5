"""The import of transformers skips libraries that no language model uses. Those libraries are available afterwards."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
from transformers.utils import import_utils

from trainer.model import importing

MODELS = Path(str(transformers.__file__)).parent / "models"


def test_the_folder_of_models_is_read_once_and_says_the_same() -> None:
    asked: list[object] = []
    scan = importing._once(lambda path: asked.append(path))
    scan(str(MODELS / "__init__.py"))
    scan(str(MODELS / "llama" / "__init__.py"))
    assert asked == [MODELS, str(MODELS / "llama" / "__init__.py")]
    read = getattr(import_utils, importing.SCAN)
    assert read(MODELS / "llama") == read(str(MODELS / "llama" / "__init__.py")) != {}


def test_a_hidden_library_is_there_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with importing._hidden("colorsys"):
        assert find_spec("colorsys") is None
    assert find_spec("colorsys") is not None and "colorsys" not in sys.modules


def test_a_library_that_is_imported_already_is_not_hidden() -> None:
    with importing._hidden("json"):
        assert find_spec("json") is not None
    assert "json" in sys.modules


def test_only_an_entry_point_has_the_process_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers remembers of scipy would reach a notebook's other models."""
    commands = Path(sys.executable).parent
    for main, own in (
        (SimpleNamespace(__spec__=SimpleNamespace(name="trainer.__main__")), True),
        (SimpleNamespace(__spec__=None, __file__=str(commands / "memory-estimate")), True),
        (SimpleNamespace(__spec__=SimpleNamespace(name="mine.train")), False),
        (SimpleNamespace(__spec__=None, __file__="/home/user/trainer.py"), False),
        (SimpleNamespace(__spec__=None), False),  # an interactive interpreter
    ):
        monkeypatch.setitem(sys.modules, "__main__", main)
        assert importing._own_process() is own
