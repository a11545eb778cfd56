# Makes and fills .venv; sourced by up, test and lint. Knows nothing of what runs in it.
#
# `ready runtime` or `ready dev` returns at once while the lock files, both pyproject.toml and the Python of
# .venv are those of the last installation. After other lock files, or an installation that was interrupted,
# .venv is made again. PYTHON=/path/to/python3 chooses the interpreter of a .venv that is made.
# shellcheck shell=bash

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P) # by its own name: .venv holds absolute paths
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

find_python() { # prints the Python of .venv, the newest tested one, else any that is new enough
    local name base
    base=$("$venv/bin/python" -c 'import sys; print(sys._base_executable)' 2>/dev/null) || true
    for name in ${PYTHON:+"$PYTHON"} ${base:+"$base"} python3.13 python3.12 python3.11 python3 python; do
        if suits "$name"; then
            command -v "$name"
            return
        fi
        [[ $name != "${PYTHON:-}" ]] || die "PYTHON=$PYTHON is not Python 3.11 or later"
    done
    die "no Python 3.11 or later on the PATH" "Debian 12 and later, Ubuntu 24.04: apt install python3 python3-venv"
}

pythons() { # prints version and path of each Python on the PATH and in /usr/bin that can make a .venv, oldest first
    local folder file
    local is='import ensurepip, sys, venv
if sys.version_info >= (3, 11): print("%d.%d.%d" % sys.version_info[:3], sys.executable)'
    while IFS= read -r -d : folder; do
        for file in "$folder"/python3 "$folder"/python3.*; do
            [[ ${file##*/} =~ ^python3(\.[0-9]+)?$ && -x $file ]] || continue
            "$file" -c "$is" 2>/dev/null </dev/null || true
        done
    done <<<"$PATH:/usr/bin:" | sort -Vu
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

locked() { # prints what .venv should hold: a checksum of the lock files, of its Python and of where it is
    {
        cat -- "$root"/requirements/*.lock
        "$venv/bin/python" -VV
        echo "$root"
    } | cksum
}

declared() { cat -- "$root/pyproject.toml" "$root/client/pyproject.toml" | cksum; } # the service, its client

stamped() { [[ -f $venv/.kms-$1 && $(<"$venv/.kms-$1") == "$2" ]]; } # whether that was installed: a name, a checksum

install() { # what pip says goes to a log; progress shows what it does
    local log=$venv/install.log
    if ! "$venv/bin/python" -m pip install --disable-pip-version-check --no-input "$@" 2>&1 |
        tee -a "$log" | progress; then
        tail -n 15 -- "$log" >&2
        die "pip could not install; its whole output is in $log" \
            "check the network and pip's settings ('$venv/bin/python' -m pip config list), then run this again"
    fi
}

# The lock files are complete, so pip resolves nothing. pip 23.0 to 23.2 would look at newer releases of what is
# locked and refuse what their extras need, since that has no hash.
install_locked() { install --no-deps --require-hashes "$@"; }

install_project() {
    local file
    install --no-deps --no-build-isolation --editable "$root/client" --editable "$root"
    for file in "$venv"/lib/python3*/site-packages/_*kms_service*.pth; do # where src is. Python 3.11 and 3.12 read it as
        [[ ! -f $file ]] || echo ../../../../src >"$file"                 # ASCII under LC_ALL=C, and $root may not be that
    done
}

every_s=10
progress() { # of what pip says: a line that changes on a terminal, else a line every ten seconds
    local word name doing='' count=0 shown=$SECONDS ended
    while true; do
        ended=0
        read -r -t "$every_s" word name _ || ended=$?
        ((ended == 0 || ended > 128)) || break # above 128: pip said nothing for that long
        if ((ended == 0)); then
            case $word in
                Collecting) count=$((count + 1)) doing="$count ${name%%[=<>;]*}" ;;
                Installing) doing="unpacking $count packages" ;;
                *) continue ;;
            esac
            if [[ -t 2 ]]; then printf '\r\033[Kkms: %s' "$doing" >&2; fi
        fi
        if [[ ! -t 2 && -n $doing ]] && ((SECONDS - shown >= every_s)); then
            say "$doing"
            shown=$SECONDS
        fi
    done
    if [[ -t 2 ]]; then printf '\r\033[K' >&2; fi
}

check_complete() { # dies, naming what is missing, unless each installed package has what it needs
    local said
    said=$("$venv/bin/python" -m pip check --disable-pip-version-check 2>&1) && return
    printf '%s\n' "$said" >&2
    die "$1 lacks what the lines above name (on $("$venv/bin/python" -V))" \
        "after a change of pyproject.toml run scripts/lock; else try another Python: rm -r .venv, PYTHON=python3.13"
}

ready() { # runtime | dev
    is_ready "$1" || { # one at a time: a second one waits for the first, and finds its work done
        if command -v flock >/dev/null; then flock 9; fi
        is_ready "$1" || (cd -- "$root" && make_ready "$1") # python -m imports from the working directory first
    } 9<"$root/scripts/venv.sh"
}

is_ready() {
    local now
    suits "$venv/bin/python" || return
    now=$(locked)
    { stamped dev "$now" || stamped "$1" "$now"; } && # dev contains runtime
        stamped project "$(declared)"
}

make_ready() {
    local set=$1 lock=$root/requirements/runtime.lock size='' now
    [[ $set == runtime ]] || lock=$root/requirements/dev.lock
    now=$(locked 2>/dev/null) || true
    if ! suits "$venv/bin/python" || { ! stamped runtime "$now" && ! stamped dev "$now"; }; then
        # none, half made, of other lock files, or one that does not start
        make_venv
        now=$(locked)
    fi
    if ! stamped dev "$now" && ! stamped "$set" "$now"; then
        [[ $set == runtime ]] || size=' (1.4 GB with the tools of the tests)'
        say "installing into .venv$size; this is done once and takes a minute or two"
        rm -f -- "$venv"/.kms-* "$venv/install.log"
        install_locked -r "$lock" -r "$root/requirements/build.lock"
        printf '%s\n' "$now" >"$venv/.kms-$set"
    fi
    rm -f -- "$venv/.kms-project"
    install_project
    check_complete "$lock"
    declared >"$venv/.kms-project"
}
