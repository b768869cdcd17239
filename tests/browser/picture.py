"""``python -m tests.browser.picture URL FILE``: how a page looks in headless Chromium, as PNG."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from tests.browser.chromium import Chromium

WIDTH = 1200
SETTLED_S = 2.0


def main() -> None:
    """Takes the picture once the page has had time to ask for its data."""
    url, file = sys.argv[1:]
    with tempfile.TemporaryDirectory() as profile:
        browser = Chromium(Path(profile))
        try:
            browser.open(url, width=WIDTH)
            time.sleep(SETTLED_S)
            browser.screenshot(Path(file))
        finally:
            browser.close()


if __name__ == "__main__":
    main()
