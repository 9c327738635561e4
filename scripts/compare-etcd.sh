#!/usr/bin/env bash
# Measures StemeDB beside etcd on this machine, in turns, and prints writes per second and their ratio.
#
#   scripts/compare-etcd.sh LOAD_GENERATOR [CLIENTS...]
#
# LOAD_GENERATOR is a closed-loop client that is called as `GEN etcd|stemedb HOST:PORT --clients N --secs S` and prints
# a line with `ops/s=`. It talks gRPC to etcd and HTTP to StemeDB, one durable, quorum-acknowledged write of 128 bytes
# per request. Needs etcd (Debian: etcd-server) and a release build. Timings of a busy machine are noise: read the ratio.
set -euo pipefail

generator=${1:?usage: scripts/compare-etcd.sh LOAD_GENERATOR [CLIENTS...]}
shift
clients=("${@:-64}")
[ $# -gt 0 ] || clients=(64 256)
rounds=${ROUNDS:-3}
secs=${SECS:-5}
stemedb=${STEMEDB:-${CARGO_TARGET_DIR:-target}/release/stemedb}
work=$(mktemp -d "${TMPDIR:-/var/tmp}/stemedb-compare.XXXXXX")
pids=()
cleanup() {
    for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
    wait 2>/dev/null || true
    rm -rf "$work"
}
trap cleanup EXIT

members=e1=http://127.0.0.1:13380,e2=http://127.0.0.1:13381,e3=http://127.0.0.1:13382
for i in 1 2 3; do
    client=http://127.0.0.1:$((12378 + i))
    peer=http://127.0.0.1:$((13379 + i))
    ETCD_UNSUPPORTED_ARCH= etcd --name e$i --data-dir "$work/e$i" --listen-client-urls "$client" \
        --advertise-client-urls "$client" --listen-peer-urls "$peer" --initial-advertise-peer-urls "$peer" \
        --initial-cluster "$members" --initial-cluster-state new >"$work/e$i.log" 2>&1 &
    pids+=($!)
done
"$stemedb" dev --data "$work/stemedb" --port 18380 --json >"$work/dev.json" 2>"$work/dev.log" &
pids+=($!)

await() { # await WHAT COMMAND...: until the command succeeds, at most 30 s
    local what=$1 n=0
    shift
    until "$@" >/dev/null 2>&1; do
        n=$((n + 1))
        [ $n -lt 300 ] || { echo "$what did not come up; see $work" >&2; trap - EXIT; exit 1; }
        sleep 0.1
    done
}
etcd_leader() {
    for i in 1 2 3; do
        local at=127.0.0.1:$((12378 + i)) status
        status=$(ETCDCTL_API=3 etcdctl --endpoints "$at" endpoint status -w fields 2>/dev/null) || continue
        [ "$(sed -n 's/^"MemberID" : //p' <<<"$status")" = "$(sed -n 's/^"Leader" : //p' <<<"$status")" ] || continue
        echo "$at"
        return 0
    done
    return 1
}
stemedb_leader() {
    for i in 0 1 2; do
        curl -sf "http://127.0.0.1:$((18380 + i))/v1/health/leader" >/dev/null || continue
        echo "127.0.0.1:$((18380 + i))"
        return 0
    done
    return 1
}
await etcd etcd_leader
await StemeDB stemedb_leader
ops() { "$generator" "$@" --secs "$secs" | tee -a "$work/lines" | sed -n 's/.*ops\/s= *\([0-9]*\).*/\1/p'; }
median() { sort -n | awk '{ v[NR] = $1 } END { print NR % 2 ? v[(NR + 1) / 2] : (v[NR / 2] + v[NR / 2 + 1]) / 2 }'; }

printf '%-8s %-6s %12s %12s %8s\n' clients round etcd/s stemedb/s ratio
for c in "${clients[@]}"; do
    : >"$work/ratios"
    for round in $(seq "$rounds"); do
        e=$(ops etcd "$(etcd_leader)" --clients "$c")
        s=$(ops stemedb "$(stemedb_leader)" --clients "$c")
        awk -v c="$c" -v r="$round" -v e="$e" -v s="$s" \
            'BEGIN { printf "%-8s %-6s %12d %12d %8.2f\n", c, r, e, s, s / e }' | tee -a "$work/ratios"
    done
    awk '{ print $5 }' "$work/ratios" | median | xargs printf 'clients %s: median ratio %s\n' "$c"
done
echo
cat "$work/lines"
