#!/bin/bash
# Writes the locked requirements anew from pyproject.toml: `make lock`, or `make lock ARGS=--upgrade` to move
# what is pinned to the newest versions. Without --upgrade, pins that still fit stay as they are.
set -euo pipefail
cd "$(dirname "$0")"

UV_VERSION=0.13.9 # pinned, so that two people who lock get the same files

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --disable-pip-version-check "uv==$UV_VERSION"
cp runtime.txt dev.txt vm.txt fuzz.txt "$work/" 2>/dev/null || true
cp ../../pyproject.toml "$work/"
touch "$work/README.md" "$work/LICENSE" # pyproject.toml names them
options=("$@")

lock() { # lock FILE [OPTION...]: hashes for every architecture and Python version, and no index address
    (cd "$work" && venv/bin/uv pip compile pyproject.toml --quiet --universal --generate-hashes --no-header \
        --no-emit-index-url --no-emit-find-links --output-file "$@" "${options[@]}" >/dev/null)
    if grep -n '://' "$work/$1"; then
        echo "lock: $1 would name an address, see the lines above; nothing was written" >&2
        exit 1
    fi
}

lock runtime.txt
lock dev.txt --group dev --constraints runtime.txt
lock vm.txt --extra vm --constraints dev.txt
lock fuzz.txt --group fuzz --constraints dev.txt
for file in runtime.txt dev.txt vm.txt fuzz.txt; do
    { echo "# Written by make lock from pyproject.toml; not to be edited."; cat "$work/$file"; } >"$file"
done
