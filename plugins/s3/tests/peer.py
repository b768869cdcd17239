"""A second process: reads pages one by one and writes a batch. Run by a test, not by pytest."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from hicache_s3 import S3Backend, S3Config

from hicache_core.types import BackendContext

sys.path.insert(0, str(Path(__file__).parents[3]))

from plugins.s3.tests.world import NAMESPACE, content, filled

request = json.load(sys.stdin)
backend = S3Backend(S3Config(**request["config"]), BackendContext(NAMESPACE))
backend.open()
found = [
    bytes(backend.get(key) or b"") == content(key, request["nbytes"]) for key in request["read"]
]
keys = request["write"]
stored = backend.batch_set(keys, [filled(key, (request["nbytes"],)) for key in keys])
backend.close()
print(sum(found), stored)
