"""Loading data sets: from the Hub, from a local mirror of it, or from the sample that ships with the package."""

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
from datasets import Dataset, get_dataset_config_names, get_dataset_split_names, load_dataset
from datasets.config import HF_DATASETS_CACHE
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.errors import HTTPError

from xlfa.errors import XLFAError
from xlfa.hub_errors import naming_read_errors

logger = logging.getLogger(__name__)


class UnknownConfiguration(XLFAError):
    """A data set that exists has no configuration of that name."""


class UnknownSplit(XLFAError):
    """A configuration that exists has no split of that name."""


# `--data_root sample`: the embedded texts, for trying the tool out.
SAMPLE = "sample"
SAMPLE_ROOT = Path(__file__).parent / "sample_data"


def dataset_location(dataset: str, data_root: str | None) -> str:
    """What `load_dataset` is given for a Hub id: the id, or the folder `data_root`/<org>/<name>.

    Raises:
        XLFAError: if that folder does not exist.
    """
    if data_root is None:
        return dataset
    folder = (SAMPLE_ROOT if data_root == SAMPLE else Path(data_root).expanduser()) / dataset
    if not folder.is_dir():
        raise XLFAError(f"no data set {dataset!r} under --data_root {data_root}: the folder {folder} does not exist")
    return str(folder.resolve())


def load_rows(
    dataset: str, config: str | None, split: str, data_root: str | None = None, columns: tuple[str, ...] = ()
) -> Dataset:
    """One split of a data set, after a check that it has rows and the columns that are needed.

    Args:
        dataset: a Hub id such as `facebook/xnli`.
        config: the configuration, None for the default one.
        split: `train`, `validation` or `test`.
        data_root: a folder laid out as <org>/<name>, or `sample`, instead of the Hub.
        columns: names that must be there.

    Raises:
        XLFAError: if the data set, the configuration, the split or a column does not exist, or the split is empty; also
            where the Hub does not give it.
    """
    location = dataset_location(dataset, data_root)
    place = f"{dataset} ({config or 'default'}, {split})"
    cache_dir = None if data_root is None else folder_cache(Path(location))
    try:
        with naming_read_errors(f"the data set {dataset!r}", location, "there is none on the Hub", "dataset"):
            rows = load_dataset(location, config, split=split, cache_dir=cache_dir)
    except XLFAError as error:
        raise XLFAError(f"{error}; or name a local mirror of it with --data_root") from None
    except RuntimeError as error:
        if "Dataset scripts are no longer supported" not in str(error):
            raise
        raise XLFAError(
            f"the data set {dataset!r} is a script, which datasets no longer runs: name a local mirror of its data "
            "with --data_root"
        ) from None
    except StopIteration:
        # What datasets raises for a JSON file without a line.
        raise XLFAError(f"{place} is empty: there is nothing to train on or score") from None
    except (ValueError, FileNotFoundError, DatasetGenerationError) as error:
        known = _names(get_dataset_config_names, location)
        if known is not None and config is not None and config not in known:
            raise UnknownConfiguration(
                f"{dataset} has no configuration {config!r}; it has: {', '.join(known)}"
            ) from None
        known = _names(get_dataset_split_names, location, config)
        if known is not None and split not in known:
            raise UnknownSplit(
                f"{dataset} ({config or 'default'}) has no split {split!r}; it has: {', '.join(known)}"
            ) from None
        raise XLFAError(f"cannot load {place}: {error.__cause__ or error}") from None
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise XLFAError(f"{place} has no column {', '.join(missing)}; it has: {', '.join(rows.column_names)}")
    if len(rows) == 0:
        raise XLFAError(f"{place} is empty: there is nothing to train on or score")
    return rows


