"""Make a data root for PAWS-X with train, validation and test parts out of the mirror, which has validation alone.

Sentences of PAWS-X stand in several pairs. Pairs that share a sentence, in any language, form a group (and so do pairs
that such pairs link); a group is in one part as a whole. Rows without a translation ("NS" in the data) are left out.

    python results/tasks/split_pawsx.py ../shared/hub/datasets runs/tasks/pawsx_root
"""

import argparse
from pathlib import Path

from datasets import Dataset

from xlfa.data import connected_groups, hold_out_groups, load_rows
from xlfa.files import building_folder
from xlfa.tasks import get_task

TASK = get_task("pawsx")
NOT_TRANSLATED = "NS"
# Shares of the groups; training gets the rest.
TEST, VALIDATION = 0.35, 0.1


def read_validation(data_root: str) -> dict[str, Dataset]:
    """The mirror's rows by language, those that every language has, in the same order."""
    rows = {
        code: load_rows(TASK.test_dataset, code, "validation", data_root, TASK.columns) for code in TASK.test_configs
    }
    texts = [rows[code][column] for code in rows for column in TASK.sentence_columns]
    complete = [position for position, found in enumerate(zip(*texts)) if NOT_TRANSLATED not in found]
    if any(rows[code]["id"][:] != rows["en"]["id"][:] for code in rows):
        raise SystemExit("the languages are not parallel: their ids differ")
    return {code: each.select(complete) for code, each in rows.items()}


def split(rows: dict[str, Dataset]) -> dict[str, list[int]]:
    """Positions of the rows by part."""
    groups = connected_groups([each[column][:] for each in rows.values() for column in TASK.sentence_columns])
    rest, test = hold_out_groups(groups, TEST)
    kept, held_out = hold_out_groups([groups[position] for position in rest], VALIDATION)
    return {
        "train": [rest[index] for index in kept],
        "validation": [rest[index] for index in held_out],
        "test": test,
    }


def write_root(folder: Path, rows: dict[str, Dataset], parts: dict[str, list[int]]) -> None:
    """The parts as a folder that `load_dataset` reads: English has all, the other languages the test part."""
    card = ["---", "configs:"]
    with building_folder(folder / TASK.test_dataset) as target:
        for code, each in rows.items():
            card += [f"- config_name: {code}", "  data_files:"]
            for part in parts if code == "en" else ["test"]:
                each.select(parts[part]).to_parquet(target / f"{code}-{part}.parquet")
                card += [f"  - split: {part}", f"    path: {code}-{part}.parquet"]
        (target / "README.md").write_text("\n".join([*card, "---", ""]), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mirror", help="folder with google-research-datasets/paws-x")
    parser.add_argument("root", type=Path, help="folder to make")
    arguments = parser.parse_args()
    rows = read_validation(arguments.mirror)
    parts = split(rows)
    write_root(arguments.root, rows, parts)
    for part, positions in parts.items():
        paraphrases = sum(rows["en"].select(positions)["label"])
        print(f"{part}: {len(positions)} pairs, {100 * paraphrases / len(positions):.1f} % paraphrases")


if __name__ == "__main__":
    main()
