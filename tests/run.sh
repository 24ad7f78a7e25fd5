#!/usr/bin/env bash
# Everything a change must pass: format, lint, types, shell scripts, tests. Further words go to pytest:
# bash tests/run.sh tests/test_config.py -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
setup_environment dev
export PATH=$PWD/.venv/bin:$PATH OMP_NUM_THREADS=1
ruff format --check
ruff check
pyright
shellcheck launch/*.sh slurm/*.sbatch tests/*.sh tests/slurm/*.sh .ci/run
exec pytest "$@"
