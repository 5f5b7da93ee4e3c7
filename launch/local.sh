#!/usr/bin/env bash
# All sites of an experiment on this machine, one process each, over the network code.
#   launch/local.sh configs/quickstart.yaml [section.option=value ...] [--resume ...]
# The number of processes is the config's num_sites.
set -euo pipefail
if [ $# -lt 1 ]; then echo "usage: launch/local.sh CONFIG [fomoe train arguments]" >&2; exit 2; fi
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || command -v "$python" >/dev/null || {
  echo "no $python; run 'make install' in $root, or set PYTHON" >&2; exit 2; }
# The dry run checks the config first, so that a mistake is told once and not by every site.
plan=$("$python" -m fomoe train "$@" --dry-run --json)
sites=$("$python" -c 'import json, sys; print(json.loads(sys.argv[1])["num_sites"])' "$plan")
cores=$(nproc 2>/dev/null || echo "$sites")
# Busy processes with more threads than cores slow each other down many times over.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( cores > sites ? cores / sites : 1 ))}
exec "$python" -m torch.distributed.run --standalone --nproc-per-node="$sites" -m fomoe train "$@"
