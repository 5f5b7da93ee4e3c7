#!/usr/bin/env bash
# A run over the links of a cluster file, emulated on this machine: every site is a network namespace
# with the file's rates, delay, jitter and loss. Needs root and iproute2 (docs/wan.md).
#   launch/wan.sh CLUSTER.yaml CONFIG [--mtu BYTES] [--queue-ms MS] [fomoe train arguments]
#   launch/wan.sh configs/clusters/thin-links.yaml configs/quickstart.yaml rounds=4
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
command -v "$python" >/dev/null || {
  echo "no $python; run 'make install' in $root, or set PYTHON" >&2; exit 2; }
exec "$python" "$root/launch/wan.py" "$@"
