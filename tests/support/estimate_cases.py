"""Runs `memory-estimate` as its users do, for tests."""

from __future__ import annotations

import json

import pytest

from launch.estimate import main


def answer_json(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, object]]:
    """Run it with JSON output. Returns its exit code and its JSON."""
    code = main([*words, "estimate.format=json"])
    return code, json.loads(capsys.readouterr().out)
