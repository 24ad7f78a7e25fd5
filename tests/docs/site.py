"""The chapters as a site with search: `python -m tests.docs.site [FOLDER]`, by Sphinx, MyST and Furo.

    README.md          -> the home page; its table of chapters is the order of the site
    docs/*.md          -> one page each; pages that the table does not name are reference
    README.zh-CN.md    -> the home of the Chinese chapters, docs/zh/*.md, in the order of its table
    other links -> the source on GitHub, where GITHUB_REPOSITORY names the repository; else their text alone

A link that leads nowhere, a page that nothing leads to and a heading that skips a level are errors.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from sphinx.application import Sphinx
from sphinx.errors import SphinxError

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
CHAPTER = re.compile(r"^\| \[[^]]*\]\(docs/([^)]*)\.md\)", re.MULTILINE)
HOMES = {"README.md": "index.md", "README.zh-CN.md": "zh/index.md"}
TREE = "\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{pages}\n```\n"
SETTINGS = {
    "project": "distributed-training-cookbook",
    "extensions": ["myst_parser"],
    "html_theme": "furo",
    "html_title": "distributed-training-cookbook",
    "html_copy_source": False,
    "html_show_copyright": False,
    "myst_heading_anchors": 4,
    # Drawings in plain characters stand in blocks that are no language.
    "highlight_language": "none",
}


def stage(folder: Path) -> None:
    """Put the pages as Sphinx reads them into `folder`."""
    shutil.copytree(DOCS, folder, dirs_exist_ok=True)
    for page in folder.glob("**/*.md"):
        own = DOCS / page.relative_to(folder)
        page.write_text(LINK.sub(_leading(own.parent, own.parent), own.read_text()))
    readme = (ROOT / "README.md").read_text()
    chapters = CHAPTER.findall(readme)
    others = sorted(str(page.relative_to(DOCS).with_suffix("")) for page in DOCS.glob("*.md"))
    trees = {"Chapters": chapters, "Reference": [page for page in others if page not in chapters]}
    if (ROOT / "README.zh-CN.md").exists():
        _stage_chinese(folder)
        trees["中文"] = ["zh/index"]
    home = LINK.sub(_leading(ROOT, DOCS), readme)
    home += "".join(TREE.format(caption=caption, pages="\n".join(pages)) for caption, pages in trees.items())
    (folder / "index.md").write_text(home)


def _stage_chinese(folder: Path) -> None:
    readme = (ROOT / "README.zh-CN.md").read_text()
    chapters = [name.removeprefix("zh/") for name in CHAPTER.findall(readme) if name.startswith("zh/")]
    home = LINK.sub(_leading(ROOT, DOCS / "zh"), readme)
    home += TREE.format(caption="中文", pages="\n".join(chapters))
    (folder / "zh" / "index.md").write_text(home)


def _leading(here: Path, place: Path) -> Callable[[re.Match[str]], str]:
    """For a page of folder `here`, staged as one of `place`: each link as the site has it."""

    def link(found: re.Match[str]) -> str:
        target = found["target"]
        if "://" in target or target.startswith("mailto:"):
            return found[0]
        path = (here / target).resolve()
        if path.parent == ROOT and path.name in HOMES:
            target = os.path.relpath(DOCS / HOMES[path.name], place)
        elif path.is_relative_to(DOCS):
            target = os.path.relpath(path, place)
        elif repository := os.environ.get("GITHUB_REPOSITORY"):
            target = f"https://github.com/{repository}/blob/main/{path.relative_to(ROOT)}"
        else:
            return found["text"]
        return f"{found['image']}[{found['text']}]({target}{found['anchor'] or ''})"

    return link


def build(folder: Path) -> None:
    """Write the site into `folder`. Raises SphinxError at the first warning."""
    with TemporaryDirectory() as name:
        staged = Path(name) / "pages"
        stage(staged)
        app = Sphinx(
            srcdir=staged,
            confdir=None,
            outdir=folder,
            doctreedir=Path(name) / "doctrees",
            buildername="html",
            confoverrides=SETTINGS,
            status=None,
            warningiserror=True,
            exception_on_warning=True,
        )
        app.build()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.docs.site", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "build" / "site")
    folder = parser.parse_args(argv).folder
    try:
        build(folder)
    except SphinxError as error:
        print(error, file=sys.stderr)
        return 1
    print(folder / "index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
