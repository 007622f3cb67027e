"""The report of a study: one self-contained page, its figures as PNG, its tables as CSV, its numbers as JSON."""

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from xlfa.files import replacing, write_text
from xlfa.study.analysis import analyse
from xlfa.study.conclusions import conclude
from xlfa.study.figures import draw_all
from xlfa.study.grid import PlannedCell
from xlfa.study.results import read_study
from xlfa.study.tables import Table, make_tables

TEMPLATE = Path(__file__).parent / "report.html"
PAGE_FILE = "index.html"
REPORT_FILE = "report.json"
FIGURES_FOLDER = "figures"
TABLES_FOLDER = "tables"


def write_report(folder: Path, output: Path, planned: Sequence[PlannedCell] | None = None) -> Path:
    """Report on what is finished of a study, and say what is missing.

    Figures and tables of an earlier report in `output` that this one does not have are removed.

    Args:
        folder: of the study.
        output: gets `index.html`, `report.json`, `figures/*.png` and `tables/*.csv`, each complete or not there.
        planned: the study's cells; by default all in the folder, and gaps in their grid are what is missing.

    Returns:
        The page.

    Raises:
        XLFAError: if no cell is finished, or cells cannot be read or compared.
    """
    report = analyse(read_study(folder, planned))
    report["statements"] = conclude(report)
    drawings, tables = draw_all(report), make_tables(report)
    images = {}
    for drawing in drawings:
        images[drawing.name] = base64.b64encode(drawing.svg().encode()).decode()
        with replacing(output / FIGURES_FOLDER / f"{drawing.name}.png") as temporary:
            temporary.write_bytes(drawing.png())
    for table in tables:
        write_text(output / TABLES_FOLDER / f"{table.name}.csv", table.csv())
    written = {
        *(f"{FIGURES_FOLDER}/{drawing.name}.png" for drawing in drawings),
        *(f"{TABLES_FOLDER}/{table.name}.csv" for table in tables),
    }
    _remove_outdated(output, written)
    report["files"] = sorted(written)
    write_text(output / REPORT_FILE, json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    page = output / PAGE_FILE
    shown = [table for table in tables if table.on_page]
    write_text(page, render(report, drawings=drawings, images=images, tables=shown))
    return page


def render(report: dict[str, Any], *, drawings: list, images: dict[str, str], tables: list[Table]) -> str:
    """The page; every text in it is escaped.

    Args:
        images: by name of the drawing, an SVG in base64.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["zip"] = zip
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        report=report,
        facts=report["facts"],
        statements=report["statements"],
        drawings=drawings,
        images=images,
        tables=tables,
    )


def _remove_outdated(output: Path, written: set[str]) -> None:
    """Of the files that an earlier report says it wrote, those that this one did not write."""
    try:
        files = json.loads((output / REPORT_FILE).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return
    for name in set(files) - written:
        # Whatever stands in that file, nothing is removed elsewhere.
        if Path(name).parent.as_posix() in (FIGURES_FOLDER, TABLES_FOLDER):
            (output / name).unlink(missing_ok=True)
