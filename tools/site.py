"""What ``make site`` adds to the pages of ``docs/``, as hooks of mkdocs.

Pages that lie elsewhere in the repository become pages of the site: the READMEs of the plugins,
the architecture, the changelog, how to contribute. Links between pages lead from one page of the
site to the other. Links to other files lead to the repository, whose URL is in ``PROJECT_URL``;
without it their texts remain, as in a release (``tools/dist.py``).
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
URL = "PROJECT_URL"

ELSEWHERE = {
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",
    **{
        f"plugins/{folder.parent.name}/README.md": f"plugins/{folder.parent.name}.md"
        for folder in ROOT.glob("plugins/*/README.md")
    },
}
"""Pages outside ``docs/``, by their path in the repository, and their path in the site."""

_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def path_in_site(path: str) -> str | None:
    """Where the site has a file of the repository; None if it does not have it.

    Args:
        path: in the repository.
    """
    if path in ELSEWHERE:
        return ELSEWHERE[path]
    inside = path.removeprefix("docs/")
    return inside if path.startswith("docs/") and (ROOT / path).is_file() else None


def linked(text: str, source: str, page: str, url: str) -> str:
    """A page's Markdown with the links that it has on the site.

    Args:
        text: the page.
        source: its path in the repository.
        page: its path in the site.
        url: of the repository, without a slash at the end; empty if it has none.
    """

    def on_site(link: re.Match[str]) -> str:
        picture, words, target = link.groups()
        path, _, anchor = target.partition("#")
        if "://" in target or target.startswith("mailto:") or not path:
            return link[0]
        wanted = posixpath.normpath(str(PurePosixPath(source).parent / path))
        anchor = f"#{anchor}" if anchor else ""
        found = path_in_site(wanted)
        if found is not None:
            target = posixpath.relpath(found, PurePosixPath(page).parent)
        elif url:
            target = f"{url}/blob/main/{wanted}"
        else:
            return "" if picture else words
        return f"{picture}[{words}]({target}{anchor})"

    return _LINK.sub(on_site, text)


def on_files(files: Files, *, config: Any) -> Files:
    """Adds the pages that lie outside ``docs/``; mkdocs calls it.

    Args:
        files: what mkdocs found.
        config: of mkdocs.
    """
    for source, page in ELSEWHERE.items():
        if page != "index.md":  # the site has a home page of its own
            text = (ROOT / source).read_text(encoding="utf-8")
            files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Makes the links of a page those of the site; mkdocs calls it.

    Args:
        markdown: of the page.
        page: as mkdocs has it.
    """
    here = page.file.src_uri
    sources = {at: source for source, at in ELSEWHERE.items() if at != "index.md"}
    source = sources.get(here, f"docs/{here}")
    return linked(markdown, source, here, os.environ.get(URL, "").rstrip("/"))
