#!/bin/sh
# The main job on real streams: captures that Xen 4.17's own tools wrote, then a live migration of the model.
# usage: demo.sh DIRECTORY   (what it shows is kept there)
set -eu
out=$1
data=$(dirname "$0")/../tests/data
mkdir -p "$out"

show() { # show FILE COMMAND...: run a command, keep what it prints in FILE
    file=$out/$1
    shift
    printf '\n$ %s\n' "$*"
    "$@" | tee "$file"
}

echo "A guest saved by xl, as it is (zstd-compressed here, which is no matter):"
show save.txt migstream inspect "$data/tinypv-save-p.xl.zst"
show save-verify.txt migstream verify "$data/tinypv-save-p.xl.zst"

echo
echo "What 'xl migrate' sent, live, in six passes; its records one by one:"
show migrate.txt migstream inspect --records "$data/tinypv-migrate-live.xl.zst"
show migrate-verify.txt migstream verify --verbose "$data/tinypv-migrate-live.xl.zst"
migstream inspect --json "$data/tinypv-migrate-live.xl.zst" >"$out/migrate.json"

echo
echo "The same file, cut off in the middle: everything up to the damage, then the error."
head -c 12000 "$data/tinypv-migrate-live.xl.zst" >"$out/cut.xl.zst"
show cut.txt sh -c "migstream inspect --records '$out/cut.xl.zst' 2>&1 || true"
migstream inspect --config "$data/tinypv-save-p.xl.zst" >"$out/config.json"

echo
echo "A busy machine (a model, in memory), migrated live through a pipe:"
show live.txt migstream demo

printf '\nKept in %s: ' "$out"
ls "$out" | tr '\n' ' '
echo
