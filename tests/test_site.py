"""The chapters as a site: every page is included in the README's order, and a broken link fails the build."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from sphinx.errors import SphinxError

from tests.docs import site

pytestmark = pytest.mark.filterwarnings(
    "ignore:.myst_parser:PendingDeprecationWarning", "ignore:.myst_parser:DeprecationWarning"
)


def test_the_site_has_every_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_REPOSITORY", "somebody/a-fork")
    site.build(tmp_path)
    pages = {page.stem for page in site.DOCS.glob("*.md")}
    chinese = {page.stem for page in site.DOCS.glob("zh/*.md")}
    assert {page.stem for page in tmp_path.glob("*.html")} >= pages | {"index", "search"}
    assert {page.stem for page in tmp_path.glob("zh/*.html")} == chinese | {"index"}
    home = (tmp_path / "index.html").read_text()
    order = re.findall(r'class="toctree-l1"><a class="reference internal" href="([\w-]+)\.html"', home)
    assert order[:3] == ["one-process", "what-fills-memory", "collectives"] and {*order} == pages
    translated = (tmp_path / "zh" / "index.html").read_text()
    assert {
        *re.findall(r'class="toctree-l[12]"><a class="reference internal" href="([\w-]+)\.html"', translated)
    } >= chinese
    assert "https://github.com/somebody/a-fork/blob/main/configs/schema.py" in home
    assert '"nvme":' in (tmp_path / "searchindex.js").read_text()
    written = "".join(page.read_text() for page in tmp_path.glob("*.html"))
    assert not re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"(?:https?:)?//[^\"]*", written)


@pytest.mark.parametrize("link", ["nowhere.md", "page.md#no-such-heading"])
def test_a_broken_link_is_an_error(link: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (tmp_path / "README.md").write_text("# Home\n\n| [Page](docs/page.md) | a page |\n")
    (docs / "page.md").write_text(f"# Page\n\nSee [there]({link}).\n")
    monkeypatch.setattr(site, "ROOT", tmp_path)
    monkeypatch.setattr(site, "DOCS", docs)
    with pytest.raises(SphinxError):
        site.build(tmp_path / "site")
