"""Data sets that cannot be used end in one XLFAError; samples and hold-outs keep together what belongs together."""

import json
import shutil
from collections import Counter

import datasets
import pytest
from datasets import Dataset

from xlfa.data import (
    SAMPLE_ROOT,
    connected_groups,
    dataset_location,
    held_configurations,
    hold_out_groups,
    load_first_split,
    load_rows,
    sample_clusters,
)
from xlfa.errors import XLFAError

ROWS = [{"premise": "a", "label": 0}, {"premise": "b", "label": 1}]
PREMISES = [f"premise {number // 3}" for number in range(60)]


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def add_dataset(tmp_path):
    """Writes <root>/org/<name> with one file for each configuration and split, and returns the root."""

    def add(name, files):
        folder = tmp_path / "root" / "org" / name
        folder.mkdir(parents=True)
        card = ["---", "configs:"]
        for config, splits in files.items():
            card += [f"- config_name: {config}", "  data_files:"]
            for split, (file_name, write) in splits.items():
                (folder / config).mkdir(exist_ok=True)
                write(folder / config / file_name)
                card += [f"  - split: {split}", f"    path: {config}/{file_name}"]
        (folder / "README.md").write_text("\n".join([*card, "---", ""]))
        return str(tmp_path / "root")

    return add


def text_file(name, text):
    return name, lambda path: path.write_text(text)


def json_file(name, rows):
    return text_file(name, "".join(json.dumps(row) + "\n" for row in rows))


def test_rows_of_a_local_folder_are_loaded_by_configuration_and_split(add_dataset):
    root = add_dataset(
        "nli", {"en": {"train": json_file("train.jsonl", ROWS), "test": json_file("test.jsonl", ROWS[1:])}}
    )
    assert load_rows("org/nli", "en", "train", root, ("premise", "label")).to_list() == ROWS
    assert load_rows("org/nli", "en", "test", root).to_list() == ROWS[1:]


def test_without_a_data_root_the_hub_id_is_used():
    assert dataset_location("facebook/xnli", None) == "facebook/xnli"


def test_the_data_root_sample_is_the_embedded_one():
    assert dataset_location("facebook/xnli", "sample") == str(SAMPLE_ROOT / "facebook" / "xnli")


def test_a_data_root_may_begin_with_the_home_folder(add_dataset, tmp_path, monkeypatch):
    add_dataset("nli", {"en": {"train": json_file("train.jsonl", ROWS)}})
    monkeypatch.setenv("HOME", str(tmp_path))
    assert dataset_location("org/nli", "~/root") == str(tmp_path / "root" / "org" / "nli")


def test_a_missing_folder_is_named_with_the_data_root(tmp_path):
    with pytest.raises(XLFAError) as error:
        load_rows("org/nope", "en", "train", str(tmp_path))
    assert "'org/nope'" in str(error.value)
    assert f"--data_root {tmp_path}" in str(error.value)


def test_a_missing_configuration_is_named_with_those_that_exist(add_dataset):
    one = {"train": json_file("train.jsonl", ROWS)}
    with pytest.raises(XLFAError, match="org/nli has no configuration 'xx'; it has: en, de"):
        load_rows("org/nli", "xx", "train", add_dataset("nli", {"en": one, "de": one}))


def test_a_missing_split_is_named_with_those_that_exist(add_dataset):
    root = add_dataset("nli", {"en": {"train": json_file("train.jsonl", ROWS)}})
    with pytest.raises(XLFAError, match=r"org/nli \(en\) has no split 'validation'; it has: train"):
        load_rows("org/nli", "en", "validation", root)


def test_the_first_split_that_exists_is_loaded_and_named(add_dataset):
    train, test = json_file("train.jsonl", ROWS), json_file("test.jsonl", ROWS[1:])
    root = add_dataset("nli", {"en": {"train": train, "test": test}, "de": {"train": train}})
    for config, split in (("en", "test"), ("de", "train")):
        rows = load_first_split("org/nli", config, ("test", "validation", "train"), root)
        assert (str(rows.split), len(rows)) == (split, {"test": 1, "train": 2}[split])
    with pytest.raises(XLFAError, match=r"org/nli \(de\) has no split 'validation'; it has: train"):
        load_first_split("org/nli", "de", ("test", "validation"), root)


