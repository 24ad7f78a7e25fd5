"""The trainer. Read in order: plan, model, parallelize, data, optimizer, engine, loop. Knows nothing of `launch`."""

import sys
from pathlib import Path

if sys.argv[:1] == ["-m"] and not sys.flags.safe_path and Path(sys.path[0]).resolve() != Path(__file__).parents[1]:
    # `python -m` searches the working directory first, where a folder `configs` or a file `launch.py` may lie.
    del sys.path[0]
