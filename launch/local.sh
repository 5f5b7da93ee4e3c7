#!/usr/bin/env bash
# All sites of an experiment on this machine, one process each, over the network code.
#   launch/local.sh configs/quickstart.yaml [section.option=value ...] [--resume ...]
# The number of processes is the config's num_sites.
set -euo pipefail
if [ $# -lt 1 ]; then echo "usage: launch/local.sh CONFIG [fomoe train arguments]" >&2; exit 2; fi
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHON=${PYTHON:-$root/.venv/bin/python}
command -v "$PYTHON" >/dev/null || {
  echo "no $PYTHON; run 'make install' in $root, or set PYTHON" >&2; exit 2; }
# The dry run checks the config first, so that a mistake is told once and not by every site.
plan=$("$PYTHON" -m fomoe train "$@" --dry-run --json)
sites=$("$PYTHON" -c 'import json, sys; print(json.loads(sys.argv[1])["num_sites"])' "$plan")
port=$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
cores=$(nproc 2>/dev/null || echo "$sites")
# Busy processes with more threads than cores slow each other down many times over.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( cores > sites ? cores / sites : 1 ))}
interface=()
if [ -d /sys/class/net/lo ] && [[ " $* " != *" --interface"* ]]; then interface=(--interface lo); fi
pids=()
# Whatever ends this script ends the sites, and waits until they have said so.
trap 'kill "${pids[@]}" 2>/dev/null || true; wait' EXIT
trap 'exit 130' INT TERM # the shell hides Ctrl-C from what runs in its background
for ((site = 0; site < sites; site++)); do
  "$root/launch/site.sh" "$site" "$sites" "127.0.0.1:$port" "$@" "${interface[@]}" &
  pids+=($!)
done
# The first site that fails ends the others; its status is this script's.
for ((left = sites; left > 0; left--)); do
  wait -n || {
    status=$?
    sleep 3 # the others notice by themselves and say what they were doing
    echo "launch/local.sh: a site ended with status $status; the others were stopped" >&2
    exit $status
  }
done
