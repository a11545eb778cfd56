# Makes and fills .venv; sourced by up, test and lint. Knows nothing of what runs in it.
#
# `ready runtime` or `ready dev` returns at once while the lock files, pyproject.toml and the Python of
# .venv are those of the last installation. PYTHON=/path/to/python3 chooses the interpreter of a new .venv.
# shellcheck shell=bash

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
unset PYTHONDONTWRITEBYTECODE # each process would compile all of the project at its start, which costs more than the rest

say() { printf 'kms: %s\n' "$*" >&2; }

die() {
    say "error: $1"
    shift
    (($# == 0)) || say "hint: $*"
    exit 69
}

suits() { "$@" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() { # prints the newest tested Python, else any that is new enough
    local name
    for name in ${PYTHON:+"$PYTHON"} python3.13 python3.12 python3.11 python3 python; do
        if suits "$name"; then
            command -v "$name"
            return
        fi
        [[ $name != "${PYTHON:-}" ]] || die "PYTHON=$PYTHON is not Python 3.11 or later"
    done
    die "no Python 3.11 or later on the PATH" "Debian 12 and later, Ubuntu 24.04: apt install python3 python3-venv"
}

make_venv() {
    local python version
    python=$(find_python)
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        die "$python cannot make a virtual environment: its modules venv and ensurepip are missing" \
            "Debian and Ubuntu: apt install python3-venv (or python$version-venv)"
    say "making .venv with Python $version"
    "$python" -m venv --clear "$venv"
}

fingerprint() {
    {
        cat -- "$root"/requirements*.lock "$root/pyproject.toml"
        "$venv/bin/python" -VV
        echo "$root"
    } | cksum
}

install() { # pip's words go to a log; the person sees what is being fetched
    local log=$venv/install.log
    if ! "$venv/bin/python" -m pip install --disable-pip-version-check --no-input "$@" 2>&1 |
        tee -a "$log" | progress; then
        tail -n 15 -- "$log" >&2
        die "pip could not install; its whole output is in $log" \
            "check the network and pip's settings ('$venv/bin/python -m pip config list'), then run this again"
    fi
}

progress() {
    local word name count=0
    while read -r word name _; do
        [[ $word == Collecting && -t 2 ]] || continue
        count=$((count + 1))
        printf '\r\033[Kkms: %d %s' "$count" "${name%%[=<>;]*}" >&2
    done
    if [[ -t 2 ]]; then printf '\r\033[K' >&2; fi
}

ready() { # runtime | dev
    local set=$1 now stamp
    suits "$venv/bin/python" || make_venv
    now=$(fingerprint)
    for stamp in "$venv/.kms-dev" "$venv/.kms-$set"; do # dev contains runtime
        if [[ -f $stamp && $(<"$stamp") == "$now" ]]; then return; fi
    done

    local lock=$root/requirements.lock
    [[ $set == runtime ]] || lock=$root/requirements-dev.lock
    say "installing into .venv; this is done once and takes up to a minute"
    rm -f -- "$venv"/.kms-* "$venv/install.log"
    # The lock files are complete, so pip resolves nothing: pip 23 would look at newer versions of what is locked
    # and refuse their unlocked extras. `pip check` then says whether anything is missing.
    install --no-deps --require-hashes -r "$lock" -r "$root/requirements-build.lock"
    install --no-deps --no-build-isolation --editable "$root"
    "$venv/bin/python" -m pip check --disable-pip-version-check >&2 ||
        die "what is locked in $lock is incomplete" "run scripts/lock, and commit what it changes"
    printf '%s\n' "$now" >"$venv/.kms-$set"
}
