"""The packages that are installed, against what the project's own metadata asks for. No package is imported."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement

from configs.entry_point import PROJECT
from configs.packages import installed
from launch.doctor.fact import Fact

DEVELOPMENT = "dev"  # the extra that only the tests need


def software() -> Iterator[Fact]:
    """Python, this project, each of its requirements, and each extra."""
    yield Fact("python", f"{platform.python_version()}  {sys.executable}")
    try:
        found = metadata.distribution(PROJECT)
    except metadata.PackageNotFoundError:
        yield Fact(
            "this project", "not installed; its requirements are unknown: pip install -e . in its folder", well=False
        )
        return
    yield Fact("this project", found.version)
    requirements = [Requirement(line) for line in found.requires or []]
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield required(requirement)
    for extra in found.metadata.get_all("Provides-Extra") or []:
        if extra != DEVELOPMENT:
            wanted = [each for each in requirements if each.marker and each.marker.evaluate({"extra": extra})]
            yield from _optional(extra, wanted)


def required(requirement: Requirement) -> Fact:
    version = installed(requirement.name)
    remedy = f"pip install '{requirement.name}{requirement.specifier}'"
    if version is None:
        return Fact(requirement.name, f"not installed; {remedy}", well=False)
    if not requirement.specifier.contains(version, prereleases=True):
        return Fact(requirement.name, f"{version} is outside of {requirement.specifier}; {remedy}", well=False)
    return Fact(requirement.name, version)


def _optional(extra: str, requirements: list[Requirement]) -> Iterator[Fact]:
    """A missing extra is not an error; an untested version of one is."""
    for requirement in requirements:
        fact = required(requirement)
        if installed(requirement.name) is None:
            fact = Fact(requirement.name, f"not installed (optional); pip install '{PROJECT}[{extra}]'")
        yield fact
