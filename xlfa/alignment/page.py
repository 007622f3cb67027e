"""Alignments as one self-contained page: the plan as a table, its links as lines, and a strip from hard to uniform."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np

from xlfa.alignment.aligner import Alignment
from xlfa.alignment.fonts import is_right_to_left
from xlfa.alignment.heatmap import NULL, check_alignments, describe, largest_mass, plan_masses
from xlfa.files import write_text

TEMPLATE = Path(__file__).parent / "page.html"
# Shares of the largest mass: from here on text is light on dark; below, no line is drawn.
DARK, FAINTEST_LINE = 0.6, 0.05
# More columns have no room for numbers; they stay in what appears on hovering and in what is read aloud.
MOST_COLUMNS_WITH_NUMBERS = 16
# Unicode's marks around text of unknown direction.
ISOLATE, END_ISOLATE = "\u2068", "\u2069"


@dataclass(frozen=True)
class Cell:
    """A pair of words, or a word and what is left of its mass.

    Attributes:
        share: of the largest mass, 0 to 1.
        number: the mass in per cent, empty where it rounds to 0.
        hint: words and mass, shown on hovering.
    """

    share: float
    number: str
    hint: str

    @property
    def is_dark(self) -> bool:
        return self.share > DARK


@dataclass(frozen=True)
class Line:
    """A link between the middles of two rows."""

    source: float
    target: float
    cell: Cell


def write_page(alignments: dict[str, Alignment], path: Path) -> None:
    """Write the first plan as a table and as lines between words, and a strip of the others, one scale for all.

    The page loads nothing, runs nothing, and follows the reader's light or dark mode.

    Args:
        alignments: title → plan, all of the same words.

    Raises:
        XLFAError: if there is no plan, a sentence has no words, or plans are of different words.
    """
    write_text(path, render(alignments))


def render(alignments: dict[str, Alignment]) -> str:
    """The page; every text in it is escaped. Arguments and errors as of `write_page`."""
    first = check_alignments(alignments)
    masses = plan_masses(alignments)
    largest = largest_mass(masses)
    rows, columns = masses[0].shape
    cells = _cells(first, masses[0], largest)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        rows=[*first.source, NULL][:rows],
        columns=[*first.target, NULL][:columns],
        cells=cells,
        words=(first.source, first.target),
        lines=list(_lines(cells, len(first.source), len(first.target))),
        titles=[(title, describe(own)) for title, own in alignments.items()],
        shares=[np.nan_to_num(own / largest) for own in masses],
        backwards=is_right_to_left(first.target),
        with_numbers=columns <= MOST_COLUMNS_WITH_NUMBERS,
    )


def _cells(alignment: Alignment, masses: np.ndarray, largest: float) -> list[list[Cell | None]]:
    """By row and column; none in the corner of the words without a partner."""
    sources = [f"{ISOLATE}{word}{END_ISOLATE}" for word in [*alignment.source, "unmatched"]]
    targets = [f"{ISOLATE}{word}{END_ISOLATE}" for word in [*alignment.target, "unmatched"]]
    return [
        [
            None
            if np.isnan(mass)
            else Cell(mass / largest, _number(mass), f"{source} – {target}: {100 * mass:.3g} % of the mass")
            for target, mass in zip(targets, row)
        ]
        for source, row in zip(sources, masses)
    ]


def _number(mass: float) -> str:
    text = f"{100 * mass:.1f}"
    return "" if text == "0.0" else text


def _lines(cells: list[list[Cell | None]], sources: int, targets: int) -> Iterator[Line]:
    """Faint ones first, so that strong ones lie above them."""
    pairs = [(row, column) for row in range(sources) for column in range(targets)]
    for row, column in sorted(pairs, key=lambda pair: cells[pair[0]][pair[1]].share):
        if cells[row][column].share >= FAINTEST_LINE:
            yield Line(row + 0.5, column + 0.5, cells[row][column])
