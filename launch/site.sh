#!/usr/bin/env bash
# One site of an experiment, on a machine of its own. Start it on every machine, in any order:
#   launch/site.sh SITE NUM_SITES SITE0_ADDRESS[:PORT] CONFIG [fomoe train arguments]
#   launch/site.sh 0 3 10.8.0.1:29500 configs/three.yaml --interface wg0
#   launch/site.sh 1 3 10.8.0.1:29500 configs/three.yaml --interface wg0
# Traffic between sites is not encrypted: join the sites by a tunnel such as WireGuard and give its
# interface. The port (default 29500) and the ports that gloo opens must be reachable in the tunnel.
set -euo pipefail
if [ $# -lt 4 ]; then
  echo "usage: launch/site.sh SITE NUM_SITES SITE0_ADDRESS[:PORT] CONFIG [fomoe train arguments]" >&2
  exit 2
fi
site=$1 num_sites=$2 address=$3
shift 3
for number in "$site" "$num_sites"; do
  case $number in *[!0-9]*|'') echo "launch/site.sh: '$number' must be a number" >&2; exit 2 ;; esac
done
if [ "$site" -ge "$num_sites" ]; then
  echo "launch/site.sh: site $site must be below the $num_sites sites" >&2; exit 2
fi
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
command -v "$python" >/dev/null || {
  echo "no $python; run 'make install' in $root, or set PYTHON" >&2; exit 2; }
host=${address%:*} port=29500
if [ "$host" != "$address" ]; then port=${address##*:}; fi
# What torchrun would set. Without its agent a mistake stays one line, and one rank per site needs
# no agent; sites may be started in any order.
export RANK=$site WORLD_SIZE=$num_sites LOCAL_RANK=0 MASTER_ADDR=$host MASTER_PORT=$port
exec "$python" -m fomoe train "$@"
