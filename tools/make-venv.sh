#!/bin/sh
# Makes a virtual environment and says in one sentence what is missing when that cannot be done.
#   usage: PYTHON=python3 make-venv.sh DIRECTORY
set -eu
directory=$1
wanted='import sys; sys.exit(sys.version_info < (3, 11))'

python=
for candidate in "${PYTHON:-python3}" python3 python3.14 python3.13 python3.12 python3.11; do
    if command -v "$candidate" >/dev/null 2>&1 && "$candidate" -c "$wanted" 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "csvfast needs Python 3.11 or newer; none found. On Debian: apt-get install python3 python3-venv python3-dev" >&2
    exit 1
fi
command -v gcc >/dev/null 2>&1 || command -v cc >/dev/null 2>&1 || command -v clang >/dev/null 2>&1 || {
    echo "csvfast needs a C compiler; none found. On Debian: apt-get install gcc" >&2
    exit 1
}
header=$("$python" -c 'import os, sysconfig; print(os.path.join(sysconfig.get_path("include"), "Python.h"))')
if [ ! -f "$header" ]; then
    echo "Python's C headers are missing ($header). On Debian: apt-get install python3-dev" >&2
    exit 1
fi

if "$python" -m venv "$directory" >/dev/null 2>&1; then
    :
elif "$python" -m pip --version >/dev/null 2>&1 && "$python" -m venv --without-pip "$directory" &&
    "$python" -m pip --python "$directory/bin/python" install --quiet pip; then
    : # Debian ships venv without ensurepip, but the system's pip can fill the environment
else
    rm -rf "$directory"
    echo "$python cannot make a virtual environment with pip. On Debian: apt-get install python3-venv" >&2
    exit 1
fi
