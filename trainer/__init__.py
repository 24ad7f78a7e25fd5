"""The trainer. It knows nothing of `launch` and `slurm`. Read its rooms in this order; arrows go upwards only:

run/            a training run from its first check to its last step
report/  checkpoint/  estimate/
engine/         two engines, `torch` and `deepspeed`, behind one protocol
passes.py       the ordered list of what makes a plain model a parallel one
axes/           mesh axes       linear/   kinds of linear layers       optim/   optimizers
model/          built, filled, divided into named pieces       data/   the samples of a step
make_plan.py, rules.py    config in, plan out       process/   one process of the job, and its disks
plan/           plain numbers: what will happen
"""

import sys
from pathlib import Path
from typing import Any

if sys.argv[:1] == ["-m"] and not sys.flags.safe_path and Path(sys.path[0]).resolve() != Path(__file__).parents[1]:
    # `python -m` searches the working directory first, where a folder `configs` or a file `launch.py` may lie.
    del sys.path[0]

# transformers imports torchao wherever it is installed, which takes a second. `linear.float8` lifts this.
_modules: dict[str, Any] = sys.modules
_modules.setdefault("torchao", None)
