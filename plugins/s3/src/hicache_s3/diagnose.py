"""The checks of `hicache doctor s3`."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from importlib import metadata

from botocore.exceptions import BotoCoreError, ClientError

from hicache_core.errors import BackendDenied, BackendError
from hicache_core.storage.base import Finding
from hicache_s3.errors import shown
from hicache_s3.objects import Objects

PROBE_NBYTES = 1 << 20
SLOW_S = 0.1


def diagnose(objects: Objects) -> Iterator[Finding]:
    """Findings, most basic first; a lost store ends them."""
    yield Finding("ok", "library", f"boto3 {metadata.version('boto3')}")
    name = f"doctor-{secrets.token_hex(8)}"
    where = f"{objects.config.bucket} at {objects.endpoint.url}, region {objects.endpoint.region}"
    try:
        latency_s = _timed(lambda: objects.fetch(name))
        yield Finding("ok", "bucket", f"{where}, answers in {latency_s * 1e3:.1f} ms")
        yield from _round_trip(objects, name)
        yield _listing(objects)
    except BackendDenied as error:
        yield Finding("error", "rights", str(error))
    except BackendError as error:
        yield Finding("error", "bucket", str(error))
        return
    yield _latency(objects, latency_s)
    yield _lifecycle(objects)


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _round_trip(objects: Objects, name: str) -> Iterator[Finding]:
    """Writes, reads and removes an object of 1 MiB; the best of three times."""
    data = memoryview(secrets.token_bytes(PROBE_NBYTES))
    write_s = min(_timed(lambda: objects.store(name, (data,))) for _ in range(3))
    found: list[bytes] = []

    def read() -> None:
        answer = objects.fetch(name)
        if answer is not None and answer.body is not None:
            found.append(b"".join(answer.body))

    read_s = min(_timed(read) for _ in range(3))
    objects.remove([name])
    if found != [bytes(data)] * 3:
        yield Finding(
            "error", "round trip", "1 MiB came back changed; the store or a proxy is broken"
        )
        return
    speed = f"write {1.048576 / write_s:.0f} MB/s, read {1.048576 / read_s:.0f} MB/s"
    yield Finding("ok", "round trip", f"1 MiB on one connection: {speed}")
    if objects.fetch(name) is not None:
        yield Finding("warning", "rights", "a removed object is still there: is the bucket locked?")


def _listing(objects: Objects) -> Finding:
    try:
        next(iter(objects.names("pages/")), None)
    except BackendDenied as error:
        return Finding("warning", "listing", f"{error}; clear and list_keys will not work")
    return Finding("ok", "listing", "the prefix can be listed")


def _latency(objects: Objects, first_s: float) -> Finding:
    latency_s = min(first_s, *(_timed(lambda: objects.fetch("doctor")) for _ in range(5)))
    if latency_s > SLOW_S:
        return Finding(
            "warning",
            "latency",
            f"{latency_s * 1e3:.0f} ms a request: use a bucket in this region and a VPC endpoint",
        )
    return Finding("ok", "latency", f"{latency_s * 1e3:.1f} ms a request")


def _lifecycle(objects: Objects) -> Finding:
    """Whether old pages are ever removed."""
    advice = f"let a lifecycle rule expire {objects.config.prefix!r} after some days"
    try:
        answer = objects.endpoint.client.get_bucket_lifecycle_configuration(
            Bucket=objects.config.bucket
        )
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        if code == "NoSuchLifecycleConfiguration":
            return Finding("warning", "lifecycle", f"nothing ever expires; {advice}")
        return Finding("warning", "lifecycle", f"rules cannot be read ({code}); {advice}")
    except BotoCoreError as error:
        text = shown(str(error), objects.endpoint.secrets())
        return Finding("warning", "lifecycle", f"rules cannot be read ({text}); {advice}")
    rules = [rule for rule in answer.get("Rules", ()) if rule.get("Status") == "Enabled"]
    if not any("Expiration" in rule for rule in rules):
        return Finding("warning", "lifecycle", f"no rule expires objects; {advice}")
    return Finding("ok", "lifecycle", "a rule expires objects")
