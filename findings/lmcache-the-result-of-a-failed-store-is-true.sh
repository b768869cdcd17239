#!/usr/bin/env bash
# LMCache 0.5.6: the result of a store that failed is true in an `if`, and that of a store of nothing new is false.
#
# One would guess that `if result:` asks whether an L2 adapter stored its chunks. L2StoreResult is an int: -1 stands for a
# failure and is true; a success is the number of bytes moved, which is 0, and false, when the chunks were there already.
# Only is_successful() tells.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" --quiet --disable-pip-version-check install torch==2.13.0 numpy==2.4.6 numba==0.68.1 \
  sortedcontainers==2.4.0 prometheus_client==0.26.0 py-cpuinfo==9.0.0 psutil==7.2.2 aiohttp==3.14.5 requests==2.34.2 \
  cachetools==8.0.2 pyyaml==6.0.4 2>/dev/null
"$work/venv/bin/pip" --quiet --disable-pip-version-check install --no-deps lmcache==0.5.6 2>/dev/null
cd "$work"
LMCACHE_TRACK_USAGE=false LMCACHE_LOG_LEVEL=ERROR "$work/venv/bin/python" - <<'PY'
from lmcache.v1.distributed.internal_api import L2StoreResult

for success, n_bytes in ((False, 0), (True, 0), (True, 4096)):
    result = L2StoreResult(success, n_bytes)
    print(f"success {success}, {n_bytes} bytes: bool {bool(result)}, is_successful {result.is_successful()}")
    assert result.is_successful() == success, "the behaviour has changed"
assert bool(L2StoreResult(False, 0)) and not L2StoreResult(True, 0), "the behaviour has changed"
PY
# Seen:
#   success False, 0 bytes: bool True, is_successful False
#   success True, 0 bytes: bool False, is_successful True
#   success True, 4096 bytes: bool True, is_successful True
