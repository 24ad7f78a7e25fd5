#!/usr/bin/env bash
# Everything a change must pass: format, lint, types, shell scripts, tests. At the end it says how its time was spent.
#
#   bash tests/run.sh                              all of it, for two cores half an hour at most
#   bash tests/run.sh --quick                      the inner loop: lint, units, a parity row per axis, under four minutes
#   bash tests/run.sh tests/test_config.py -x      further arguments go to pytest
#
# LANES: how many tests run at a time (4; 0: one after another, in this process).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
setup_environment dev
set_up=$SECONDS
export PATH=$PWD/.venv/bin:$PATH OMP_NUM_THREADS=1
# A second or two, and their complaints are the likeliest.
ruff format --check
ruff check
shellcheck launch/*.sh slurm/*.sbatch tests/*.sh tests/support/fast-g++ tests/slurm/*.sh .ci/run

# Types are checked while the tests run: some of these wait, and two cores have room for more.
report=$(mktemp)
trap 'rm -f "$report"' EXIT
{ time pyright; } >"$report" 2>&1 &
types=$!
failed=0
pytest -n "${LANES:-4}" --spent=.pytest_cache/spent.jsonl "$@" || failed=$?
wait "$types" || failed=1
printf 'types: '
cat "$report"
echo "set-up $set_up s, all $((SECONDS / 60)) min $((SECONDS % 60)) s; each test's seconds: .pytest_cache/spent.jsonl"
exit "$failed"
