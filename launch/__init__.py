"""The main entry point: `python -m launch` starts the ranks of a run on this machine.

`command` builds the command of each launcher, `process` runs it, `__main__` is the entry point.
"""

import sys
from pathlib import Path

if sys.argv[:1] == ["-m"] and not sys.flags.safe_path and Path(sys.path[0]).resolve() != Path(__file__).parents[1]:
    # `python -m` searches the working directory first, which may hold a folder `configs` or a file `trainer.py`.
    del sys.path[0]
