#!/usr/bin/env bash
# One site of an experiment, on a machine of its own. Start it on every machine, in any order:
#   launch/site.sh SITE NUM_SITES SITE0_ADDRESS[:PORT] CONFIG [fomoe train arguments]
#   launch/site.sh 0 3 10.8.0.1:29500 configs/three.yaml --interface wg0
#   launch/site.sh 1 3 10.8.0.1:29500 configs/three.yaml --interface wg0
# A site of several accelerators on one machine: --ranks N after CONFIG, for N processes under a
# torchrun of this site's own (inner.parallel says how they share the work). A site of several
# machines: start torchrun on each, with fomoe's --site and --meet as below.
# An IPv6 address stands in brackets: [fd00::1]:29500, [fd00::1].
# Traffic between sites is not encrypted: join the sites by a tunnel such as WireGuard and give its
# interface. The port (default 29500) and the ports that gloo opens must be reachable in the tunnel.
set -euo pipefail
refuse() { echo "launch/site.sh: $1" >&2; exit 2; }
if [ $# -lt 4 ]; then
  echo "usage: launch/site.sh SITE NUM_SITES SITE0_ADDRESS[:PORT] CONFIG [--ranks N] [fomoe train arguments]" >&2
  exit 2
fi
site=$1 num_sites=$2 address=$3
shift 3
[[ $site =~ ^[0-9]{1,9}$ ]] || refuse "SITE '$site' must be a number"
[[ $num_sites =~ ^[0-9]{1,9}$ ]] || refuse "NUM_SITES '$num_sites' must be a number"
# 10#: a leading 0 would mean octal
site=$((10#$site)) num_sites=$((10#$num_sites))
[ "$site" -lt "$num_sites" ] || refuse "SITE $site must be below NUM_SITES $num_sites"
port=29500
if [[ $address =~ ^\[([^][]+)\](:(.*))?$ ]]; then # [fd00::1] or [fd00::1]:29500
  host=${BASH_REMATCH[1]}
  if [ -n "${BASH_REMATCH[2]}" ]; then port=${BASH_REMATCH[3]}; fi
elif [[ $address == *:*:* || $address == *[][]* ]]; then
  refuse "SITE0_ADDRESS '$address': an IPv6 address stands in brackets, as in [fd00::1]:29500"
else
  host=${address%%:*}
  if [ "$host" != "$address" ]; then port=${address#*:}; fi
fi
[ -n "$host" ] || refuse "SITE0_ADDRESS '$address' must begin with a host name or an address"
if ! [[ $port =~ ^[0-9]{1,5}$ ]] || ((10#$port < 1 || 10#$port > 65535)); then
  refuse "SITE0_ADDRESS '$address': the port '$port' must be a number from 1 to 65535"
fi
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
command -v "$python" >/dev/null || {
  echo "no $python; run 'make install' in $root, or set PYTHON" >&2; exit 2; }
words=() ranks=1
while [ $# -gt 0 ]; do
  case $1 in
    --ranks) ranks=${2-} && shift ;;
    --ranks=*) ranks=${1#*=} ;;
    *) words+=("$1") ;;
  esac
  shift
done
[[ $ranks =~ ^[0-9]{1,6}$ ]] && ((10#$ranks > 0)) || refuse "--ranks '$ranks' must be a number above 0"
if ((10#$ranks > 1)); then
  meet=$host:$port
  if [[ $host == *:* ]]; then meet="[$host]:$port"; fi
  exec "$python" -m torch.distributed.run --standalone --nproc-per-node=$((10#$ranks)) \
    -m fomoe train "${words[@]}" --site "$site" --meet "$meet"
fi
# What torchrun would set. Without its agent a mistake stays one line, and one rank per site needs
# no agent; sites may be started in any order.
export RANK=$site WORLD_SIZE=$num_sites LOCAL_RANK=0 MASTER_ADDR=$host MASTER_PORT=$port
exec "$python" -m fomoe train "${words[@]}"
