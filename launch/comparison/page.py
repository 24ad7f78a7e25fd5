"""The page of a comparison: comparison.html, which is self-contained, and comparison.md with its pictures."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from configs.errors import EnvironmentProblem
from launch.comparison.figures import draw_losses, draw_speed_and_memory
from launch.comparison.runs import find_reference
from launch.comparison.table import LEGEND, TITLES, memory_by_rank, problems, setting, table
from trainer.html import page
from trainer.html import table as html_table
from trainer.process.files import replace_text
from trainer.report.reading import Run

MADE = "<!-- made by python -m launch compare -->"
HTML, MARKDOWN = "comparison.html", "comparison.md"
RANK_TITLES = ("run", "ranks", "predicted MiB", "measured MiB")
STYLE = "td:nth-child(2) { text-align: left; }"


def write_page(folder: Path, runs: Sequence[Run], *, command: str) -> list[Path]:
    """Write the page of these runs into a folder, replacing an earlier one. Returns its files, the HTML first.

    command: the command that makes the page again. Raises EnvironmentProblem if the files cannot be written, or do not
    belong to an earlier comparison.
    """
    reference = find_reference(runs)
    finished = [run for run in runs if run.problem is None]
    pictures: dict[str, bytes] = {}
    if reference is not None:
        pictures["comparison-loss.png"] = draw_losses(finished, reference)
        pictures["comparison-speed.png"] = draw_speed_and_memory(finished)
    texts = {
        HTML: _html(runs, reference, pictures, command),
        MARKDOWN: f"{MADE}\n# Comparison\n\n{_markdown(runs, reference, list(pictures), command)}\n",
    }
    try:
        for name in texts:
            _check_ours(folder / name)
        for name, picture in pictures.items():
            (folder / name).write_bytes(picture)
        for name, text in texts.items():
            replace_text(folder / name, text)
    except OSError as error:
        raise EnvironmentProblem(
            f"{folder}: the comparison cannot be written ({error.strerror or error}); choose a folder that can"
        ) from None
    return [folder / name for name in (*texts, *pictures)]


def tables(runs: Sequence[Run], reference: Run | None) -> str:
    """The tables and problems as Markdown, without the pictures."""
    parts = [_markdown_table(TITLES, table(runs, reference))]
    by_rank = memory_by_rank(runs)
    if by_rank:
        parts.append(f"Ranks that are not alike:\n\n{_markdown_table(RANK_TITLES, by_rank)}")
    found = list(problems(runs, reference))
    if found:
        parts.append("\n".join(f"- **{line}**" for line in found))
    return "\n\n".join(parts)


def _check_ours(path: Path) -> None:
    if path.exists() and MADE not in path.read_text(errors="replace")[:200]:
        raise EnvironmentProblem(f"{path}: is no comparison of this program; move it away, or choose another folder")


def _markdown(runs: Sequence[Run], reference: Run | None, pictures: Sequence[str], command: str) -> str:
    shared = "\n".join(f"- {line}" for line in setting(runs, reference))
    drawn = "\n\n".join(f"![{Path(name).stem}]({name})" for name in pictures)
    parts = [f"    {command}", shared, tables(runs, reference), LEGEND, drawn]
    return "\n\n".join(part for part in parts if part)


def _markdown_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---", "---", *["---:"] * (len(titles) - 2)], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _html(runs: Sequence[Run], reference: Run | None, pictures: dict[str, bytes], command: str) -> str:
    parts = [f"<h1>Comparison</h1>\n<p><code>{escape(command)}</code></p>"]
    parts.append("<ul>" + "".join(f"<li>{escape(line)}</li>" for line in setting(runs, reference)) + "</ul>")
    parts.append(html_table(TITLES, table(runs, reference)))
    parts += [f'<p class="problem">{escape(line)}</p>' for line in problems(runs, reference)]
    for name, picture in pictures.items():
        content = base64.b64encode(picture).decode()
        parts.append(f'<p><img alt="{escape(Path(name).stem)}" src="data:image/png;base64,{content}"></p>')
    by_rank = memory_by_rank(runs)
    if by_rank:
        parts.append(f"<h2>Ranks that are not alike</h2>{html_table(RANK_TITLES, by_rank)}")
    parts.append(f"<p>{escape(LEGEND)}</p>")
    return page("Comparison", "\n".join(parts), style=STYLE, mark=MADE)
