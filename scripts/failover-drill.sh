#!/usr/bin/env bash
# Runs `stemedb drill` from cron: one at a time, with reports that are kept, and silent when all is well.
#
#   scripts/failover-drill.sh [ARGUMENTS OF stemedb drill]
#
# Without arguments: each kind that this machine can do, on a throw-away cluster. For example, every night a rolling
# restart behind nginx, and once a week leadership moved in the cluster that is in use:
#
#   15 3 * * *  stemedb  /opt/stemedb/scripts/failover-drill.sh --kind drain --behind nginx
#   15 4 * * 0  stemedb  /opt/stemedb/scripts/failover-drill.sh --kind failover --rounds 3 --endpoints db1:18180,db2:18180,db3:18180
#
# Each run leaves TIME.html, TIME.json and TIME.log in the folder of reports, and `latest` points to those of the last run: while
# it goes on, and when it has left no report, there is only latest.log. On success nothing is printed, so that cron sends no
# mail; else the log is, and where the report lies. A cluster in use gets 100 operations a second, unless --rate, --clients or
# --rate-fraction say otherwise; what is written stays in it. SIGTERM ends the drill, which first puts back what it has drained.
#
# Environment:
#   STEMEDB           the program; default: stemedb on the PATH, else what cargo has built beside this script
#   DRILL_REPORTS     folder of reports; default: ${XDG_STATE_HOME:-~/.local/state}/stemedb/drills
#   DRILL_KEEP        how many runs are kept; default: 30
#
# Exit codes: those of `stemedb drill` (0 nothing found, 1 something found), and 75 when a drill is under way already.
set -uo pipefail

case "${1:-}" in
    -h | --help) sed -n '2,24s/^# \{0,1\}//p' "$0"; exit 0 ;;
esac
here=$(cd "$(dirname "$0")/.." && pwd) || exit 5
program=${STEMEDB:-}
if [ -z "$program" ]; then
    program=$(command -v stemedb || true)
    for built in "$here/target/release/stemedb" "$here/target/debug/stemedb"; do
        [ -n "$program" ] || [ ! -x "$built" ] || program=$built
    done
fi
[ -n "$program" ] || { echo "failover-drill.sh: there is no stemedb on the PATH, and STEMEDB names none" >&2; exit 5; }
keep=${DRILL_KEEP:-30}
case "$keep" in
    '' | *[!0-9]* | 0) echo "failover-drill.sh: DRILL_KEEP=$keep: how many runs to keep, 1 or more" >&2; exit 2 ;;
esac
reports=${DRILL_REPORTS:-${XDG_STATE_HOME:-$HOME/.local/state}/stemedb/drills}
mkdir -p "$reports" || exit 5

# Two drills at once would measure each other. The lock goes with this process, however it ends; what it starts does not
# hold it.
exec 9>"$reports/lock" || exit 5
if ! flock -n 9; then
    echo "failover-drill.sh: a drill is under way already; its lock is $reports/lock" >&2
    exit 75
fi

[ $# -gt 0 ] || set -- --kind all
name=$(date -u +%Y%m%dT%H%M%SZ)
run=$reports/$name
# Nobody may take the report of an earlier run for that of one which left none.
rm -f "$reports/latest.html" "$reports/latest.json" "$run.html" "$run.json"
ln -sfn "$name.log" "$reports/latest.log"
drill=
# From a terminal the drill gets Ctrl-C itself; a second signal would keep it from putting back what it has drained.
trap '[ -z "$drill" ] || kill -TERM "$drill" 2>/dev/null' TERM
trap : INT HUP
"$program" drill "$@" --json --html "$run.html" >"$run.json" 2>"$run.log" 9>&- &
drill=$!
# A signal ends a wait and not the drill. The shell remembers its exit code once it has ended.
while wait "$drill"; kill -0 "$drill" 2>/dev/null; do :; done
wait "$drill"
status=$?
for kind in html json; do
    if [ -s "$run.$kind" ]; then
        ln -sfn "$name.$kind" "$reports/latest.$kind"
    else
        rm -f "$run.$kind"
    fi
done

# Names are times, so that the oldest come first.
find "$reports" -maxdepth 1 -type f -name '20??????T??????Z.log' | sort | head -n "-$keep" | while read -r old; do
    rm -f "$old" "${old%.log}.json" "${old%.log}.html"
done

if [ "$status" -ne 0 ]; then
    cat "$run.log"
    [ -s "$run.html" ] && echo "The report: $run.html"
fi
exit "$status"
