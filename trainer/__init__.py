"""The trainer. It does not depend on `launch` and `slurm`. Read its packages in this order; imports go only down:

run/            a training run from its first check to its last step
report/  checkpoint/  estimate/
engine/         two engines, `torch` and `deepspeed`, behind one protocol
passes.py       the ordered list of steps that turn a plain model into a parallel one
axes/           mesh axes       linear/   kinds of linear layers       optim/   optimizers
model/          built, filled, divided into named pieces       data/   the samples of a step
make_plan.py, rules.py    config in, plan out       process/   one process of the job, and its disks
plan/           plain numbers: the run, decided before it starts
"""

import sys
from pathlib import Path
from typing import Any

if sys.argv[:1] == ["-m"] and not sys.flags.safe_path and Path(sys.path[0]).resolve() != Path(__file__).parents[1]:
    # `python -m` searches the working directory first, which may hold a folder `configs` or a file `launch.py`.
    del sys.path[0]

# transformers imports torchao if it is installed, which takes a second. `linear.float8` re-enables it.
_modules: dict[str, Any] = sys.modules
_modules.setdefault("torchao", None)