def test_another_fault_of_the_first_split_is_not_passed_over(add_dataset):
    root = add_dataset("nli", {"en": {"test": text_file("test.jsonl", ""), "train": json_file("train.jsonl", ROWS)}})
    with pytest.raises(XLFAError, match=r"org/nli \(en, test\)"):
        load_first_split("org/nli", "en", ("test", "train"), root)


def test_configurations_that_a_folder_holds_are_told_and_the_hub_has_all(add_dataset):
    one = {"train": json_file("train.jsonl", ROWS)}
    root = add_dataset("nli", {"en": one, "de": one})
    assert held_configurations("org/nli", ["de", "xx", "en"], root) == ["de", "en"]
    assert held_configurations("org/nli", ["de", "xx", "en"], None) == ["de", "xx", "en"]
    with pytest.raises(
        XLFAError, match=f"org/nli under --data_root {root} has no configuration xx, yy; it has: en, de"
    ):
        held_configurations("org/nli", ["xx", "yy", "xx"], root)
    with pytest.raises(XLFAError, match="no data set 'org/none'"):
        held_configurations("org/none", ["de"], root)


@pytest.mark.parametrize(
    ("columns", "groups"),
    [
        ([["a", "b", "a"]], [0, 1, 0]),
        ([["a", "b", "c"], ["x", "y", "z"]], [0, 1, 2]),
        # The last row links the first two; the same text in the other column counts.
        ([["a", "b", "a"], ["x", "y", "y"]], [0, 0, 0]),
        ([["a", "b", "c"], ["b", "x", "y"]], [0, 0, 1]),
        ([["d", "c", "b", "a"], ["c", "b", "a", "z"]], [0, 0, 0, 0]),
    ],
)
def test_rows_that_share_a_value_are_one_group(columns, groups):
    found = connected_groups(columns)
    assert [found.index(name) for name in found] == [groups.index(number) for number in groups]


def test_a_missing_column_is_named_with_those_that_exist(add_dataset):
    root = add_dataset("nli", {"en": {"train": json_file("train.jsonl", ROWS)}})
    with pytest.raises(XLFAError, match=r"org/nli \(en, train\) has no column hypothesis; it has: premise, label"):
        load_rows("org/nli", "en", "train", root, ("premise", "hypothesis", "label"))


def test_a_missing_file_is_named(add_dataset, tmp_path):
    root = add_dataset("nli", {"en": {"train": json_file("train.jsonl", ROWS)}})
    (tmp_path / "root/org/nli/en/train.jsonl").unlink()
    with pytest.raises(XLFAError, match=r"org/nli \(en, train\)(.|\n)*train.jsonl"):
        load_rows("org/nli", "en", "train", root)


def test_a_file_with_columns_and_no_rows_is_refused(add_dataset):
    empty = ("test.parquet", lambda path: Dataset.from_dict({"premise": [], "label": []}).to_parquet(path))
    full = ("train.parquet", lambda path: Dataset.from_list(ROWS).to_parquet(path))
    root = add_dataset("nli", {"en": {"train": full, "test": empty}})
    with pytest.raises(XLFAError, match=r"org/nli \(en, test\).*(is empty|no data)"):
        load_rows("org/nli", "en", "test", root)


def test_an_empty_file_beside_a_full_one_is_refused(add_dataset):
    files = {"train": json_file("train.jsonl", ROWS), "test": text_file("test.jsonl", "")}
    with pytest.raises(XLFAError, match=r"org/nli \(en, test\)"):
        load_rows("org/nli", "en", "test", add_dataset("nli", {"en": files}))


def test_an_empty_file_alone_is_refused(add_dataset):
    root = add_dataset("nli", {"en": {"train": text_file("train.jsonl", "")}})
    with pytest.raises(XLFAError, match=r"org/nli \(en, train\)"):
        load_rows("org/nli", "en", "train", root)


def test_a_file_that_is_no_json_is_refused(add_dataset):
    root = add_dataset("nli", {"en": {"train": text_file("train.jsonl", "{no json\n")}})
    with pytest.raises(XLFAError, match=r"org/nli \(en, train\)"):
        load_rows("org/nli", "en", "train", root)


