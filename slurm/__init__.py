"""Training as a SLURM job: the submission, and the programs inside the allocation.

    python -m launch cluster=slurm ...
        options    from the configuration to the arguments of sbatch, each checked against a pattern
        submit     `sbatch --test-only`, the files of RUN_DIR/slurm, sbatch
        job.sbatch the batch script: always the same text, with the run folder as its argument
            supervise  on the first node: starts the ranks, again after a fault, and requeues before the time limit
                agent      on every node: becomes torchrun, deepspeed or accelerate
    python -m launch status RUN_DIR, cancel RUN_DIR
        control    asks Slurm and the run folder

No text that a user typed is put into a script: options are passed as arguments, everything else as files.

    RUN_DIR/slurm/job.json       input of supervisor and agents; config.yaml next to it: the resolved configuration
    RUN_DIR/slurm/setup.sh       the lines of `cluster.slurm.setup`, then where Python searches for modules
    RUN_DIR/slurm/sbatch.txt     the command that submitted it
    RUN_DIR/slurm/jobs.txt       ids, one line for each submission
    RUN_DIR/slurm/status.json    state of the job; RUN_DIR/status.json has the state of the training
    RUN_DIR/logs/slurm-ID.out    all that the job prints
"""

import sys
from pathlib import Path

if sys.argv[:1] == ["-m"] and not sys.flags.safe_path and Path(sys.path[0]).resolve() != Path(__file__).parents[1]:
    # `python -m` searches the working directory first, which may hold a folder `configs` or a file `trainer.py`.
    del sys.path[0]
