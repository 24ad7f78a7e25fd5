#!/usr/bin/env bash
# The ends of what pyproject.toml allows. Each set of versions gets a virtual environment of its own below build/, and
# the tests of the inner loop run there.
#
#   bash tests/versions.sh                         every set, one after another (each downloads some 2 GB)
#   bash tests/versions.sh lowest 3.13             some
#   bash tests/versions.sh newest -- tests -n 3    words behind -- go to pytest instead of --quick
#   bash tests/versions.sh --dry-run lowest        say what would be installed, and install nothing
#   bash tests/versions.sh --list
#
# lowest: each direct dependency at its lower bound, Python 3.11. newest: the newest of everything, Python 3.13.
# 3.12, 3.13: constraints.txt on that Python. Needs uv, which is installed below build/ where it is not on the PATH.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SETS=(lowest newest 3.12 3.13)
dry=()
sets=()
words=(--quick -n 2)
while [ $# -gt 0 ]; do
    case $1 in
    --list) printf '%s\n' "${SETS[@]}" && exit ;;
    --help | -h) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" && exit ;;
    --dry-run) dry=(--dry-run) ;;
    --) shift && words=("$@") && break ;;
    *)
        case " ${SETS[*]} " in
        *" $1 "*) sets+=("$1") ;;
        *) echo "versions.sh: $1: no such set; use ${SETS[*]}" >&2 && exit 2 ;;
        esac
        ;;
    esac
    shift
done
[ ${#sets[@]} -gt 0 ] || sets=("${SETS[@]}")

if ! command -v uv >/dev/null; then
    [ -e build/uv/bin/uv ] || { python3 -m venv build/uv && build/uv/bin/pip install --quiet uv; }
    export PATH=$PWD/build/uv/bin:$PATH
fi
# No CUDA libraries (3 GB) where no GPU is, if that index answers.
source launch/setup.sh
[ -z "$(cpu_index python3)" ] || export UV_TORCH_BACKEND=cpu

python_of() { # SET
    case $1 in lowest) echo 3.11 ;; newest) echo 3.13 ;; *) echo "$1" ;; esac
}
choice_of() { # SET
    case $1 in
    lowest) echo --resolution=lowest-direct ;;
    newest) echo --upgrade ;;
    *) echo --constraint=constraints.txt ;;
    esac
}

failed=()
for set in "${sets[@]}"; do
    environment=build/versions/$set
    echo "== $set: Python $(python_of "$set"), $(choice_of "$set")"
    if ! uv venv --quiet --allow-existing --python "$(python_of "$set")" "$environment" ||
        ! VIRTUAL_ENV=$environment uv pip install "${dry[@]}" "$(choice_of "$set")" --editable '.[dev]'; then
        failed+=("$set: not installed")
        continue
    fi
    [ ${#dry[@]} -eq 0 ] || continue
    (PATH=$PWD/$environment/bin:$PATH OMP_NUM_THREADS=1 python -m pytest "${words[@]}") || failed+=("$set: tests failed")
done
[ ${#failed[@]} -eq 0 ] || { printf '%s\n' "${failed[@]}" && exit 1; }