def folder_cache(folder: Path) -> str:
    """A cache folder of datasets for one state of a local folder: its path and its files' names, sizes and times.

    datasets keys the cache of a local folder by its name and its README's configuration alone (seen with 5.2): two
    folders of the same name, or one whose files changed, would silently give the rows that were read first.
    """
    digest = hashlib.sha256(str(folder).encode())
    for path in sorted(folder.rglob("*")):
        status = path.stat()
        digest.update(f"{path.relative_to(folder)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return str(Path(HF_DATASETS_CACHE) / "xlfa" / digest.hexdigest()[:16])


def data_state(dataset: str, data_root: str | None) -> str | None:
    """What tells a local data set from the same one after its files changed; None for one on the Hub."""
    return None if data_root is None else Path(folder_cache(Path(dataset_location(dataset, data_root)))).name


def load_first_split(
    dataset: str, config: str, splits: tuple[str, ...], data_root: str | None = None, columns: tuple[str, ...] = ()
) -> Dataset:
    """`load_rows` of the first of `splits` that the data set has; the rows' `split` names it.

    Raises:
        XLFAError: as `load_rows`; if the data set has none of them.
    """
    for split in splits[:-1]:
        try:
            return load_rows(dataset, config, split, data_root, columns)
        except UnknownSplit as error:
            logger.info("%s; trying the next of %s", error, ", ".join(splits))
    return load_rows(dataset, config, splits[-1], data_root, columns)


def held_configurations(dataset: str, configs: list[str], data_root: str | None) -> list[str]:
    """Those of `configs` that are there: a local folder may hold a part of the data set, the Hub holds all of it.

    Raises:
        XLFAError: if the local folder does not exist or holds none of them.
    """
    known = None if data_root is None else _names(get_dataset_config_names, dataset_location(dataset, data_root))
    held = configs if known is None else [config for config in configs if config in known]
    if not held:
        wanted = ", ".join(dict.fromkeys(configs))
        raise XLFAError(
            f"{dataset} under --data_root {data_root} has no configuration {wanted}; it has: {', '.join(known)}"
        )
    return held


def _names(read: Callable[..., list[str]], *arguments: str | None) -> list[str] | None:
    """What datasets tells of configurations or splits; None where it cannot tell."""
    try:
        return read(*arguments)
    except (ValueError, FileNotFoundError, ConnectionError, HTTPError):
        return None


def connected_groups(columns: list[list[str]]) -> list[str]:
    """The group of each row, by one of its values: rows that share a value, in any column, are in one group, and so are
    those that such rows link."""
    parents: dict[str, str] = {}

    def root(value: str) -> str:
        while parents.setdefault(value, value) != value:
            parents[value] = value = parents[parents[value]]
        return value

    for first, *others in zip(*columns):
        for other in others:
            parents[root(other)] = root(first)
    return [root(value) for value in columns[0]]


def sample_clusters(clusters: list[str], max_examples: int | None, seed: int, flag: str = "max_examples") -> list[int]:
    """Positions of a seeded sample of whole clusters, in their order, at most `max_examples` of them.

    Args:
        clusters: the cluster of each example (a premise, a paragraph).
        max_examples: None for all.
        seed: of the draw of clusters.
        flag: that `max_examples` was given by, for the error.

    Raises:
        XLFAError: if not even the first drawn cluster fits.
    """
    if max_examples is None or max_examples >= len(clusters):
        return list(range(len(clusters)))
    members: dict[str, list[int]] = {}
    for position, cluster in enumerate(clusters):
        members.setdefault(cluster, []).append(position)
    chosen: list[int] = []
    names = list(members)
    for index in np.random.default_rng(seed).permutation(len(names)):
        if len(chosen) + len(members[names[index]]) > max_examples:
            break
        chosen += members[names[index]]
    if not chosen:
        raise XLFAError(f"--{flag} {max_examples} is smaller than one cluster of examples that belong together")
    return sorted(chosen)


def hold_out_groups(groups: list[str], fraction: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Split positions into (kept, held out) so that no group is on both sides; `fraction` of the groups is held out.

    Raises:
        XLFAError: for a single group.
    """
    names = list(dict.fromkeys(groups))
    if len(names) < 2:
        raise XLFAError(
            "the training set has a single group of examples: none is left to train on after the held-out ones"
        )
    order = np.random.default_rng(seed).permutation(len(names))
    held = {names[index] for index in order[: max(1, round(fraction * len(names)))]}
    kept_positions = [position for position, group in enumerate(groups) if group not in held]
    held_positions = [position for position, group in enumerate(groups) if group in held]
    return kept_positions, held_positions
