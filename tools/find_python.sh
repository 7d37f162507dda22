#!/bin/sh
# Print the Python interpreter that the environment is to be made with.
#
# usage: find_python.sh [INTERPRETER]
#
# With an argument only that interpreter is considered; without one, python3 and then the
# versioned names. The interpreter must be CPython 3.11 to 3.14.

supported='import sys
ok = (3, 11) <= sys.version_info[:2] <= (3, 14) and sys.implementation.name == "cpython"
sys.exit(0 if ok else 1)'

for candidate in ${1:-python3 python3.14 python3.13 python3.12 python3.11}; do
    if "$candidate" -c "$supported" >/dev/null 2>&1; then
        command -v "$candidate"
        exit 0
    fi
done

found=''
if command -v "${1:-python3}" >/dev/null; then
    found=$("${1:-python3}" --version 2>&1 | head -n 1)
fi
{
    echo "pnode needs CPython 3.11 to 3.14."
    echo "  ${1:-python3}: ${found:-not found}"
    echo "Install one (Debian 12: apt-get install python3 python3-venv) or name one:"
    echo "  make setup PYTHON=/path/to/python3.11"
} >&2
exit 1
