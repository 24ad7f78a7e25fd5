#!/usr/bin/env bash
# Installs the project into .venv if that has not been done, and trains the demo on every GPU of this machine, or on two
# CPU processes. Further words go to `python -m launch`: bash launch/demo.sh train.steps=50
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
setup_environment
exec .venv/bin/python -m launch experiment=demo "$@"
