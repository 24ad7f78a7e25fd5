# shellcheck shell=bash
# Makes .venv in the checkout and installs the project there, with the exact versions of constraints.txt. Sourced by
# launch/demo.sh and tests/run.sh. Done once: a stamp in .venv says what was installed, keyed by what decides it.

# setup_environment [EXTRA]: EXTRA is an optional group of pyproject.toml, "dev" for the tools of the tests.
setup_environment() {
    local extra=${1:-} root key stamp
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    key=$(cat "$root/pyproject.toml" "$root/constraints.txt" | sha256sum | cut -c1-16)
    stamp=$root/.venv/.installed-$key
    # What was installed with the extra serves without it too.
    if [ -e "$stamp-$extra" ] || { [ -z "$extra" ] && [ -e "$stamp-dev" ]; }; then
        return
    fi
    if ! "$root/.venv/bin/python" -m pip --version >/dev/null 2>&1; then
        local python
        python=$(find_python)
        echo "making $root/.venv with $("$python" --version)"
        "$python" -m venv --clear "$root/.venv"
    fi
    echo "installing the project into .venv (the first time: some minutes)"
    local indexes=()
    mapfile -t indexes < <(cpu_index "$root/.venv/bin/python")
    "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check "${indexes[@]}" \
        --constraint "$root/constraints.txt" --editable "$root${extra:+[$extra]}"
    rm -f "$root"/.venv/.installed-*
    touch "$stamp-$extra"
}

# The first Python that is new enough and can make virtual environments.
find_python() {
    local candidate reason="none was found on PATH"
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python; do
        "$candidate" -c '' >/dev/null 2>&1 || continue
        if ! "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            reason="$candidate is $("$candidate" --version)"
        elif ! "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then
            reason="$candidate cannot make virtual environments (Debian, Ubuntu: apt install python3-venv)"
        else
            echo "$candidate"
            return
        fi
    done
    echo "Python 3.11 or newer is needed: $reason; install one, or name it: PYTHON=/path/to/python3.11" >&2
    return 1
}

# pip arguments that find torch without CUDA (0.2 GB instead of 3 GB), for a machine that has no NVIDIA GPU.
cpu_index() {
    local url=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}
    if [ -d /proc/driver/nvidia/gpus ] || [ "$(uname -sm)" != "Linux x86_64" ]; then
        return
    fi
    # An index that does not answer would cost pip minutes of retries.
    if "$1" -c "import urllib.request as r; r.urlopen('$url/torch/', timeout=5)" >/dev/null 2>&1; then
        printf '%s\n' --extra-index-url "$url"
    fi
}
