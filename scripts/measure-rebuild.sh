#!/usr/bin/env bash
# Prints how fast a node is made anew from a replica, and what clients feel of it, in a throw-away cluster of three.
#
#   scripts/measure-rebuild.sh [MIB]
#
# First the cluster is filled until a tree has so many MiB (default 1024). Then a follower is rebuilt while nothing else
# goes on; then the most that 64 clients get done is measured, and half of that is offered as an open load: alone, with a
# follower that is stopped (every write then needs both of the others), and while a follower is rebuilt. MB are 10^6
# bytes, over the whole job: until the node votes again.
# Needs a release build, curl and jq.
set -euo pipefail

mib=${1:-1024}
stemedb=${STEMEDB:-${CARGO_TARGET_DIR:-target}/release/stemedb}
window_s=2
work=$(mktemp -d "${TMPDIR:-/var/tmp}/stemedb-rebuild.XXXXXX")
dev=
cleanup() {
    [ -z "$dev" ] || kill "$dev" 2>/dev/null || true
    wait 2>/dev/null || true
    rm -rf "$work"
}
trap cleanup EXIT

"$stemedb" dev --data "$work/data" --port 18580 --json >"$work/dev.json" 2>"$work/dev.log" &
dev=$!
for _ in $(seq 300); do
    [ -s "$work/dev.json" ] && break
    sleep 0.1
done
[ -s "$work/dev.json" ] || { cat "$work/dev.log" >&2; exit 1; }
export STEMEDB_ENDPOINTS=127.0.0.1:18580,127.0.0.1:18581,127.0.0.1:18582

tree_mib() { du -sm "$work/data/node-$1/kv" | cut -f1; }
while [ "$(tree_mib 1)" -lt "$mib" ]; do
    "$stemedb" bench --op write --clients 16 --batch 16 --value 16384 --secs 5 --warmup 0 >/dev/null
    printf '\rtree: %s of %s MiB' "$(tree_mib 1)" "$mib" >&2
done
echo >&2

# Compactions of what was just written are none of an idle cluster.
metric() { curl -s "http://127.0.0.1:$1/metrics" | awk -v name="$2" '$1 == name { print $2 }'; }
for port in 18580 18581 18582; do
    for _ in $(seq 120); do
        [ "$(metric $port stemedb_lsm_pending_compaction_bytes)" = 0 ] && break
        sleep 0.5
    done
done

followers=$(curl -s http://127.0.0.1:18580/v1/admin/cluster | jq -r '.leader as $l | .members[].name | select(. != $l)')
first=$(sed -n 1p <<<"$followers")
second=$(sed -n 2p <<<"$followers")

rebuild() { "$stemedb" rebuild "$1" --json >"$work/job-$1.json" 2>"$work/job-$1.log" || { cat "$work/job-$1.log" >&2; return 1; }; }
speed() { jq -r '"\(.bytes_total / 1e6 | floor) MB in \(.ms / 1000) s: \(.bytes_total / 1e3 / .ms * 10 | floor / 10) MB/s"' "$work/job-$1.json"; }

rebuild "$first"
echo "idle: $(speed "$first")"

most=$("$stemedb" bench --op write --clients 64 --secs 8 --json | jq '.[0].per_s')
half=$(awk -v most="$most" 'BEGIN { printf "%d", most / 2 }')
offer() { "$stemedb" bench --op write --clients 256 --rate "$half" --secs "$window_s" --warmup 0.5 --json | jq -c '.[0]'; }
for _ in 1 2 3 4 5 6; do offer; done >"$work/alone"
pid=$(cat "$work/data/$second/pid")
all=$STEMEDB_ENDPOINTS
export STEMEDB_ENDPOINTS
STEMEDB_ENDPOINTS=$(for n in 1 2 3; do [ "node-$n" = "$second" ] || echo "127.0.0.1:$((18579 + n))"; done | paste -sd,)
kill -STOP "$pid"
for _ in 1 2 3 4 5 6; do offer; done >"$work/two"
kill -CONT "$pid"
STEMEDB_ENDPOINTS=$all
offer >/dev/null # it catches up
rebuild "$second" &
rebuilding=$!
: >"$work/beside"
while kill -0 "$rebuilding" 2>/dev/null; do
    offer >"$work/window"
    # Only windows that the rebuild fills count, unless there is none.
    if kill -0 "$rebuilding" 2>/dev/null || [ ! -s "$work/beside" ]; then cat "$work/window" >>"$work/beside"; fi
done
wait "$rebuilding"
echo "64 clients: $most writes/s; offered then: $half/s, in windows of $window_s s"
echo "beside them: $(speed "$second")"
summary='(map(.p99_us) | sort) as $p | "\(length) windows, done \((map(.requests) | add) * 1000 / (map(.offered) | add) | floor / 10) % of the offered, p99 median \($p[length / 2 | floor] / 1000) ms, highest \($p[-1] / 1000) ms, \(map(.errors) | add) errors"'
echo "alone:  $(jq -rs "$summary" "$work/alone")"
echo "a follower stopped: $(jq -rs "$summary" "$work/two")"
echo "beside: $(jq -rs "$summary" "$work/beside")"
