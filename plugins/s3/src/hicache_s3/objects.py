"""Requests on the objects of one bucket: signed, limited in time, retried if that helps."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from urllib.parse import quote

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    ReadTimeoutError,
)

from hicache_core.errors import BackendTimeout, BackendUnavailable
from hicache_core.plugin.backends import nbytes_of
from hicache_core.types import Page
from hicache_s3.age import is_expired, now_at_store
from hicache_s3.answers import Answer, Choose, Head, new_memory
from hicache_s3.config import S3Config
from hicache_s3.connections import Connections
from hicache_s3.endpoint import Endpoint
from hicache_s3.errors import ABSENT, BUSY, Refusal, lost, parse_refusal, refused, shown
from hicache_s3.request_threads import RequestThreads

DELETE_AT_ONCE = 1000
"""Maximum number of names in DeleteObjects."""

NOT_IN_RANGE = 416
_FIRST_PAUSE_S = 0.05


class Counts:
    """Counters that many threads add to."""

    def __init__(self, names: Iterable[str]) -> None:
        """Starts with 0 for each of ``names``."""
        self._counter: Counter[str] = Counter(dict.fromkeys(names, 0))
        self._lock = threading.Lock()

    def add(self, **amounts: int) -> None:
        """Adds to the named counters."""
        with self._lock:
            self._counter.update(amounts)

    def copy(self) -> dict[str, float]:
        """Returns a snapshot of the counters."""
        with self._lock:
            return {name: float(value) for name, value in self._counter.items()}


class Objects:
    """The objects under one prefix of one bucket. Any thread may call any method.

    Every method raises a ``BackendError`` if the store cannot answer.
    """

    def __init__(
        self, config: S3Config, endpoint: Endpoint, threads: RequestThreads, counts: Counts
    ) -> None:
        """Connects to nothing.

        Args:
            config: the settings.
            endpoint: address and signatures.
            threads: for the parts of large objects, and for batches.
            counts: counters to add to.
        """
        self.config = config
        self.endpoint = endpoint
        self.threads = threads
        self._counts = counts
        self._connections = Connections(endpoint.address, config.max_connections)
        self._where = f"s3 bucket {config.bucket} at {endpoint.url}"
        self._write_headers: dict[str, str] = {}
        if config.sse:
            self._write_headers["x-amz-server-side-encryption"] = config.sse
        if config.sse_kms_key_id:
            name = "x-amz-server-side-encryption-aws-kms-key-id"
            self._write_headers[name] = config.sse_kms_key_id

    def close(self) -> None:
        """Joins the threads and closes the connections."""
        self.threads.close()
        self._connections.close()
        self.endpoint.close()

    def fetch(
        self, name: str, choose: Choose = new_memory, span: tuple[int, int] | None = None
    ) -> Answer | None:
        """Reads an object; None if there is none or it has expired.

        Args:
            name: its name, without the prefix.
            choose: returns the memory for the body.
            span: first byte, and the one after the last; None for the whole object. The status is
                416 if the object is too short.
        """
        headers = {"Range": f"bytes={span[0]}-{span[1] - 1}"} if span else {}

        def choose_young(head: Head) -> Page | None:
            return None if is_expired(head.headers, self.config.ttl_s) else choose(head)

        return self._young(self._request("GET", name, headers=headers, choose=choose_young))

    def look(self, name: str) -> Answer | None:
        """Returns the headers of an object; None if there is none or it has expired."""
        return self._young(self._request("HEAD", name))

    def _young(self, answer: Answer | None) -> Answer | None:
        if answer is None or is_expired(answer.headers, self.config.ttl_s):
            return None
        return answer

    def store(self, name: str, page: Page, headers: Mapping[str, str] | None = None) -> None:
        """Writes an object. A large one is sent in parts, and appears when it is complete.

        Args:
            name: its name, without the prefix.
            page: its bytes.
            headers: further headers; not for objects in parts.
        """
        if nbytes_of(page) > self.config.multipart_nbytes:
            self._store_in_parts(name, page)
        else:
            self._request(
                "PUT", name, headers={**self._write_headers, **(headers or {})}, body=page
            )
        self._counts.add(puts=1, written_nbytes=nbytes_of(page))

    def remove(self, names: Sequence[str]) -> None:
        """Removes objects; ignores absent ones."""
        if len(names) == 1:
            self._request("DELETE", names[0])
            return
        for start in range(0, len(names), DELETE_AT_ONCE):
            part = [{"Key": self.config.prefix + name} for name in names[start:][:DELETE_AT_ONCE]]
            with self._control("DeleteObjects"):
                answer = self.endpoint.client.delete_objects(
                    Bucket=self.config.bucket, Delete={"Objects": part, "Quiet": True}
                )
            for error in answer.get("Errors", ()):
                if error.get("Code") not in ABSENT:
                    refusal = Refusal(200, error.get("Code", "?"), error.get("Message", ""))
                    raise self._refused(refusal, "delete")

    def names(self, prefix: str) -> Iterator[str]:
        """Yields the names that start with ``prefix``, including expired objects."""
        return (name for name, *_ in self._listing(prefix))

    def listed(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Yields name and length of the objects that start with ``prefix`` and are not expired."""
        ttl_s = self.config.ttl_s
        for name, nbytes, age_s in self._listing(prefix):
            if ttl_s is None or age_s < ttl_s:
                yield name, nbytes

    def _listing(self, prefix: str) -> Iterator[tuple[str, int, float]]:
        """Yields names, lengths and ages in seconds; one request for a thousand objects."""
        start = len(self.config.prefix)
        token: dict[str, str] = {}
        while True:
            with self._control("ListObjectsV2"):
                page = self.endpoint.client.list_objects_v2(
                    Bucket=self.config.bucket, Prefix=self.config.prefix + prefix, **token
                )
            now_s = now_at_store(page["ResponseMetadata"]["HTTPHeaders"])
            for entry in page.get("Contents", ()):
                age_s = now_s - int(entry["LastModified"].timestamp())
                yield entry["Key"][start:], entry["Size"], age_s
            if not page.get("IsTruncated"):
                return
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def create_bucket(self) -> None:
        """Creates the bucket; succeeds if another process has just created it."""
        region = self.endpoint.region
        where = {"CreateBucketConfiguration": {"LocationConstraint": region}}
        with self._control("CreateBucket", allowed="BucketAlreadyOwnedByYou"):
            self.endpoint.client.create_bucket(
                Bucket=self.config.bucket, **(where if region != "us-east-1" else {})
            )

    # Below: one request

    def _request(
        self,
        method: str,
        name: str,
        *,
        query: str = "",
        headers: Mapping[str, str] | None = None,
        body: Page = (),
        choose: Choose = new_memory,
    ) -> Answer | None:
        """Sends a request, and again while the store is busy; None if the object is absent."""
        target = self.endpoint.path + self.config.prefix + name + query
        give_up_at = time.monotonic() + self.config.retry_s
        for attempt in itertools.count():
            answer = self._exchange(method, target, headers or {}, body, choose)
            if answer.status < 300 or answer.status == NOT_IN_RANGE:
                return answer
            text = bytes(answer.body[0]) if answer.body else b""
            region = answer.headers.get("x-amz-bucket-region")
            refusal = parse_refusal(answer.status, text, region)
            if refusal.code in ABSENT:
                return None
            if refusal.code in BUSY:
                self._counts.add(slow_downs=1)
                pause_s = _FIRST_PAUSE_S * 2**attempt * random.uniform(0.5, 1.0)
                if time.monotonic() + pause_s < give_up_at:
                    time.sleep(pause_s)
                    continue
            raise self._refused(refusal, f"{method} {name}")
        raise AssertionError("unreachable")

    def _exchange(
        self, method: str, target: str, headers: Mapping[str, str], body: Page, choose: Choose
    ) -> Answer:
        try:
            signed = self.endpoint.signed(method, target, headers)
            return self._connections.exchange(method, target, signed, body, choose)
        except (BackendTimeout, BackendUnavailable):
            raise
        except OSError as error:
            raise lost(error, f"{self._where}, {method}") from error
        except BotoCoreError as error:
            raise self._of_botocore(error, method) from None

    def _store_in_parts(self, name: str, page: Page) -> None:
        """Uploads the parts in parallel; the object appears when the upload is completed."""
        client = self.endpoint.client
        where = {"Bucket": self.config.bucket, "Key": self.config.prefix + name}
        extra: dict[str, str] = {}
        if self.config.sse:
            extra["ServerSideEncryption"] = self.config.sse
        if self.config.sse_kms_key_id:
            extra["SSEKMSKeyId"] = self.config.sse_kms_key_id
        with self._control("CreateMultipartUpload"):
            upload = client.create_multipart_upload(**where, **extra)["UploadId"]
        parts = split_page(page, self.config.part_nbytes)
        tags = [""] * len(parts)

        def send(n: int) -> None:
            query = f"?partNumber={n + 1}&uploadId={quote(upload, safe='')}"
            answer = self._request("PUT", name, query=query, body=parts[n])
            tags[n] = answer.headers.get("etag", "") if answer else ""

        try:
            self.threads.run(send, range(len(parts)))
            listed = [{"PartNumber": n + 1, "ETag": tag} for n, tag in enumerate(tags)]
            with self._control("CompleteMultipartUpload"):
                client.complete_multipart_upload(
                    **where, UploadId=upload, MultipartUpload={"Parts": listed}
                )
        except BaseException:
            # Parts that are left cost money; if this fails, a lifecycle rule must delete them.
            with contextlib.suppress(BotoCoreError, ClientError):
                client.abort_multipart_upload(**where, UploadId=upload)
            raise

    # Below: errors

    @contextlib.contextmanager
    def _control(self, action: str, allowed: str = "") -> Iterator[None]:
        """Translates the errors of boto3's client in the block to ``BackendError``."""
        try:
            yield
        except ClientError as error:
            said = error.response.get("Error", {})
            if said.get("Code") == allowed:
                return
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            refusal = Refusal(status, str(said.get("Code")), str(said.get("Message", "")))
            raise self._refused(refusal, action) from None
        except BotoCoreError as error:
            raise self._of_botocore(error, action) from None

    def _refused(self, refusal: Refusal, action: str) -> Exception:
        return refused(refusal, f"{self._where}, {action}", self.endpoint.secrets())

    def _of_botocore(self, error: BotoCoreError, action: str) -> Exception:
        text = shown(f"{self._where}, {action}: {error}", self.endpoint.secrets())
        if isinstance(error, (ReadTimeoutError, ConnectTimeoutError)):
            return BackendTimeout(text)
        if isinstance(error, EndpointConnectionError):
            return BackendUnavailable(f"{text}; check endpoint_url and the server")
        return BackendUnavailable(text)


def total_nbytes(answer: Answer) -> int:
    """Returns the length of the object of which ``answer`` has the body or a part of it."""
    if answer.status == NOT_IN_RANGE:
        return 0
    whole = answer.headers.get("content-range", "").rpartition("/")[2]
    return int(whole if whole.isdecimal() else answer.headers.get("content-length", "0"))


def split_page(page: Page, limit_nbytes: int) -> list[Page]:
    """Cuts ``page`` into parts of ``limit_nbytes``, the last one shorter; copies nothing."""
    parts: list[list[memoryview]] = [[]]
    room = limit_nbytes
    for segment in page:
        start = 0
        while start < segment.nbytes:
            if not room:
                parts.append([])
                room = limit_nbytes
            piece = segment[start : start + room]
            parts[-1].append(piece)
            start += piece.nbytes
            room -= piece.nbytes
    return [tuple(part) for part in parts]


__all__ = ["Counts", "Head", "Objects", "split_page", "total_nbytes"]
