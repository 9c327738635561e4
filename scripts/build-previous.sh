#!/usr/bin/env bash
# Builds the program that nodes are upgraded from, and prints the path of its executable.
#
#   scripts/build-previous.sh [COMMIT]
#
# By default the commit of tests/balancers/previous.txt: the newest one that is in use anywhere. Needs the project's
# history (a clone that is not shallow). Everything is made below target/previous; a build that is there is taken.
set -euo pipefail
cd "$(dirname "$0")/.."

commit=${1:-$(grep -v '^#' tests/balancers/previous.txt | head -n 1)}
commit=$(git rev-parse --verify --quiet "$commit^{commit}") || {
    echo "build-previous.sh: there is no commit ${1:-of tests/balancers/previous.txt} here; fetch the whole history" >&2
    exit 2
}
folder=$PWD/target/previous/$commit
program=$folder/build/debug/stemedb
if [ ! -x "$program" ]; then
    rm -rf "$folder/source"
    mkdir -p "$folder/source"
    git archive "$commit" | tar -x -C "$folder/source"
    (cd "$folder/source" && CARGO_TARGET_DIR=$folder/build cargo build --locked --bin stemedb >&2)
fi
echo "$program"
