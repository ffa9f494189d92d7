#!/usr/bin/env bash
# Remove what up.sh has made: down.sh FOLDER
set -uo pipefail
FOLDER="$(realpath -m "$1")"
PATH="$PATH:/usr/sbin:/sbin"
for holder in "$FOLDER"/node*.pid; do
  [[ -e $holder ]] || continue
  # Everything that runs in the network of a node, daemons and ranks, goes with it.
  network=$(readlink "/proc/$(cat "$holder")/ns/net") || continue
  for process in /proc/[0-9]*; do
    [[ $(readlink "$process/ns/net" 2> /dev/null) == "$network" ]] && kill -KILL "${process#/proc/}"
  done
done
[[ -e $FOLDER/munged.pid ]] && kill "$(cat "$FOLDER/munged.pid")"
[[ -e $FOLDER/bridge ]] && ip link delete "$(cat "$FOLDER/bridge")"
rm -rf "$FOLDER"
