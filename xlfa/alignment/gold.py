"""Word alignments drawn by people: Pharaoh files, and data sets with words and links."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from xlfa.alignment.formats import PharaohLinks, read_pharaoh
from xlfa.alignment.pairs import parse_pair, reading_lines
from xlfa.data import held_configurations, load_rows
from xlfa.errors import XLFAError

WordPair = tuple[list[str], list[str]]

DATASET, SPLIT, COLUMNS = "local/word-alignment", "test", ("source", "target", "alignment")
# Sure links among those of `alignment`; only the embedded sample tells them apart.
SURE_COLUMN = "sure"
SOURCE_LANGUAGE = "en"
# Of the embedded sample; the mirror has four of them.
TARGET_LANGUAGES = ("ar", "de", "es", "fr", "hi", "ro", "ru", "th", "zh")


@dataclass(frozen=True)
class GoldSet:
    """Sentence pairs with the links that people drew.

    Attributes:
        name: a configuration such as `en-fr`, or a file's name.
        links: of each sentence pair, positions from 0.
        pairs: the words of each sentence pair; None where only the links are known.
        languages: ISO 639-1 codes of source and target, None where the script decides.
    """

    name: str
    links: list[PharaohLinks]
    pairs: list[WordPair] | None = None
    languages: tuple[str | None, str | None] = (None, None)

    @property
    def told_apart(self) -> bool:
        """Whether there are possible links beside the sure ones."""
        return any(each.possible != each.sure for each in self.links)


def load_gold(
    dataset: str = DATASET,
    data_root: str | None = None,
    languages: Iterable[str] | None = None,
    max_examples: int | None = None,
) -> list[GoldSet]:
    """A gold set for each language that is aligned with English, from the configurations `en-<language>`.

    Args:
        dataset: with the columns `source` and `target` (words), `alignment` ([source, target] positions from 0) and,
            where sure links are told apart, `sure` (those of them).
        data_root: see `xlfa.data.load_rows`.
        languages: ISO 639-1 codes; by default all of `TARGET_LANGUAGES` that are there.
        max_examples: the first that many pairs of each.

    Raises:
        XLFAError: for a language that is not there, words or links of another form, a link outside its sentences, and
            as `load_rows`.
    """
    if languages is None:
        configs = held_configurations(dataset, [f"{SOURCE_LANGUAGE}-{code}" for code in TARGET_LANGUAGES], data_root)
    else:
        configs = [f"{SOURCE_LANGUAGE}-{code}" for code in dict.fromkeys(languages)]
    return [_load_set(dataset, config, data_root, max_examples) for config in configs]


def _load_set(dataset: str, config: str, data_root: str | None, max_examples: int | None) -> GoldSet:
    rows = load_rows(dataset, config, SPLIT, data_root, COLUMNS)
    links, pairs = [], []
    for number, row in enumerate(islice(rows, max_examples), start=1):
        place = f"{dataset} ({config}, {SPLIT}), pair {number}"
        pair = _as_words(row, "source", place), _as_words(row, "target", place)
        possible = _as_links(row, "alignment", place)
        sure = _as_links(row, SURE_COLUMN, place) if SURE_COLUMN in rows.column_names else possible
        if not sure <= possible:
            raise XLFAError(f"{place}: {min(sure - possible)} is in {SURE_COLUMN!r} and not in 'alignment'")
        _check_range(possible, pair, place)
        links.append(PharaohLinks(sure, possible))
        pairs.append(pair)
    return GoldSet(config, links, pairs, tuple(config.split("-")))


def _as_words(row: dict[str, Any], column: str, place: str) -> list[str]:
    words = row[column]
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise XLFAError(f"{place}: {column!r} must be a list of words such as ['a', 'cat'], not {words!r:.80}")
    return words


def _as_links(row: dict[str, Any], column: str, place: str) -> frozenset[tuple[int, int]]:
    links = row[column]
    if not isinstance(links, list) or not all(_is_link(link) for link in links):
        raise XLFAError(
            f"{place}: {column!r} must be a list of positions such as [[0, 0], [1, 2]] (source, target), not "
            f"{links!r:.80}"
        )
    return frozenset(map(tuple, links))


def _is_link(link: Any) -> bool:
    return isinstance(link, list) and len(link) == 2 and all(isinstance(position, int) for position in link)


def read_gold(path: Path, index_base: int = 0, sentences: str | None = None) -> GoldSet:
    """A gold set from a Pharaoh file, with sure (`0-0`) and possible (`0?0`, `0p0`) links, a sentence pair a line.

    Args:
        index_base: the position of the first word in the file, 0 or 1.
        sentences: see `read_word_pairs`.

    Raises:
        XLFAError: for a file that cannot be read or is empty, a malformed line, a position outside the sentence, and
            another number of sentences than of lines; it names file and line.
    """
    links = []
    for number, each in enumerate(read_pharaoh(path), start=1):
        if index_base and any(0 in link for link in each.possible):
            raise XLFAError(f"{path}, line {number}: position 0 in a file that counts from 1: leave out --index_base 1")
        links.append(PharaohLinks(_shifted(each.sure, index_base), _shifted(each.possible, index_base)))
    if not links:
        raise XLFAError(f"{path} is empty: it needs a line such as '0-0 1-2' for each sentence pair")
    if sentences is None:
        return GoldSet(Path(path).name, links)
    pairs = read_word_pairs(sentences)
    if len(pairs) != len(links):
        raise XLFAError(f"{path} has {len(links)} lines and {sentences} {len(pairs)}: line by line they are one pair")
    for number, (each, pair) in enumerate(zip(links, pairs), start=1):
        _check_range(each.possible, pair, f"{path}, line {number}", index_base)
    return GoldSet(Path(path).name, links, pairs)


def _shifted(links: frozenset[tuple[int, int]], index_base: int) -> frozenset[tuple[int, int]]:
    return frozenset((source - index_base, target - index_base) for source, target in links)


def read_hypothesis(path: Path, gold: GoldSet) -> list[frozenset[tuple[int, int]]]:
    """The proposed links of each sentence pair of a gold set, from a Pharaoh file with positions from 0.

    Raises:
        XLFAError: for a file that cannot be read, a malformed line, possible links, a position outside the sentence
            where the gold set has sentences, and another number of lines; it names file and line.
    """
    proposed = []
    for number, each in enumerate(read_pharaoh(path), start=1):
        place = f"{path}, line {number}"
        if each.possible != each.sure:
            raise XLFAError(f"{place} has possible links (0?0, 0p0): only gold has these; write 0-0")
        if gold.pairs is not None and number <= len(gold.pairs):
            _check_range(each.sure, gold.pairs[number - 1], place)
        proposed.append(each.sure)
    if len(proposed) != len(gold.links):
        raise XLFAError(
            f"{path} has {len(proposed)} lines and {gold.name} {len(gold.links)}: write one for each sentence pair, an "
            "empty one where nothing is linked"
        )
    return proposed


def read_word_pairs(path: str) -> list[WordPair]:
    """Sentence pairs with a tab between the two; words are what stands between blanks, as gold positions count them.

    Raises:
        XLFAError: for a file that cannot be read and a malformed line, with its number.
    """
    pairs = []
    with reading_lines(path) as lines:
        for number, line in enumerate(lines, start=1):
            try:
                source, target = parse_pair(line)
            except XLFAError as error:
                raise XLFAError(f"{path}, line {number}: {error}") from None
            pairs.append((source.split(), target.split()))
    return pairs


def _check_range(links: Iterable[tuple[int, int]], pair: WordPair, place: str, index_base: int = 0) -> None:
    """Nothing, for links within the sentences.

    Raises:
        XLFAError: otherwise; positions are named as the file counts them.
    """
    for link in sorted(links):
        for side, position, words in zip(("source", "target"), link, pair):
            if not 0 <= position < len(words):
                raise XLFAError(
                    f"{place}: no {side} word {position + index_base}, there are {len(words)}, counted from "
                    f"{index_base}: correct the link, or see --index_base"
                )
