#!/bin/sh
# Turns the package index that Debian keeps on this machine into NDJSON, one assertion per line, for `stemedb import`.
#
#   scripts/sample-data.sh [--packages N] [--section NAME] [--output FILE]
#
#   --packages N     only the first N packages (of the section, when one is given); default: all, about a million assertions
#   --section NAME   only packages of this section, such as `libs`
#   --output FILE    default: standard output
#
# Concept: debian/<section>/<package>. Predicates: the index's fields in lower case (version, depends, maintainer,
# installed-size, description, ...). Sizes are JSON numbers, all else strings. The same index gives the same bytes.
# Needs apt-cache and any awk. Exit codes: 0 done, 2 wrong usage, 5 no package index (run `apt-get update`).
set -eu

packages=0
section=
output=
while [ $# -gt 0 ]; do
    case "$1" in
        --packages | --section | --output)
            [ $# -ge 2 ] || { echo "sample-data.sh: $1 needs a value" >&2; exit 2; }
            case "$1" in
                --packages) packages=$2 ;;
                --section) section=$2 ;;
                --output) output=$2 ;;
            esac
            shift 2
            ;;
        -h | --help) sed -n '2,13s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) echo "sample-data.sh: unknown argument $1 (see --help)" >&2; exit 2 ;;
    esac
done
case "$packages" in
    '' | *[!0-9]*) echo "sample-data.sh: --packages takes a number, got '$packages'" >&2; exit 2 ;;
esac
command -v apt-cache >/dev/null || { echo "sample-data.sh: apt-cache is not on this machine" >&2; exit 5; }

# The index is read to its end even for a slice: apt-cache reports a closed pipe as an error of its own.
convert() {
    apt-cache dumpavail | LC_ALL=C awk -v limit="$packages" -v only="$section" '
        # A JSON string. Bytes above 0x7f pass through: the index is UTF-8.
        function quoted(s) {
            gsub(/\\/, "\\\\", s)
            gsub(/"/, "\\\"", s)
            gsub(/\t/, "\\t", s)
            gsub(/[\001-\037\177]/, " ", s)
            return "\"" s "\""
        }
        # One valid path segment: no control characters, no "*", neither "." nor "..", at most 255 bytes.
        function segment(s) {
            gsub(/[*\001-\037\177\/]/, "-", s)
            if (s == "" || s == "." || s == "..") s = "unnamed"
            return substr(s, 1, 255)
        }
        function flush_stanza(    path, i, n, parts, key, value) {
            if (name != "" && (only == "" || only == in_section) && (limit == 0 || written < limit)) {
                n = split(in_section == "" ? "none" : in_section, parts, "/")
                path = "debian"
                for (i = 1; i <= n; i++) path = path "/" segment(parts[i])
                path = quoted(path "/" segment(name))
                for (i = 1; i <= fields; i++) {
                    key = keys[i]
                    value = values[i]
                    if (value == "") continue
                    if ((key == "installed-size" || key == "size") && value ~ /^(0|[1-9][0-9]*)$/ && length(value) < 16)
                        text = value
                    else
                        text = quoted(value)
                    print "{\"concept_path\":" path ",\"predicate\":" quoted(key) ",\"value\":" text ",\"source\":\"apt\"}"
                }
                written++
            }
            name = ""; in_section = ""; fields = 0
        }
        /^$/ { flush_stanza(); next }
        /^[ \t]/ {
            if (fields > 0) { sub(/^[ \t]+/, ""); values[fields] = values[fields] " " $0 }
            next
        }
        {
            colon = index($0, ":")
            if (colon < 2) next
            key = tolower(substr($0, 1, colon - 1))
            value = substr($0, colon + 1)
            sub(/^[ \t]+/, "", value)
            sub(/[ \t]+$/, "", value)
            if (key == "package") { name = value; next }
            if (key == "section") in_section = value
            fields++
            keys[fields] = key
            values[fields] = value
        }
        END {
            flush_stanza()
            if (written == 0) {
                print "sample-data.sh: no package found; run `apt-get update` first, or check --section" > "/dev/stderr"
                exit 5
            }
        }'
}

if [ -n "$output" ]; then
    # Written beside the target and renamed, so that a stopped run leaves no half file under the final name.
    trap 'rm -f "$output.part"' EXIT
    convert >"$output.part"
    mv "$output.part" "$output"
else
    convert
fi
