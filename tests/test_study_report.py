"""The report: one page that needs nothing else, whose words, tables and numbers agree with each other and the truth."""

import base64
import csv
import json
import math
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.image import imread
from study_data import CLUSTERS, CONTROLS, EPSILONS, HEADLINE, predictions, write_cell, write_study

from xlfa.study.figures import draw_all
from xlfa.study.report import write_report
from xlfa.study.tables import Column

VOID = {"meta", "img", "br", "link", "hr", "input"}
BROWSERS = ("chromium", "google-chrome", "chromium-browser")


class Page(HTMLParser):
    """Checks nesting; gathers tables, attributes that load something, ids and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.loaded, self.tables, self.words = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.loaded += [attributes[name] for name in ("src", "href") if name in attributes]
        assert tag != "script"
        if tag == "img":
            assert attributes["alt"]
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def read(output):
    return Page((output / "index.html").read_text()), json.loads((output / "report.json").read_text())


def report_on(folder):
    write_report(folder, folder / "report")
    return read(folder / "report")


def table(output, name):
    return list(csv.DictReader((output / "tables" / f"{name}.csv").open(encoding="utf-8")))


def slope_in_xquad(task, point, control, language):
    return 0.08 * math.log10(point["ot_epsilon"]) if point and task == "xquad" else 0.0


def slope_in_both(task, point, control, language):
    # Half of the wrong answers have an F1 of 0.5: F1 rises by three quarters of the share of right ones.
    slope = 0.05 if task == "xnli" else 0.05 / 0.75
    return slope * math.log10(point["ot_epsilon"]) if point else 0.0


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """The folder of the report of a study with an effect of epsilon on XQuAD alone."""
    folder = tmp_path_factory.mktemp("study")
    write_study(folder, effect=slope_in_xquad)
    page = write_report(folder, folder / "report")
    assert page == folder / "report" / "index.html"
    return folder / "report"


def test_the_page_needs_nothing_else_and_is_well_formed(reported):
    page, _ = read(reported)
    assert page.loaded and all(own.startswith("data:image/svg+xml;base64,") for own in page.loaded)
    assert len(set(page.ids)) == len(page.ids)
    text = (reported / "index.html").read_text()
    assert text.startswith("<!DOCTYPE html>")
    assert not re.search(r"https?://|url\(|@import", text)
    for image in page.loaded:
        svg = base64.b64decode(image.split(",")[1]).decode()
        assert "prefers-color-scheme:dark" in svg
        # Only what is in it.
        assert not re.search(r'(?:href|src)="(?!#|data:)', svg)


def test_figures_tables_and_numbers_are_files(reported):
    figures = sorted(path.name for path in (reported / "figures").iterdir())
    assert figures == ["curves.png", "differences.png", "groups.png", "languages.png", "scores.png"]
    for name in figures:
        image = imread(reported / "figures" / name)
        assert min(image.shape[:2]) > 400
        assert image[..., :3].std() > 0.02
    tables = sorted(path.stem for path in (reported / "tables").iterdir())
    assert tables == ["differences", "languages", "retrieval", "scores", "selection", "tests", "transport"]


def test_numbers_of_the_page_are_those_of_the_files(reported):
    page, report = read(reported)
    names = ["tests", "differences", "scores", "selection", "transport"]
    assert len(page.tables) == len(names)
    for shown, name in zip(page.tables, names):
        rows = list(csv.reader((reported / "tables" / f"{name}.csv").open(encoding="utf-8")))
        assert shown[0] == rows[0]
        assert len(shown) == len(rows) > 1
        for page_row, row in zip(shown[1:], rows[1:]):
            for cell, value in zip(page_row, row, strict=True):
                if value == "" or not re.fullmatch(r"[−+]?[\d.e+−-]+%?", cell):
                    assert cell == (value or "–") or cell.startswith("< 0.001")
                    continue
                number = float(cell.rstrip("%").replace("−", "-")) / (100 if cell.endswith("%") else 1)
                assert number == pytest.approx(float(value), rel=0.06, abs=0.006), (name, row, cell)
    for row in table(reported, "scores"):
        own = next(
            each
            for each in report["conditions"]
            if (each["task"], each["line"], each["condition"]) == (row["task"], row["line"], row["condition"])
        )
        entry = own["scores"][row["metric"]]["headline"]
        assert [float(row[name]) for name in ("headline", "low", "high")] == [entry["value"], *entry["interval"]]
        assert int(row["seeds"]) == len(own["seeds"])
    for row, entry in zip(table(reported, "tests"), report["interactions"] + report["trends"], strict=True):
        assert float(row["slope"]) == entry["test"]["slope"]
        assert float(row["p"]) == entry["test"]["slope_p"]
        assert float(row["p over seeds"]) == entry["slopes_p"]


def test_every_language_is_in_the_files(reported):
    rows = table(reported, "languages")
    found = {(row["task"], row["language"]) for row in rows}
    assert {("xnli", code) for code in ("ar", "bg", "de", "en", "fr", "zh")} <= found
    own = {(row["condition"], row["language"]): row for row in rows if row["task"] == "xnli"}
    difference = float(own["0.1", "fr"]["score"]) - float(own["no_ot", "fr"]["score"])
    assert float(own["0.1", "fr"]["difference"]) == pytest.approx(difference)


def statements(report, verdict):
    return [own["text"] for own in report["statements"] if own["verdict"] == verdict]


def test_words_where_epsilon_acts_on_one_task(reported):
    page, report = read(reported)
    shown = statements(report, "Shown")
    assert any(text.startswith("that ot_epsilon acts differently on XQuAD than on XNLI") for text in shown)
    assert any(text.startswith("that XQuAD rises or falls with ot_epsilon") for text in shown)
    assert any(text.startswith("XQuAD F1, worse than no OT: ot_epsilon 0.01") for text in shown)
    assert any(text.startswith("that XNLI rises or falls with ot_epsilon") for text in statements(report, "Not shown"))
    assert all(own["text"] in page.text for own in report["statements"])
    setting = report["statements"][0]["text"]
    for fact in (
        "5 seeds",
        "packaged:multilingual-e5-small",
        "at most 3,600 examples",
        "120 examples",
        " ".join(HEADLINE),
    ):
        assert fact in setting
    points = next(entry for entry in report["interactions"] if entry["unit"] == "points")
    assert points["primary"] and shown[0].startswith(
        "that ot_epsilon acts differently on XQuAD than on XNLI (the primary"
    )
    assert f"{points['test']['slope']:+.3g} points per factor of 10 in ot_epsilon" in shown[0]
    # Epsilon 0.01 has 1 % of pairs that did not converge.
    assert "XNLI ot_epsilon 0.01 1.0 %" in page.text


def test_words_where_nothing_acts(tmp_path):
    write_study(tmp_path, seed=3)
    _, report = report_on(tmp_path)
    assert statements(report, "Shown") == []
    # The interaction; for each task the trend, the levels, English and German against the others, the controls.
    assert len(statements(report, "Not shown")) == 9
    primary = statements(report, "Not shown")[0]
    assert primary.startswith("that ot_epsilon acts differently on XQuAD than on XNLI")
    entry = report["interactions"][0]
    assert entry["interval"][0] < 0 < entry["interval"][1]
    assert f"below {entry['detectable']:.3g}" in primary


def test_words_where_epsilon_helps_english_and_german_alone(tmp_path):
    write_study(tmp_path, effect=lambda task, point, control, code: 0.1 * bool(point and code in ("en", "de")), seed=4)
    _, report = report_on(tmp_path)
    start = "XNLI accuracy, a higher difference to no OT on de and en"
    (text,) = (text for text in statements(report, "Shown") if text.startswith(start))
    for row in table(tmp_path / "report", "differences"):
        if row["task"] == "xnli" and row["condition"] in ("0.01", "0.1", "1"):
            contrast = float(row["enf − noenf"])
            assert contrast == pytest.approx(float(row["enf"]) - float(row["noenf"]))
            assert contrast == pytest.approx(10, abs=4)
            interval = f"{float(row['its low']):+.2f} to {float(row['its high']):+.2f}"
            assert f"ot_epsilon {row['condition']} {contrast:+.2f} (95 % interval {interval}" in text


def test_the_grid_may_have_a_second_field(tmp_path):
    """The line that the controls were trained like comes first and has the primary test and the controls."""
    weights = ("0.05", "0.1", "0.3")
    points = [{"ot_epsilon": epsilon, "ot_weight": float(weight)} for weight in weights for epsilon in (0.01, 1.0)]
    write_study(tmp_path, points=points, seeds=(0, 1), clusters=4)
    page, report = report_on(tmp_path)
    lines = [f"main · ot_weight {weight}" for weight in ("0.1", "0.05", "0.3")]
    assert report["lines"] == lines
    assert [entry["line"] for entry in report["interactions"] if entry["primary"]] == lines[:1]
    assert page.text.count("(the primary test)") == 1
    assert "acts differently on XQuAD than on XNLI (main · ot_weight 0.1) (the primary test)" in page.text
    references = {entry["line"]: entry["reference"] for entry in report["trends"]}
    assert references == dict(zip(lines, ("shuffled_pairs", "no_ot", "no_ot")))
    for own in report["conditions"]:
        if own["kind"] == "control":
            assert own["lines"] == (lines if own["condition"] == "no_ot" else lines[:1])


def test_words_where_epsilon_acts_on_both_tasks_alike(tmp_path):
    write_study(tmp_path, effect=slope_in_both, seed=5)
    _, report = report_on(tmp_path)
    shown, not_shown = statements(report, "Shown"), statements(report, "Not shown")
    assert any(text.startswith("that XNLI rises or falls with ot_epsilon") for text in shown)
    assert any(text.startswith("that XQuAD rises or falls with ot_epsilon") for text in shown)
    assert any("acts differently" in text for text in not_shown)
    assert not any("acts differently" in text for text in shown)


def test_shown_is_what_test_and_interval_say(reported):
    """Each verdict follows from the numbers, whatever they are."""
    _, report = read(reported)
    shown = " ".join(statements(report, "Shown"))
    for own in report["conditions"]:
        if own["difference"] is None:
            continue
        metric = report["tasks"][own["task"]]["metrics"][0]
        low, high = own["difference"]["scores"][metric]["headline"]["interval"]
        expected = own["difference"]["p_holm"] < 0.05 and (low > 0 or high < 0)
        value = own["difference"]["scores"][metric]["headline"]["value"]
        assert (f"{value:+.2f}".replace("-", "−") + " (95 % interval" in shown) is expected


def test_a_study_that_is_not_complete(tmp_path):
    write_study(tmp_path, seeds=(0, 1, 2), clusters=8)
    for name in ("xnli-main-no_ot-s2", "xquad-main-ot_epsilon_1.0-s0"):
        shutil.rmtree(tmp_path / "cells" / name)
    failed = tmp_path / "cells" / "xnli-main-ot_epsilon_0.1-s1"
    (failed / "result.json").unlink()
    (failed / "failed.json").write_text('{"error": "no <memory>"}')
    page, report = report_on(tmp_path)
    assert "xnli main no_ot seed 2" in page.text
    assert "xquad main ot_epsilon 1 seed 0" in page.text
    assert "failed: xnli-main-ot_epsilon_0.1-s1 : no <memory>" in page.text
    assert "The study is not complete: 3 cells of the grid not there, 1 cell begun without a result" in page.text
    rows = {(row["task"], row["condition"]): row for row in table(tmp_path / "report", "differences")}
    # Seeds 0 and 1 of the baseline, of which epsilon 0.1 lacks 1.
    assert [rows["xnli", level]["seeds"] for level in ("0.01", "0.1", "1")] == ["2", "1", "2"]
    assert rows["xnli", "0.1"]["p"] == ""
    assert rows["xquad", "1"]["seeds"] == "2"
    assert "n = 1" in page.text


def test_layers_are_a_study_too(tmp_path):
    points = [{"fusion_layer": layer} for layer in ("2", "4", "10")]
    write_study(tmp_path, tasks=("xnli",), points=points, controls={"baseline": {}}, name="layers", clusters=8)
    page, report = report_on(tmp_path)
    assert (report["axis"]["kind"], report["axis"]["levels"]) == ("linear", ["2", "4", "10"])
    assert report["interactions"] == []
    assert "points per unit of fusion_layer" in page.text
    assert "XNLI accuracy, a difference to baseline: fusion_layer 2" in page.text


def test_fields_without_an_order(tmp_path):
    points = [
        {"fusion_gate": gate, "fusion_norm": norm} for gate in ("literal", "sigmoid") for norm in ("batch", "layer")
    ]
    write_study(
        tmp_path,
        effect=lambda task, point, *_: 0.15 if point and point["fusion_norm"] == "layer" else 0.0,
        **{"points": points, "controls": {"baseline": {}}, "name": "fusion", "seeds": (0, 1, 2)},
    )
    page, report = report_on(tmp_path)
    assert report["axis"]["kind"] == "categorical"
    assert any("that XNLI depends on fusion_gate · fusion_norm: omega²" in text for text in statements(report, "Shown"))
    assert all(entry["test"]["slope"] is None for entry in report["interactions"])
    better = "XNLI accuracy, a better value of fusion_norm, a mean over 2 other settings: layer − batch +"
    assert any(better in text for text in statements(report, "Shown"))
    assert not any("value of fusion_gate" in text for text in statements(report, "Shown"))
    rows = table(tmp_path / "report", "effects")
    assert [(row["difference of"], row["at"]) for row in rows if row["task"] == "xnli"] == [
        ("sigmoid − literal", ""),
        ("sigmoid − literal", "fusion_norm batch"),
        ("sigmoid − literal", "fusion_norm layer"),
        ("layer − batch", ""),
        ("layer − batch", "fusion_gate literal"),
        ("layer − batch", "fusion_gate sigmoid"),
    ]
    assert "Slopes are per" not in page.text


def test_a_gain_at_one_value_of_another_field_and_a_loss_at_the_other_are_both_told(tmp_path):
    points = [
        {"fusion_gate": gate, "fusion_norm": norm} for gate in ("literal", "sigmoid") for norm in ("none", "layer")
    ]

    def effect(task, point, *_):
        return 0.0 if point["fusion_norm"] == "none" else 0.15 if point["fusion_gate"] == "literal" else -0.15

    write_study(tmp_path, effect, ("xnli",), (0, 1, 2), points, controls={}, name="fusion")
    _, report = report_on(tmp_path)
    means = {own["at"]: own["scores"]["accuracy"]["headline"]["value"] for own in report["effects"]}
    assert means["fusion_gate literal"] < -10 and means["fusion_gate sigmoid"] > 10
    of_norm = [own for own in report["effects"] if own["field"] == "fusion_norm"]
    assert [(own["at"], own["family"]) for own in of_norm] == [
        (None, 1),
        ("fusion_gate literal", 2),
        ("fusion_gate sigmoid", 2),
    ]
    assert of_norm[0]["scores"]["accuracy"]["headline"]["value"] == pytest.approx(
        sum(own["scores"]["accuracy"]["headline"]["value"] for own in of_norm[1:]) / 2
    )
    shown = statements(report, "Shown")
    assert any("a worse value of fusion_norm: none − layer at fusion_gate literal −" in text for text in shown)
    assert any("a better value of fusion_norm: none − layer at fusion_gate sigmoid +" in text for text in shown)


def test_values_of_a_field_are_compared_with_the_other_fields_alike(tmp_path):
    # Sigmoid has no layer norm: its gate alone must not count for layer norm, nor layer norm for the other gate.
    points = [{"fusion_gate": gate, "fusion_norm": "batch"} for gate in ("literal", "sigmoid")]
    points.append({"fusion_gate": "literal", "fusion_norm": "layer"})
    write_study(
        tmp_path,
        effect=lambda task, point, *_: 0.2 if point and point["fusion_gate"] == "sigmoid" else 0.0,
        **{"tasks": ("xnli",), "points": points, "controls": {}, "name": "fusion", "seeds": (0, 1, 2)},
    )
    _, report = report_on(tmp_path)
    scores = {own["condition"]: own["by_seed"]["accuracy"] for own in report["conditions"]}
    literal, sigmoid, layer = (
        scores[f"fusion_gate {gate} · fusion_norm {norm}"]
        for gate, norm in (("literal", "batch"), ("sigmoid", "batch"), ("literal", "layer"))
    )
    found = {own["field"]: own for own in report["effects"]}
    for name, other in (("fusion_gate", sigmoid), ("fusion_norm", layer)):
        differences = [b - a for a, b in zip(literal, other)]
        assert list(found[name]["by_seed"].values()) == pytest.approx(differences)
        headline = found[name]["scores"]["accuracy"]["headline"]
        assert headline["value"] == pytest.approx(sum(differences) / 3)
        assert headline["interval"][0] < headline["value"] < headline["interval"][1]
        assert found[name]["pairs"] == found[name]["family"] == 1
    assert found["fusion_gate"]["scores"]["accuracy"]["headline"]["value"] > 10
    assert abs(found["fusion_norm"]["scores"]["accuracy"]["headline"]["value"]) < 5


def test_one_seed_and_no_controls_are_reported_as_far_as_they_go(tmp_path):
    write_study(tmp_path, tasks=("xquad",), seeds=(0,), controls={}, clusters=4)
    page, report = report_on(tmp_path)
    (text,) = statements(report, "Not tested")
    assert text.startswith("that XQuAD rises or falls with ot_epsilon: the slope of XQuAD is")
    assert "n = 1 seed, 3 scores" in text and "takes two" in text
    assert sorted(path.stem for path in (tmp_path / "report" / "figures").iterdir()) == ["curves", "scores"]
    assert not (tmp_path / "report" / "tables" / "differences.csv").exists()


def test_controls_alone_are_a_study_without_an_axis(tmp_path):
    write_study(tmp_path, points=[], seeds=(0, 1), clusters=4)
    page, report = report_on(tmp_path)
    assert (report["axis"], report["lines"]) == (None, [])
    assert "XNLI accuracy, a difference to no OT: exact" in page.text


def test_files_of_an_earlier_report_go(tmp_path):
    write_study(tmp_path, tasks=("xquad",), seeds=(0,), controls={}, clusters=4)
    report = tmp_path / "report"
    outdated, others = ("figures/languages.png", "tables/differences.csv"), ("figures/mine.png", "tables/mine.csv")
    for name in (*outdated, *others, "../elsewhere.png"):
        (report / name).parent.mkdir(parents=True, exist_ok=True)
        (report / name).write_text("old")
    (report / "report.json").write_text(json.dumps({"files": [*outdated, "../elsewhere.png", "figures/scores.png"]}))
    write_report(tmp_path, report)
    assert not [name for name in outdated if (report / name).exists()]
    assert all((report / name).read_text() == "old" for name in (*others, "../elsewhere.png"))
    assert not [path for path in report.rglob(".*")]
    files = {path.relative_to(report).as_posix() for path in report.glob("*/*")}
    assert set(read(report)[1]["files"]) == files - set(others)


def test_a_seed_that_ran_on_two_kinds_of_machine_is_named(tmp_path):
    folder = write_study(tmp_path / "study", tasks=["xnli"], seeds=[0, 1])
    told = "Cells of seed 1 that are compared ran on different kinds of machine"
    assert told not in report_on(folder)[0].text
    result = next(folder.glob("cells/*-s1/result.json"))
    result.write_text(json.dumps(json.loads(result.read_text()) | {"machine": "another one"}))
    assert told in report_on(folder)[0].text


def test_the_number_of_training_examples_may_be_left_open(tmp_path):
    folder = write_study(tmp_path / "study", tasks=["xnli"], seeds=[0])
    for path in folder.glob("cells/*/result.json"):
        result = json.loads(path.read_text())
        result["settings"]["train"].pop("max_train_examples")
        path.write_text(json.dumps(result))
    assert "trained on local/nli-en, scored on" in report_on(folder)[0].text


def test_as_many_examples_of_each_language_are_one_number(tmp_path):
    folder = write_study(tmp_path / "study", tasks=["xnli"], seeds=[0])
    page, report = report_on(folder)
    number = report["tasks"]["xnli"]["examples"]
    for path in folder.glob("cells/*/result.json"):
        result = json.loads(path.read_text())
        result["scores"] |= {"examples": dict.fromkeys(report["tasks"]["xnli"]["languages"], number)}
        path.write_text(json.dumps(result))
    assert f"scored on {number} examples a language in" in page.text
    assert f"scored on {number} examples a language in" in report_on(folder)[0].text


def test_a_level_of_fewer_seeds_is_told_apart(tmp_path):
    folder = write_study(tmp_path, tasks=("xnli",), seeds=(0, 1, 2, 3), clusters=8)
    page, report = report_on(folder)
    drawings = {drawing.name: drawing for drawing in draw_all(report)}
    assert "faint points" not in page.text and joined_points(drawings["differences"]) == [len(EPSILONS)]
    for seed in (2, 3):
        shutil.rmtree(next(folder.glob(f"cells/*{EPSILONS[1]}-s{seed}")))
    page, report = report_on(folder)
    drawings = {drawing.name: drawing for drawing in draw_all(report)}
    for name in ("differences", "scores", "groups"):
        assert "Means are over 2 to 4 seeds: faint points have fewer" in drawings[name].caption
        assert set(joined_points(drawings[name])) == {len(EPSILONS) - 1}
    points = r"[\d.]+ points \([\d.]+ at the strictest of Holm's steps\)"
    assert re.search(f"studies find: {points} with 4 seeds and {points} with 2 seeds", page.text)
    assert "n = 4 seeds, 10 of 12 differences to shuffled pairs" in page.text


def test_a_line_of_fewer_seeds_is_faint(tmp_path):
    points = [{"ot_epsilon": epsilon, "ot_weight": weight} for weight in (0.1, 0.3) for epsilon in EPSILONS]
    folder = write_study(tmp_path, tasks=("xnli",), seeds=(0, 1, 2), points=points, clusters=8)
    for path in folder.glob("cells/*ot_weight_0.3-s2"):
        shutil.rmtree(path)
    _, report = report_on(folder)
    for drawing in draw_all(report):
        if drawing.name in ("differences", "scores", "groups"):
            assert "Means are over 2 to 3 seeds: faint points have fewer" in drawing.caption
            per_line = [
                {line.get_alpha() for line in axes.get_lines() if line.get_marker() in ("o", "s")}
                for axes in drawing.figure.axes
            ]
            assert per_line == [{None}, {0.45}]


def test_a_rise_and_a_fall_is_no_slope_and_yet_a_difference(tmp_path):
    def peak(task, point, *_):
        return 0.2 if point and point["ot_epsilon"] == 0.1 else 0.0

    write_study(tmp_path, peak, ("xnli",))
    _, report = report_on(tmp_path)
    (text,) = (text for text in statements(report, "Not shown") if text.startswith("that XNLI rises or falls"))
    assert "Its levels differ as a factor: a dependence that is no straight line is not ruled out." in text


def test_weights_and_arms_are_compared_at_the_same_epsilon(tmp_path):
    def effect(task, point, control, code):
        return 0.15 if point and point["ot_weight"] == 0.3 else 0.0

    points = [{"ot_epsilon": epsilon, "ot_weight": 0.1} for epsilon in EPSILONS]
    points += [{"ot_epsilon": epsilon, "ot_weight": 0.3} for epsilon in EPSILONS[1:]]
    write_study(tmp_path, effect, ("xnli",), (0, 1, 2), points, arms=("main", "dlfa"))
    _, report = report_on(tmp_path)
    rows = [(row["arm"], row["difference of"], row["at"]) for row in table(tmp_path / "report", "effects")]
    of_weights = [("0.3 − 0.1", ""), ("0.3 − 0.1", "ot_epsilon 0.1"), ("0.3 − 0.1", "ot_epsilon 1")]
    assert rows[:6] == [(arm, *own) for arm in ("main", "dlfa") for own in of_weights]
    assert rows[6] == ("", "dlfa − main", "") and len(rows) == 12
    means = [own for own in report["effects"] if own["at"] is None]
    assert [own["pairs"] for own in means] == [2, 2, 5]
    assert means[0]["scores"]["accuracy"]["headline"]["value"] == pytest.approx(14, abs=5)
    shown = statements(report, "Shown")
    assert any("(main), a better value of ot_weight, a mean over 2 other settings: 0.3 − 0.1 +" in own for own in shown)
    assert any("a difference between values of arm" in own for own in statements(report, "Not shown"))


def joined_points(drawing):
    """How many points each line of a figure goes through that stands for the levels."""
    lines = [line for axes in drawing.figure.axes for line in axes.get_lines()]
    return [
        len(line.get_xdata()) for line in lines if line.get_marker() in "os" and line.get_linestyle() in ("-", "--")
    ]


def test_one_test_of_three_tasks_is_the_primary_one(tmp_path):
    _, report = report_on(write_study(tmp_path, tasks=("xnli", "xquad", "pawsx"), seeds=(0, 1), clusters=4))
    assert len({tuple(entry["tasks"]) for entry in report["interactions"]}) == 3
    assert len([entry for entry in report["interactions"] if entry["primary"]]) == 1


def test_markup_in_names_is_text(tmp_path):
    """Of a study, a language, an arm, a control and a value; and $ begins no formula in a figure."""
    rng = np.random.default_rng(0)
    names = {"study": "<b>&\"'", "arm": "<i>arm</i>"}
    for seed in (0, 1):
        for point, control in (({"ot_cost": "<u>$x_$"}, None), ({"ot_cost": "b$"}, None), (None, "<s>$\\alpha$")):
            found = {code: predictions("xnli", rng, rng.random(12) < 0.5) for code in ("de", "en", "<script>alert(1)")}
            write_cell(tmp_path, names["study"], "xnli", names["arm"], seed, point, control, found, rng, id="x")
    folders = sorted((tmp_path / "cells").iterdir())
    assert len(folders) == 6
    page, _ = report_on(tmp_path)
    for name in ("Study <b>&\"'", "<i>arm</i>", "<u>$x_$", "<s>$\\alpha$", "<script>alert(1)"):
        assert name in page.text
    text = (tmp_path / "report" / "index.html").read_text()
    assert not re.search(r"<(b|i|u|s|script)>", text)


def test_the_report_of_a_whole_study_takes_seconds(tmp_path):
    """The study of the issue: six epsilons and four controls in two tasks, five seeds."""
    points = [{"ot_epsilon": epsilon} for epsilon in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)]
    write_study(tmp_path, points=points, clusters=CLUSTERS)
    start = time.process_time()
    write_report(tmp_path, tmp_path / "report")
    assert time.process_time() - start < 20


def test_a_report_can_be_made_again_and_is_the_same(reported, tmp_path):
    write_report(reported.parent, tmp_path)
    for name in ("index.html", "report.json"):
        assert (tmp_path / name).read_bytes() == (reported / name).read_bytes()


def test_how_values_are_shown():
    assert Column("x", "+.2f").show(-1.234) == "−1.23"
    assert Column("x", ".1f").show(None) == "–"
    assert [Column("p", "p").show(p) for p in (0.0004, 0.0123, None)] == ["< 0.001", "0.012", "–"]
    assert Column("x").show("a-b") == "a-b"


@pytest.mark.full
@pytest.mark.parametrize("scheme, paper", [("light", (255, 255, 254)), ("dark", (22, 27, 34))])
def test_the_page_in_a_real_browser(reported, tmp_path, scheme, paper):
    """A screenshot: every figure is drawn, in light and in dark mode, and the page does not overflow to the right."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"needs a browser: {', '.join(BROWSERS)}")
    shot = tmp_path / "page.png"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1200,6000"]
    command += [f"--blink-settings=preferredColorScheme={'1' if scheme == 'light' else '0'}"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={shot}", f"file://{reported}/index.html"]
    subprocess.run(command, check=True, timeout=240, capture_output=True)
    image = np.round(255 * imread(shot)[..., :3]).astype(int)
    assert image.shape == (6000, 1200, 3)
    assert tuple(image[5, 5]) == paper
    assert tuple(image[5, -5]) == tuple(image[-5, -5]) == paper
    # XNLI's and XQuAD's colours in that mode: the figures are there.
    colours = {"light": [(0, 114, 178), (213, 94, 0)], "dark": [(88, 166, 255), (255, 143, 63)]}[scheme]
    for colour in colours:
        assert (image == colour).all(-1).sum() > 300


def test_the_study_data_is_a_study(reported):
    _, report = read(reported)
    assert report["cells"] == 2 * 5 * (len(EPSILONS) + len(CONTROLS))