def test_a_file_that_changed_is_read_anew(add_dataset, tmp_path):
    root = add_dataset("nli", {"en": {"train": json_file("train.jsonl", ROWS)}})
    load_rows("org/nli", "en", "train", root)
    (tmp_path / "root/org/nli/en/train.jsonl").write_text('{"premise": "new", "label": 2}\n')
    assert load_rows("org/nli", "en", "train", root).to_list() == [{"premise": "new", "label": 2}]


def test_folders_of_the_same_name_under_two_roots_are_not_mistaken_for_each_other(add_dataset, tmp_path):
    root = add_dataset("nli", {"en": {"train": json_file("train.jsonl", ROWS)}})
    other = tmp_path / "other"
    shutil.copytree(root, other)
    (other / "org/nli/en/train.jsonl").write_text(json.dumps(ROWS[1]) + "\n")
    assert len(load_rows("org/nli", "en", "train", root)) == 2
    assert load_rows("org/nli", "en", "train", str(other)).to_list() == ROWS[1:]


def test_an_unreachable_hub_names_the_data_set_and_the_remedy(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(XLFAError, match="'no-such-org/no-such-set'.*--data_root"):
        load_rows("no-such-org/no-such-set", None, "train")


def test_a_data_set_that_is_a_script_names_the_remedy(monkeypatch):
    def refuse(*arguments, **options):
        raise RuntimeError("Dataset scripts are no longer supported, but found mlqa.py")

    monkeypatch.setattr("xlfa.data.load_dataset", refuse)
    with pytest.raises(XLFAError, match="'facebook/mlqa' is a script.*--data_root"):
        load_rows("facebook/mlqa", None, "test")


@pytest.mark.parametrize("max_examples", [3, 4, 20, 59])
def test_a_sample_holds_whole_clusters_and_at_most_that_many_examples(max_examples):
    chosen = sample_clusters(PREMISES, max_examples, seed=0)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == max_examples // 3 * 3
    assert set(Counter(PREMISES[position] for position in chosen).values()) == {3}


def test_scattered_members_of_a_cluster_are_drawn_together():
    clusters = ["a", "b", "c", "d", "e"] * 4
    chosen = sample_clusters(clusters, 8, seed=1)
    assert len({clusters[position] for position in chosen}) == 2
    assert len(chosen) == 8


def test_a_sample_depends_on_its_seed_alone():
    assert sample_clusters(PREMISES, 20, seed=5) == sample_clusters(list(PREMISES), 20, seed=5)
    assert len({tuple(sample_clusters(PREMISES, 20, seed)) for seed in range(5)}) > 1


def test_a_sample_does_not_depend_on_the_language():
    translated = [f"ข้อ {premise}" for premise in PREMISES]
    assert sample_clusters(translated, 20, seed=0) == sample_clusters(PREMISES, 20, seed=0)


@pytest.mark.parametrize("max_examples", [None, 60, 100])
def test_a_limit_that_is_not_reached_keeps_every_example(max_examples):
    assert sample_clusters(PREMISES, max_examples, seed=0) == list(range(60))


@pytest.mark.parametrize("max_examples", [2, 0])
def test_a_limit_below_one_cluster_is_refused(max_examples):
    with pytest.raises(XLFAError, match=f"--max_examples {max_examples} "):
        sample_clusters(PREMISES, max_examples, seed=0)


def test_no_group_is_both_kept_and_held_out():
    groups = [f"context {number % 20}" for number in range(90)]
    kept, held_out = hold_out_groups(groups, 0.1)
    assert sorted(kept + held_out) == list(range(90))
    assert not {groups[position] for position in kept} & {groups[position] for position in held_out}
    assert len({groups[position] for position in held_out}) == 2


def test_the_held_out_groups_are_fixed():
    groups = [f"context {number}" for number in range(40)]
    assert hold_out_groups(groups, 0.1) == hold_out_groups(groups, 0.1)
    assert hold_out_groups(groups, 0.1)[1] != hold_out_groups(groups, 0.1, seed=1)[1]


def test_a_small_set_holds_out_one_group():
    assert len(hold_out_groups(["a", "b", "c"], 0.1)[1]) == 1


def test_a_single_group_cannot_be_held_out():
    with pytest.raises(XLFAError, match="single group"):
        hold_out_groups(["a", "a"], 0.1)
