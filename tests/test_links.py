"""Links of the repository lead somewhere, and the page on the architecture names what is there."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urldefrag

from markdown.extensions.toc import slugify

from scripts import docs_site
from tests.docs_helpers import ROOT, is_elsewhere
from tests.rooms import ORDER

# Links in the repository

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))


def link_targets(text: str) -> list[str]:
    """Return what a page links to within the repository; code left out."""
    prose = re.sub(r"^```.*?^```$|`[^`\n]*`", "`code`", text, flags=re.MULTILINE | re.DOTALL)
    return [url for url in re.findall(r"\]\(([^)\s]+)\)", prose) if not is_elsewhere(url)]


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", path.read_text(), flags=re.MULTILINE)
    return {slugify(re.sub(r"[`*]|\{.*\}$", "", heading), "-") for heading in headings}


def test_relative_links_lead_somewhere() -> None:
    broken, followed = [], 0
    for page in PAGES:
        for url in link_targets(page.read_text()):
            followed += 1
            target, fragment = urldefrag(url)
            path = (page.parent / target).resolve() if target else page
            if path.is_relative_to(ROOT / "docs"):
                # A page of the site that is a file elsewhere.
                path = ROOT / docs_site.PAGES_FROM.get(str(path.relative_to(ROOT / "docs")), path)
            in_reference = path.parent == ROOT / "docs/reference"
            if not path.exists() or (fragment and not in_reference and fragment not in anchors(path)):
                broken.append(f"{page.relative_to(ROOT)}: {url}")
    assert broken == []
    assert followed > 50


# The page on the architecture


def test_the_page_on_the_architecture_lists_the_rooms_in_their_order() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    assert tuple(re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)) == ORDER


def test_the_files_that_the_page_on_the_architecture_names_exist() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    named = [path for path in re.findall(r"`([\w/]+(?:\.py|/))`", page) if "/" in path]
    assert len(named) > 30
    assert [path for path in named if not (ROOT / path).exists()] == []
