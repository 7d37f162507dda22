#!/bin/sh
# Make sure that what Python packages cannot bring is on this machine.
#
# usage: system_packages.sh (venv | runtime | build | browser) PYTHON
#
#   venv     the parts of Python that make virtual environments
#   runtime  the OpenBLAS library that PETSc is linked to
#   build    C compiler, make, Python's headers and OpenBLAS to link against
#   browser  Chromium, or what CHROMIUM names, for tools/check_site.py
#
# What is missing is installed where this is root on a machine with apt-get. Anywhere else the
# script stops and prints the command to run.

set -eu

mode=$1
python=$2
debian=''
fedora=''

need() { # need DEBIAN_PACKAGE FEDORA_PACKAGE
    debian="$debian $1"
    fedora="$fedora $2"
}

have_ensurepip() { "$python" -c 'import ensurepip, venv' 2>/dev/null; }
have_openblas() { "$python" -c 'import ctypes; ctypes.CDLL("libopenblas.so.0")' 2>/dev/null; }
have_compiler() { printf '#include <stdio.h>\nint main(void){return 0;}\n' | cc -x c -o /dev/null - 2>/dev/null; }
links_openblas() { printf 'int main(void){return 0;}\n' | cc -x c -o /dev/null - -lopenblas 2>/dev/null; }
have_headers() {
    "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))'
}
have_browser() { "$python" -c 'import sys; sys.path.insert(0, sys.argv[1])
import check_site; sys.exit(check_site.browser() is None)' "$(dirname "$0")"; }

check() {
    debian=''
    fedora=''
    case $mode in
    venv)
        have_ensurepip || need python3-venv python3-pip
        ;;
    runtime)
        have_openblas || need libopenblas0 openblas
        ;;
    build)
        if ! have_compiler; then
            need gcc gcc
            need libc6-dev glibc-devel
            need libopenblas-dev openblas-devel
        elif [ -z "${PETSC_CONFIGURE_OPTIONS:-}" ] && ! links_openblas; then
            need libopenblas-dev openblas-devel
        fi
        command -v make >/dev/null || need make make
        have_headers || need python3-dev python3-devel
        ;;
    browser)
        have_browser || need chromium chromium
        ;;
    *)
        echo "system_packages.sh: unknown mode $mode" >&2
        exit 2
        ;;
    esac
    [ -z "$debian" ]
}

check && exit 0

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "Installing system packages:$debian"
    log=$(mktemp)
    # shellcheck disable=SC2086  # the list is meant to be split
    if ! { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y \
        --no-install-recommends $debian; } >"$log" 2>&1; then
        tail -n 20 "$log" >&2
        echo "apt-get could not install:$debian (whole output: $log)" >&2
        exit 1
    fi
    rm -f "$log"
    check && exit 0
    echo "Installed, but still not usable from $python:$debian" >&2
    exit 1
fi

{
    echo "System packages are missing. Run this, then run make again:"
    if command -v apt-get >/dev/null; then
        echo "  sudo apt-get update && sudo apt-get install -y$debian"
    elif command -v dnf >/dev/null; then
        echo "  sudo dnf install -y$fedora"
    else
        echo "  (your system's package manager) install what Debian calls:$debian"
    fi
} >&2
exit 1
