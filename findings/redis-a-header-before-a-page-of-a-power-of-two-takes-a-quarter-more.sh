#!/usr/bin/env bash
# Redis 7.0.15 with jemalloc, as distributions build it: a value of 1 MiB and 64 bytes takes 1.25 MiB of memory.
#
# Pages of KV usually have 2^n bytes, and a cache that verifies what it reads puts a short header before them. One would
# guess that this costs the header. jemalloc has four sizes between a power of two and the next, so an allocation that is
# just longer than 2^n takes the next size, 1.25 * 2^n: a store with a limit of memory holds a fifth fewer pages. Even the
# plain 2^n takes the next size, since the server keeps some bytes of its own before a value. What keeps within a size is
# a value that is some bytes shorter than it. MEMORY USAGE tells it, and so does used_memory.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
apt-get download redis-tools=5:7.0.15-1~deb12u10 libjemalloc2=5.3.0-1 liblua5.1-0=5.1.5-9 liblzf1=3.6-3 >/dev/null 2>&1
for package in *.deb; do dpkg-deb --extract "$package" root; done
python3 -m venv venv
venv/bin/pip --quiet --disable-pip-version-check install redis==8.1.0 2>/dev/null
# redis-check-rdb is the server itself, which goes by the name that it is called by.
cp root/usr/bin/redis-check-rdb redis-server
LD_LIBRARY_PATH="$work/root/usr/lib/x86_64-linux-gnu" venv/bin/python - "$work" <<'PY'
import subprocess
import sys
import time

import redis

work = sys.argv[1]
server = subprocess.Popen(
    [f"{work}/redis-server", "--port", "0", "--unixsocket", f"{work}/s", "--save", "", "--appendonly", "no"],
    stdout=subprocess.DEVNULL,
)
client = redis.Redis(unix_socket_path=f"{work}/s")
try:
    for _ in range(100):
        try:
            client.ping()
            break
        except redis.ConnectionError:
            time.sleep(0.1)
    print(client.info("server")["redis_version"], client.info("memory")["mem_allocator"])
    seen = {}
    for power in (16, 18, 20, 22):
        for more in (-64, 0, 64):
            nbytes = (1 << power) + more
            client.set("first", bytes(nbytes))  # also gives the connection's buffer its size
            before = client.info("memory")["used_memory"]
            for n in range(32):
                client.set(f"{nbytes}-{n}", bytes(nbytes))
            grown = (client.info("memory")["used_memory"] - before) / 32 / (1 << power)
            told = client.memory_usage(f"{nbytes}-0") / (1 << power)
            seen[power, more] = (round(grown, 2), round(told, 2))
            print(f"2^{power} {more:+} bytes: used_memory {grown:.2f}, MEMORY USAGE {told:.2f} of 2^{power}")
            client.flushall()
    client.shutdown(nosave=True)
finally:
    server.wait(10)
for (power, more), measured in seen.items():
    expected = 1.0 if more < 0 else 1.25
    assert all(abs(one - expected) < 0.03 for one in measured), (power, more, measured)
PY
# Seen, and the same for 2^18, 2^20 and 2^22:
#   7.0.15 jemalloc-5.3.0
#   2^16 -64 bytes: used_memory 1.00, MEMORY USAGE 1.00 of 2^16
#   2^16 +0 bytes: used_memory 1.25, MEMORY USAGE 1.25 of 2^16
#   2^16 +64 bytes: used_memory 1.25, MEMORY USAGE 1.25 of 2^16
