#!/bin/sh
# Compile what `pvirq check` spends its time in, beside its source: tools/compiled.sh MYPYC DIRECTORY-OF-PVIRQ.
# Only what calls no model's functions: mypyc insists on their types, and a model's `when` may return what it likes.
set -e
unset PYTHONPATH MYPYPATH  # another pvirq there would be in the way
mypyc=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
cd "$2"
log=$(mktemp)
trap 'rm -rf "$log" build' EXIT
rm -f pvirq/check/*.so
for module in freeze reduction; do
    "$mypyc" "pvirq/check/$module.py" > "$log" 2>&1 || { cat "$log" >&2; exit 1; }
done
