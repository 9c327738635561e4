#!/usr/bin/env bash
# Prints what it takes to replace a dead node by an empty one under load, in a throw-away cluster of three.
#
#   scripts/measure-replace.sh [MIB]
#
# First the cluster is filled until a tree has so many MiB (default 1024). Then a follower is killed; half of what 64
# clients get done through the other two is offered to them as an open load, first alone, and then while
# `stemedb member replace` puts an empty node in the place of the dead one. All the while the members are looked at: how
# many more of the voters may fail, at each step of the job. It must never be fewer than before, and no request may fail;
# otherwise this ends with 1. MB are 10^6 bytes, over the whole job: until the new node votes.
# Needs a release build, curl and jq.
set -euo pipefail
. "$(dirname "$0")/measure-lib.sh"

begin replace 18680
fill "${1:-1024}"

# A follower other than node-1, whose configuration the new node gets.
dead=$(cluster 18680 | jq -r '.leader as $l | [.members[].name | select(. != $l and . != "node-1")][0]')
alive=$(for n in 1 2 3; do [ "node-$n" = "$dead" ] || echo "$n"; done)
# shellcheck disable=SC2086
STEMEDB_ENDPOINTS=$(addresses $alive)
watched=$(port_of "$(head -1 <<<"$alive")")
kill -9 "$(cat "$work/data/$dead/pid")"

most=$(most)
half=$(awk -v most="$most" 'BEGIN { printf "%d", most / 2 }')
for _ in 1 2 3 4 5 6; do offer "$half"; done >"$work/alone"

new=$(port_of 4)
mkdir -p "$work/data/node-4"
sed -e 's/^name = "node-1"/name = "node-4"/;t' \
    -e "s/^data_dir = .*/data_dir = \"${work//\//\\/}\\/data\\/node-4\"/" \
    -e "s/^listen = .*/listen = \"127.0.0.1:$new\"/" \
    -e 's/^bootstrap_expect = 3/bootstrap_expect = 4/' "$work/data/node-1/api.toml" |
    awk '/^\[\[cluster.peers\]\]/ { peers = 1 } peers && /"node-4"/ { sub("node-4", "node-1") } { print }' \
        >"$work/data/node-4/api.toml"
printf '\n[[cluster.peers]]\nname = "node-4"\naddr = "127.0.0.1:%s"\nhttp = "127.0.0.1:%s"\n' \
    $((new + 100)) "$new" >>"$work/data/node-4/api.toml"
"$stemedb" serve --config "$work/data/node-4/api.toml" >"$work/node-4.log" 2>&1 &
pids+=($!)
for _ in $(seq 300); do
    [ "$(curl -s "http://127.0.0.1:$new/v1/health" | jq -r .status)" = waiting ] && break
    sleep 0.1
done

# One line for each look: the step, and how many more voters may fail. One with a slow or full disk votes and acknowledges.
look() {
    curl -s -m 2 "http://127.0.0.1:$watched/v1/admin/members" | jq -r '
        ([.members[] | select(.voter and .role != "unreachable" and (.disk.state | IN("ok", "slow", "full")))] | length) as $work
        | [.change.step // "none", $work - .needed] | @tsv'
}
before=$(look | cut -f2)
[ "$before" = 0 ] || { echo "of three voters one is dead, so that no more may fail; seen: $before" >&2; exit 1; }
watch() {
    while [ ! -e "$work/over" ]; do
        seen=$(look || true)
        # A node that answers too late once, under load, has not failed.
        for _ in 1 2; do
            [ "${seen##*$'\t'}" -ge "$before" ] 2>/dev/null && break
            seen=$(look || true)
        done
        echo "$seen"
        sleep 0.05
    done >"$work/looks"
}
watch &
watching=$!
"$stemedb" member replace "$dead" node-4 --addr "127.0.0.1:$((new + 100))" --json \
    >"$work/job.json" 2>"$work/job.log" &
replacing=$!
offer_while "$replacing" "$half" "$work/beside"
wait "$replacing" || { cat "$work/job.log" "$work/node-4.log" >&2; exit 1; }
for _ in $(seq 100); do
    after=$(look | cut -f2)
    [ "$after" -gt "$before" ] && break
    sleep 0.1
done
touch "$work/over"
wait "$watching"
# Steps and bytes are known where it was led from.
leader=$(cluster "$watched" | jq -r '.leader | ltrimstr("node-")')
curl -s "http://127.0.0.1:$(port_of "$leader")/v1/admin/jobs/$(jq -r .id "$work/job.json")" >"$work/job"
offer "$half" >"$work/afterwards"

echo "64 clients, one node of three dead: $most writes/s; offered then: $half/s, in windows of $window_s s"
echo "replaced $dead by node-4: $(speed "$work/job")"
jq -r '.steps[] | "  \(.ms) ms  \(.name)"' "$work/job"
echo "alone:  $(summary "$work/alone")"
echo "beside: $(summary "$work/beside")"
echo "after:  $(summary "$work/afterwards")"
echo "more voters that may fail: $before before, $after afterwards; the fewest seen at each step:"
awk -F '\t' 'NF == 2 { if (!($1 in least)) { least[$1] = $2; order[++n] = $1 } if ($2 < least[$1]) least[$1] = $2; looks[$1]++ }
    END { for (i = 1; i <= n; i++) printf "  %s  %s (%d looks)\n", least[order[i]], order[i], looks[order[i]] }' "$work/looks"
failed=$(cat "$work/alone" "$work/beside" "$work/afterwards" | jq -s 'map(.errors) | add')
least=$(awk -F '\t' 'NF == 2 { print $2 }' "$work/looks" | sort -n | head -1)
echo "failed requests: $failed; fewest voters that may fail: $least"
[ "$failed" = 0 ] && [ "$least" -ge "$before" ] && [ "$after" -gt "$before" ]
