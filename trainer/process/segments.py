"""Setup of torch's CUDA allocator, through an environment variable that it reads once. Torch-free."""

from __future__ import annotations

import re
from collections.abc import MutableMapping

from configs.errors import EnvironmentProblem

NAME, OLD_NAME = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
OPTION = "expandable_segments"


def set_segments(wanted: bool, environment: MutableMapping[str, str]) -> None:
    """Add `cluster.expandable_segments` to the user's setting. Call it before torch is loaded.

    Raises EnvironmentProblem if the user has set the opposite.
    """
    name = next((name for name in (NAME, OLD_NAME) if environment.get(name, "").strip()), NAME)
    given = environment.get(name, "").strip().strip(",")
    found = re.search(rf"{OPTION}\s*:\s*(\w+)", given)
    if found is None:
        if wanted:
            environment[name] = f"{given},{OPTION}:True" if given else f"{OPTION}:True"
    elif (found[1] == "True") is not wanted:
        raise EnvironmentProblem(
            f"{name}={given}: contradicts cluster.{OPTION}={str(wanted).lower()}; remove {OPTION} from it, or set"
            f" cluster.{OPTION}={str(not wanted).lower()}"
        )
