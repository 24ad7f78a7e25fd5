#!/usr/bin/env bash
# Installs the project into .venv if that has not been done, and trains the demo on every GPU of this machine, or on two
# CPU processes. Further arguments go to `python -m launch`: bash launch/demo.sh train.steps=50
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
setup_environment
run=runs/demo/$(date +%Y%m%d-%H%M%S)
for word in "$@"; do
  case $word in train.run_dir=*) run=${word#*=} ;; esac
done
python=.venv/bin/python
$python -m launch experiment=demo "train.run_dir=$run" "$@"
[ -d "$run/model" ] || exit 0 # a dry run

prompt='def '
echo "
What the model writes after \"$prompt\", before and after training:"
for weights in --initial ''; do
  echo "--------"
  # shellcheck disable=SC2086  # no word where it is empty
  $python -m launch.generate "$run" "$prompt" --tokens 160 $weights
done
echo "--------
Next, after \`source .venv/bin/activate\`:
  cookbook generate $run 'class '                                             another beginning
  python -m launch experiment=demo train.steps=2000                           a better model
  python -m launch data=files 'data.paths=[README.md,docs/]' train.steps=100  your own text"
