"""Pictures of alignments: the plan between words as a heat map, and a strip of plans from hard to uniform.

Words stand on both axes in their own script and direction: the source from top to bottom, the target from left to right
or, where it is written so, from right to left. Every plan of a figure has the same scale of colours.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextToPath

from xlfa.alignment.aligner import Alignment
from xlfa.alignment.fonts import Label, is_right_to_left, make_labels
from xlfa.errors import XLFAError
from xlfa.files import replacing

INK, MUTED, FAINT, PAPER = "#1f2328", "#59636e", "#8c959f", "#fffffe"
# One hue from light to dark: in order for readers with a colour-vision deficiency, and in print.
COLOURS = "Blues"
STYLE = {
    **{"text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT, "xtick.color": INK, "ytick.color": INK},
    **{"figure.facecolor": PAPER, "axes.facecolor": PAPER, "savefig.facecolor": PAPER, "savefig.dpi": 150},
    **{"text.parse_math": False, "svg.fonttype": "path", "svg.hashsalt": "xlfa"},
}
# By format; without what would make the same figure another file tomorrow.
METADATA = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}, ".pdf": {"CreationDate": None}}
NULL = "∅"
# A share of the mass that cannot be seen: without more of it unmatched, no row and column are drawn for it.
NO_MASS = 1e-4

# Inches.
MARGIN, PAD, GAP = 0.12, 0.06, 0.25
LARGEST_CELL, SMALLEST_CELL = 0.44, 0.15
PREFERRED_MAP, LARGEST_MAP = 7.0, 30.0
BAR_WIDTH, BAR_LABELS, LEAST_BAR = 0.14, 0.6, 1.4
PANEL, LEAST_PANEL = 1.15, 0.1
# Points, and points in an inch.
LARGEST_FONT, SMALL_FONT, POINTS = 10.0, 8.0, 72
LINE_HEIGHT = 1.4
# Degrees, of labels that are wider than their column, and what that leaves of a length across and upwards.
SLANT, SLANTED = 45, math.sqrt(0.5)
PANELS_IN_NARROW_FIGURE = 4
# Of a panel's width in the map's: a strip does not outdo the map of a short sentence.
LARGEST_SHARE = 0.6
LONGEST_TITLE = 40


def draw_alignment(alignments: dict[str, Alignment], path: Path) -> None:
    """Draw `figure(alignments)` into a file, the same bytes for the same plans.

    Args:
        path: ends in `.png`, `.svg` or `.pdf`.

    Raises:
        XLFAError: for another format, or as `figure` does.
    """
    check_format(path)
    drawn = figure(alignments)
    with matplotlib.rc_context(STYLE), replacing(path) as temporary:
        drawn.savefig(temporary, metadata=METADATA[Path(path).suffix.lower()])


def check_format(path: Path) -> None:
    """Raise `XLFAError` for a file that a picture is not written to by its ending."""
    if Path(path).suffix.lower() not in METADATA:
        raise XLFAError(
            f"{path}: a picture of an alignment is one of {' '.join(METADATA)}; give the file such an ending"
        )


def figure(alignments: dict[str, Alignment]) -> Figure:
    """The heat map of the first plan, and below it a strip of the others.

    Where plans are unbalanced, a last row and column hold the mass that words keep for themselves.

    Args:
        alignments: title → plan, all of the same words.

    Returns:
        A figure that pyplot knows nothing of.

    Raises:
        XLFAError: if there is no plan, a sentence has no words, or plans are of different words.
    """
    first = check_alignments(alignments)
    masses = plan_masses(alignments)
    largest = largest_mass(masses)
    rows, columns = masses[0].shape
    titles = [make_labels([title], LONGEST_TITLE)[0] for title in alignments]
    descriptions = [make_labels([describe(own)], LONGEST_TITLE)[0] for own in alignments.values()]
    sheet = _Sheet(
        rows=make_labels([*first.source, NULL][:rows]),
        columns=make_labels([*first.target, NULL][:columns]),
        titles=list(zip(titles, descriptions)),
        backwards=is_right_to_left(first.target),
    )
    with matplotlib.rc_context(STYLE):
        return sheet.draw(masses, largest, with_null=rows > len(first.source))


def check_alignments(alignments: dict[str, Alignment]) -> Alignment:
    """The first of plans that can be drawn together.

    Raises:
        XLFAError: if there is no plan, a sentence has no words, or plans are of different words.
    """
    if not alignments:
        raise XLFAError("there is no alignment to draw: give at least one")
    first, *_ = alignments.values()
    for side, words in (("source", first.source), ("target", first.target)):
        if not words:
            raise XLFAError(f"the {side} sentence has no words: there is no alignment to draw")
    for title, other in alignments.items():
        if (other.source, other.target) != (first.source, first.target):
            raise XLFAError(f"the plan {title!r} is of other words than the first: draw it in a picture of its own")
    return first


def plan_masses(alignments: dict[str, Alignment]) -> list[np.ndarray]:
    """The masses of the word pairs, with a last row and column of unmatched mass if any of the plans has such."""
    unmatched = np.concatenate([part for own in alignments.values() for part in (own.null_source, own.null_target)])
    if unmatched.max() < NO_MASS:
        return [own.weights for own in alignments.values()]
    nothing = np.full((1, 1), np.nan)
    return [
        np.block([[own.weights, own.null_source[:, None]], [own.null_target[None], nothing]])
        for own in alignments.values()
    ]


def largest_mass(masses: Sequence[np.ndarray]) -> float:
    """The end of the scale that all plans share."""
    return max(float(np.nanmax(each)) for each in masses) or 1.0


def describe(alignment: Alignment) -> str:
    """How sharp the plan is, and whether it can be relied on."""
    return f"perplexity {alignment.perplexity:.1f}" + ("" if alignment.converged else ", not converged")


class _Sheet:
    """Where everything stands, in inches from the upper left corner, so that labels of any length have room."""

    def __init__(
        self, rows: list[Label], columns: list[Label], titles: list[tuple[Label, Label]], backwards: bool
    ) -> None:
        self.rows, self.columns, self.titles, self.backwards = rows, columns, titles, backwards
        longest = max(len(rows), len(columns))
        self.cell = min(LARGEST_CELL, max(SMALLEST_CELL, PREFERRED_MAP / longest), LARGEST_MAP / longest)
        # Not every word of a very long sentence has room for its label.
        self.step = math.ceil(SMALLEST_CELL / self.cell)
        self.font = min(LARGEST_FONT, 0.6 * self.step * self.cell * POINTS)
        self.map_width, self.map_height = self.cell * len(columns), self.cell * len(rows)
        self._place_map()
        self._place_strip()

    def _place_map(self) -> None:
        widest = max(_width(label, self.font) for label in self.columns)
        self.slanted = widest > 0.9 * self.cell
        header = SLANTED * (widest + _line(self.font)) if self.slanted else _line(self.font)
        overhang = SLANTED * widest if self.slanted else 0.0
        self.left = MARGIN + max(_width(label, self.font) for label in self.rows) + PAD
        self.top = MARGIN + 2 * _line(LARGEST_FONT) + PAD + header + PAD
        self.width = self.left + self.map_width + max(overhang, GAP + BAR_WIDTH + BAR_LABELS) + MARGIN
        self.bar_height = max(self.map_height, LEAST_BAR)
        self.height = self.top + max(self.map_height + self.backwards * (PAD + _line(SMALL_FONT)), self.bar_height)

    def _place_strip(self) -> None:
        shrink = min(LARGEST_SHARE, PANEL / max(self.map_width, self.map_height))
        self.panel_width = max(LEAST_PANEL, shrink * self.map_width)
        self.panel_height = max(LEAST_PANEL, shrink * self.map_height)
        texts = [_width(label, SMALL_FONT) for title in self.titles[1:] for label in title]
        self.pitch = GAP + max([self.panel_width, *texts])
        panels = len(self.titles) - 1
        fitting = max(int((self.width - 2 * MARGIN + GAP) / self.pitch), PANELS_IN_NARROW_FIGURE)
        panel_rows = math.ceil(panels / fitting)
        self.panels_in_a_row = math.ceil(panels / panel_rows) if panels else 0
        self.strip_top = self.height + GAP
        self.row_height = 2 * _line(SMALL_FONT) + PAD + self.panel_height + GAP
        if panels:
            self.height = self.strip_top + panel_rows * self.row_height - GAP
        widest_title = max(_width(label, LARGEST_FONT) for label in self.titles[0])
        self.width = max(self.width, 2 * MARGIN + max(widest_title, self.panels_in_a_row * self.pitch - GAP))
        self.height += MARGIN

    def draw(self, masses: list[np.ndarray], largest: float, with_null: bool) -> Figure:
        figure = Figure(figsize=(self.width, self.height))
        self._title(figure, self.titles[0], MARGIN, MARGIN, LARGEST_FONT)
        axes = self._axes(figure, self.left, self.top, self.map_width, self.map_height)
        mesh = self._map(axes, masses[0], largest, edgecolors=f"{FAINT}40", linewidth=0.4)
        self._label(axes)
        if with_null:
            axes.axvline(len(self.columns) - 1, color=FAINT, linewidth=1.2)
            axes.axhline(len(self.rows) - 1, color=FAINT, linewidth=1.2)
        self._bar(figure, mesh)
        for number, (title, own) in enumerate(zip(self.titles[1:], masses[1:])):
            row, column = divmod(number, self.panels_in_a_row)
            x, y = MARGIN + column * self.pitch, self.strip_top + row * self.row_height
            self._title(figure, title, x, y, SMALL_FONT)
            y += 2 * _line(SMALL_FONT) + PAD
            panel = self._axes(figure, x, y, self.panel_width, self.panel_height)
            # Without edges, viewers of vector graphics show seams between the cells.
            self._map(panel, own, largest, edgecolors="face", linewidth=0.3)
            panel.set(xticks=[], yticks=[])
        return figure

    def _axes(self, figure: Figure, x: float, y: float, width: float, height: float) -> Axes:
        bottom = self.height - y - height
        return figure.add_axes(
            (x / self.width, bottom / self.height, width / self.width, height / self.height), facecolor=PAPER
        )

    def _title(self, figure: Figure, title: tuple[Label, Label], x: float, y: float, font: float) -> None:
        for label, colour in zip(title, (INK, MUTED)):
            place = (x / self.width, 1 - y / self.height)
            figure.text(*place, label.text, family=label.families, size=font, color=colour, va="top")
            y += _line(font)

    def _map(self, axes: Axes, masses: np.ndarray, largest: float, **options: object) -> QuadMesh:
        mesh = axes.pcolormesh(np.ma.masked_invalid(100 * masses), cmap=COLOURS, vmin=0, vmax=100 * largest, **options)
        axes.invert_yaxis()
        if self.backwards:
            axes.invert_xaxis()
        axes.spines[:].set_linewidth(0.6)
        return mesh

    def _label(self, axes: Axes) -> None:
        axes.tick_params(length=0, pad=POINTS * PAD, top=True, labeltop=True, bottom=False, labelbottom=False)
        for axis, labels in ((axes.xaxis, self.columns), (axes.yaxis, self.rows)):
            shown = range(0, len(labels), self.step)
            axis.set_ticks([place + 0.5 for place in shown], [labels[place].text for place in shown])
            for text, place in zip(axis.get_ticklabels(), shown):
                text.set(family=labels[place].families, size=self.font, parse_math=False)
        for text in axes.get_xticklabels():
            text.set_va("baseline")
            if self.slanted:
                text.set(rotation=SLANT, ha="left", rotation_mode="anchor")
        if self.backwards:
            (hint,) = make_labels(["← from right to left"])
            axes.set_xlabel(hint.text, size=SMALL_FONT, color=MUTED, family=hint.families)

    def _bar(self, figure: Figure, mesh: QuadMesh) -> None:
        axes = self._axes(figure, self.left + self.map_width + GAP, self.top, BAR_WIDTH, self.bar_height)
        bar = figure.colorbar(mesh, cax=axes)
        families = self.titles[0][1].families
        bar.set_label("share of the mass, %", size=SMALL_FONT, family=families)
        bar.outline.set_visible(False)
        axes.tick_params(labelsize=SMALL_FONT, labelfontfamily=families, color=FAINT)


def _width(label: Label, font: float) -> float:
    """Of the label's text in inches."""
    properties = FontProperties(family=label.families, size=font)
    return TextToPath().get_text_width_height_descent(label.text, properties, ismath=False)[0] / POINTS


def _line(font: float) -> float:
    """The height of a line in inches."""
    return LINE_HEIGHT * font / POINTS
