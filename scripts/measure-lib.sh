# What the measuring scripts share: a throw-away cluster of three that is filled, and an open load. To be sourced; needs a
# release build, curl and jq.

stemedb=${STEMEDB:-${CARGO_TARGET_DIR:-target}/release/stemedb}
window_s=2
pids=()

# begin NAME PORT: node-1 to node-3 at PORT and the two behind it, under $work/data; all of it goes at the end.
begin() {
    work=$(mktemp -d "${TMPDIR:-/var/tmp}/stemedb-$1.XXXXXX")
    trap finish EXIT
    first_port=$2
    "$stemedb" dev --data "$work/data" --port "$2" --json >"$work/dev.json" 2>"$work/dev.log" &
    pids+=($!)
    for _ in $(seq 300); do
        [ -s "$work/dev.json" ] && break
        sleep 0.1
    done
    [ -s "$work/dev.json" ] || { cat "$work/dev.log" >&2; exit 1; }
    STEMEDB_ENDPOINTS=$(addresses 1 2 3)
    export STEMEDB_ENDPOINTS
}

finish() {
    [ ${#pids[@]} = 0 ] || kill "${pids[@]}" 2>/dev/null || true
    wait 2>/dev/null || true
    rm -rf "$work"
}

port_of() { echo $((first_port - 1 + $1)); }
addresses() { for n in "$@"; do echo "127.0.0.1:$(port_of "$n")"; done | paste -sd,; }
tree_mib() { du -sm "$work/data/node-$1/kv" | cut -f1; }
metric() { curl -s "http://127.0.0.1:$1/metrics" | awk -v name="$2" '$1 == name { print $2 }'; }
cluster() { curl -s "http://127.0.0.1:$1/v1/admin/cluster"; }

# fill MIB: until a tree has so many; compactions of what was just written are none of an idle cluster.
fill() {
    while [ "$(tree_mib 1)" -lt "$1" ]; do
        "$stemedb" bench --op write --clients 16 --batch 16 --value 16384 --secs 5 --warmup 0 >/dev/null
        printf '\rtree: %s of %s MiB' "$(tree_mib 1)" "$1" >&2
    done
    echo >&2
    for n in 1 2 3; do
        for _ in $(seq 120); do
            [ "$(metric "$(port_of "$n")" stemedb_lsm_pending_compaction_bytes)" = 0 ] && break
            sleep 0.5
        done
    done
}

# The most that 64 clients get done, writes each second.
most() { "$stemedb" bench --op write --clients 64 --secs 8 --json | jq '.[0].per_s'; }
# offer RATE: so many writes each second for one window, as a line of JSON.
offer() { "$stemedb" bench --op write --clients 256 --rate "$1" --secs "$window_s" --warmup 0.5 --json | jq -c '.[0]'; }
# offer_while PID RATE FILE: windows until the process ends. Only those that it fills count, unless there is none.
offer_while() {
    : >"$3"
    while kill -0 "$1" 2>/dev/null; do
        offer "$2" >"$work/window"
        if kill -0 "$1" 2>/dev/null || [ ! -s "$3" ]; then cat "$work/window" >>"$3"; fi
    done
}
# summary FILE: what came of the windows in it.
summary() {
    jq -rs '(map(.p99_us) | sort) as $p | "\(length) windows, \(map(.requests) | add) requests, done \((map(.requests) | add) * 1000 / (map(.offered) | add) | floor / 10) % of the offered, p99 median \($p[length / 2 | floor] / 1000) ms, highest \($p[-1] / 1000) ms, \(map(.errors) | add) errors"' "$1"
}
# speed JOB: bytes, seconds and MB/s of a job; MB are 10^6 bytes.
speed() { jq -r '"\(.bytes_total / 1e6 | floor) MB in \(.ms / 1000) s: \(.bytes_total / 1e3 / .ms * 10 | floor / 10) MB/s"' "$1"; }
