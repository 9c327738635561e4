#!/usr/bin/env bash
# Prints what a million assertions of 150 bytes cost each node of a throw-away cluster: resident memory, bytes of log and
# tree, fsyncs for each write.
#
#   scripts/measure-footprint.sh [ASSERTIONS]
#
# Each assertion has a path of 30 bytes, a predicate of 8 and a value of 112. First one request for each of a tenth of
# them (64 clients), which fills the table of short-lived keys; then the rest by import. Needs a release build.
set -euo pipefail

count=${1:-1000000}
stemedb=${STEMEDB:-${CARGO_TARGET_DIR:-target}/release/stemedb}
work=$(mktemp -d "${TMPDIR:-/var/tmp}/stemedb-footprint.XXXXXX")
dev=
cleanup() {
    [ -z "$dev" ] || kill "$dev" 2>/dev/null || true
    wait 2>/dev/null || true
    rm -rf "$work"
}
trap cleanup EXIT

"$stemedb" dev --data "$work/data" --port 18480 --json >"$work/dev.json" 2>"$work/dev.log" &
dev=$!
for _ in $(seq 300); do
    [ -s "$work/dev.json" ] && break
    sleep 0.1
done
[ -s "$work/dev.json" ] || { cat "$work/dev.log" >&2; exit 1; }
export STEMEDB_ENDPOINTS=127.0.0.1:18480,127.0.0.1:18481,127.0.0.1:18482

metric() { curl -s "http://127.0.0.1:$1/metrics" | awk -v name="$2" '$1 == name { print $2 }'; }
for port in 18480 18481 18482; do metric $port stemedb_wal_fsync_total; done >"$work/fsyncs-before"
singles=$("$stemedb" bench --op write --clients 64 --secs 20 --warmup 0 --value 112 --json |
    sed -n 's/.*"requests": *\([0-9]*\).*/\1/p' | head -n 1)
for port in 18480 18481 18482; do metric $port stemedb_wal_fsync_total; done >"$work/fsyncs-after"
awk -v n="$count" 'BEGIN {
    for (i = 0; i < n; i++)
        printf "{\"concept_path\":\"footprint/group-%04d/item-%08d\",\"predicate\":\"property\",\"value\":\"%0110d\"}\n", i % 1000, i, i
}' >"$work/assertions.ndjson"
"$stemedb" import "$work/assertions.ndjson" >"$work/import.log" 2>&1 || { cat "$work/import.log" >&2; exit 1; }
tail -n 1 "$work/import.log"
echo "writes by single requests before that: ${singles:-unknown}"
printf '%-8s %14s %14s %10s %10s %22s\n' node resident/MB peak/MB log/MB tree/MB fsyncs/single-writes
for i in 1 2 3; do
    pid=$(cat "$work/data/node-$i/pid")
    rss=$(awk '/^VmRSS/ { printf "%.0f", $2 / 1024 }' "/proc/$pid/status")
    peak=$(awk '/^VmHWM/ { printf "%.0f", $2 / 1024 }' "/proc/$pid/status")
    log=$(du -sm "$work/data/node-$i/wal" | cut -f1)
    tree=$(du -sm "$work/data/node-$i/kv" | cut -f1)
    fsyncs=$(($(sed -n "${i}p" "$work/fsyncs-after") - $(sed -n "${i}p" "$work/fsyncs-before")))
    printf '%-8s %14s %14s %10s %10s %22s\n' "node-$i" "$rss" "$peak" "$log" "$tree" "$fsyncs/${singles:-?}"
done
