"""Alignments as text: Pharaoh lines, JSON objects and tables."""

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xlfa.alignment.aligner import Alignment
from xlfa.alignment.links import Link, null_words
from xlfa.errors import XLFAError

# source-target is a sure link; source?target and sourceptarget are possible ones.
PHARAOH_LINK = re.compile(r"(\d+)([-?p])(\d+)", re.ASCII)


@dataclass(frozen=True)
class PharaohLinks:
    """The links of a sentence pair as (source, target) positions from 0; the sure ones are possible too."""

    sure: frozenset[tuple[int, int]]
    possible: frozenset[tuple[int, int]]


def format_pharaoh(links: Iterable[Link]) -> str:
    """`0-0 1-2 …`, positions of words from 0, sorted."""
    return " ".join(f"{source}-{target}" for source, target in sorted((link.source, link.target) for link in links))


def parse_pharaoh(line: str) -> PharaohLinks:
    """The links of a line; an empty line has none.

    Raises:
        XLFAError: for anything that is no link.
    """
    sure, possible = set(), set()
    for item in line.split():
        match = PHARAOH_LINK.fullmatch(item)
        if match is None:
            raise XLFAError(f"{item!r} is no link: write 0-0 for a sure and 0?0 or 0p0 for a possible one, from 0")
        pair = int(match[1]), int(match[3])
        possible.add(pair)
        if match[2] == "-":
            sure.add(pair)
    return PharaohLinks(frozenset(sure), frozenset(possible))


def read_pharaoh(path: Path) -> Iterator[PharaohLinks]:
    """The links of each line of a file, read line by line.

    Raises:
        XLFAError: for a file that cannot be read, or a line that is no alignment, with its number.
    """
    try:
        with open(path, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    yield parse_pharaoh(line)
                except XLFAError as error:
                    raise XLFAError(f"{path}, line {number}: {error}") from None
    except OSError as error:
        raise XLFAError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise XLFAError(f"{path} is not UTF-8: {error}") from None


def describe_alignment(alignment: Alignment, links: Iterable[Link]) -> dict[str, Any]:
    """An alignment as JSON knows it: words with their masses, links by positions from 0, and how the plan was found."""
    return {
        "source": alignment.source,
        "target": alignment.target,
        "source_mass": alignment.source_mass.tolist(),
        "target_mass": alignment.target_mass.tolist(),
        "links": [{"source": link.source, "target": link.target, "weight": link.weight} for link in links],
        "null_source": alignment.null_source.tolist(),
        "null_target": alignment.null_target.tolist(),
        # JSON has no infinity, the epsilon of the product plan.
        "epsilon": alignment.epsilon if alignment.epsilon < float("inf") else None,
        "perplexity": alignment.perplexity,
        "marginal_error": alignment.marginal_error,
        "converged": alignment.converged,
    }


def format_json(alignment: Alignment, links: Iterable[Link]) -> str:
    """`describe_alignment` on one line."""
    return json.dumps(describe_alignment(alignment, links), ensure_ascii=False, allow_nan=False)


def format_table(alignment: Alignment, links: Iterable[Link]) -> str:
    """A line for each link, then the words without one and how the plan was found.

    The columns are the source word, the target word, the weight in the plan, and the part of the source word's mass
    that this is, in per cent.
    """
    links = list(links)
    rows = [("source", "target", "weight", "share")]
    for link in links:
        share = 100 * link.weight / alignment.source_mass[link.source]
        rows.append(
            (alignment.source[link.source], alignment.target[link.target], f"{link.weight:.4f}", f"{share:.0f}%")
        )
    widths = [max(display_width(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join(
            [_padded(row[0], widths[0]), _padded(row[1], widths[1]), row[2].rjust(widths[2]), row[3].rjust(widths[3])]
        )
        for row in rows
    ]
    null = null_words(alignment)
    sides = (("source", alignment.source, null[0]), ("target", alignment.target, null[1]))
    for side, words, is_null in sides:
        linked = {getattr(link, side) for link in links}
        alone = [
            f"{word} (null)" if is_null[place] else word for place, word in enumerate(words) if place not in linked
        ]
        if alone:
            lines.append(f"{side} words without a link: {' '.join(alone)}")
    lines.append(
        f"epsilon {alignment.epsilon:.4g} (absolute), {alignment.perplexity:.2f} effective links per piece, "
        f"{alignment.weights.sum():.2f} of the mass transported"
    )
    if not alignment.converged:
        lines.append(f"the plan did not converge: its marginals are off by {alignment.marginal_error:.1e}")
    return "\n".join(lines)


def display_width(text: str) -> int:
    """Columns that a terminal gives a text: two for wide characters, none for marks and format characters."""
    return sum(
        0
        if unicodedata.category(character) in ("Mn", "Me", "Cf")
        else 2
        if unicodedata.east_asian_width(character) in "WF"
        else 1
        for character in text
    )


def _padded(text: str, width: int) -> str:
    return text + " " * (width - display_width(text))
