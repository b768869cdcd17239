#!/bin/sh
# Installs what the plugins' tests need from Debian, where this user may; says what else will be skipped.
#
#   libibverbs1    Mooncake's client links against it
#   redis-server   the Redis plugin's TLS tests (the Valkey wheel has no TLS)
#   prometheus     evaluates the queries of the dashboard
#   chromium       opens the page /hicache/, with a font to read it in
#   iproute2       makes two hosts out of one, for the test that moves KV between them
missing=""
ldconfig -p 2>/dev/null | grep -q 'libibverbs\.so\.1' || missing="$missing libibverbs1"
command -v redis-server >/dev/null 2>&1 || missing="$missing redis-server"
command -v prometheus >/dev/null 2>&1 || missing="$missing prometheus"
command -v chromium >/dev/null 2>&1 || missing="$missing chromium fonts-dejavu-core"
command -v ip >/dev/null 2>&1 || missing="$missing iproute2"
[ -n "$missing" ] || exit 0

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    export DEBIAN_FRONTEND=noninteractive
    # shellcheck disable=SC2086 - the list is words on purpose
    if { apt-get update && apt-get install -y --no-install-recommends $missing; } >/tmp/hicache-apt.log 2>&1; then
        exit 0
    fi
    echo "apt-get could not install:$missing (see /tmp/hicache-apt.log)"
fi
for package in $missing; do
    case $package in
        libibverbs1) echo "without $package the tests of the Mooncake plugin are skipped" ;;
        redis-server) echo "without $package the TLS tests of the Redis plugin are skipped" ;;
        prometheus) echo "without $package the dashboard's queries are not evaluated" ;;
        chromium) echo "without $package the page /hicache/ is not opened in a browser" ;;
        iproute2) echo "without $package no KV is moved between two hosts" ;;
        fonts-*) echo "without $package the page's pictures may lack letters" ;;
    esac
    echo "  to run them: sudo apt-get install --no-install-recommends $package"
done
exit 0
