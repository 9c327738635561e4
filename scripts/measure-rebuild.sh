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
. "$(dirname "$0")/measure-lib.sh"

begin rebuild 18580
fill "${1:-1024}"

followers=$(cluster 18580 | jq -r '.leader as $l | .members[].name | select(. != $l)')
first=$(sed -n 1p <<<"$followers")
second=$(sed -n 2p <<<"$followers")

rebuild() { "$stemedb" rebuild "$1" --json >"$work/job-$1.json" 2>"$work/job-$1.log" || { cat "$work/job-$1.log" >&2; return 1; }; }

rebuild "$first"
echo "idle: $(speed "$work/job-$first.json")"

most=$(most)
half=$(awk -v most="$most" 'BEGIN { printf "%d", most / 2 }')
for _ in 1 2 3 4 5 6; do offer "$half"; done >"$work/alone"
pid=$(cat "$work/data/$second/pid")
all=$STEMEDB_ENDPOINTS
STEMEDB_ENDPOINTS=$(for n in 1 2 3; do [ "node-$n" = "$second" ] || addresses "$n"; done | paste -sd,)
kill -STOP "$pid"
for _ in 1 2 3 4 5 6; do offer "$half"; done >"$work/two"
kill -CONT "$pid"
STEMEDB_ENDPOINTS=$all
offer "$half" >/dev/null # it catches up
rebuild "$second" &
rebuilding=$!
offer_while "$rebuilding" "$half" "$work/beside"
wait "$rebuilding"
echo "64 clients: $most writes/s; offered then: $half/s, in windows of $window_s s"
echo "beside them: $(speed "$work/job-$second.json")"
echo "alone:  $(summary "$work/alone")"
echo "a follower stopped: $(summary "$work/two")"
echo "beside: $(summary "$work/beside")"
