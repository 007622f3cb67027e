"""Print the tables of results/tasks/README.md from the files beside this one."""

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MODELS = {"before": "before", "ot_weight-0": "after, without OT", "ot_weight-0.1": "after, with OT"}
# What is compared, and how the difference is called.
TAGGERS = {"none": "plain", "dlfa": "DLFA"}, "DLFA - plain"
ALIGNED = {"ot_weight-0": "without OT", "ot_weight-0.1": "with OT"}, "with - without"


def read(*parts: str) -> dict[str, Any]:
    return json.loads(HERE.joinpath(*parts).read_text(encoding="utf-8"))


def markdown(heading: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [heading, ["---"] * len(heading), *rows])


def with_interval(value: float, interval: list[float] | None) -> str:
    return f"{value:.1f}" if interval is None else f"{value:.1f} [{interval[0]:.1f}, {interval[1]:.1f}]"


def comparison(task: str, metric: str, models: dict[str, str], difference: str) -> str:
    """Two models, as folder → heading, and their difference, a row a language and mean; `scores.json` has families."""
    found = read(task, "compare.json")
    first, second = (read(task, folder, "scores.json") for folder in models)
    rows = []
    for name, row in found["differences"].items():
        cell = row[metric]
        if cell["difference"] is None or name in first["families"]:
            continue
        values = [row_of(scores, name) for scores in (first, second)]
        cells = [with_interval(score[metric], interval[metric]) for score, interval in values]
        p = cell.get("p_adjusted", cell["p"])
        rows.append([name, *cells, with_interval(cell["difference"], cell["interval"]), f"{p:.3f}"])
    return markdown([f"{task}, {metric}", *models.values(), difference, "p"], rows)


def row_of(scores: dict[str, Any], name: str) -> tuple[dict, dict]:
    """The scores of a language or a mean, and their intervals."""
    if name in scores["languages"]:
        return scores["languages"][name], scores["intervals"]["languages"][name]
    return scores[name], scores["intervals"][name]


def missed(task: str) -> str:
    """Languages that miss words, by the share they miss."""
    languages = read(task, "none", "scores.json")["languages"]
    shares = {code: values["missed_words"] for code, values in languages.items() if values["missed_words"] >= 0.05}
    listed = ", ".join(f"{code} {share:.1f} %" for code, share in sorted(shares.items(), key=lambda item: -item[1]))
    return f"{task}: words missed behind the limit or without a piece: {listed or 'none'} (others below 0.05 %)"


def single(task: str, *metrics: str) -> str:
    """One model: a row a language and their mean, a column a metric; `scores.json` has other means."""
    scores = read(task, "scores.json")
    rows = []
    for name in (*scores["languages"], "average"):
        values, intervals = row_of(scores, name)
        rows.append([name, *(with_interval(values[metric], intervals[metric]) for metric in metrics)])
    return markdown([task, *(metric.replace("_", " ") for metric in metrics)], rows)


def retrieval() -> str:
    """Mean P@1 over languages and directions, a row a layer and a column a model."""
    found = {title: read("retrieval", folder, "retrieval.json") for folder, title in MODELS.items()}
    layers = next(iter(found.values()))["average"]
    rows = [[layer, *(f"{scores['average'][layer]['mean']:.1f}" for scores in found.values())] for layer in layers]
    return markdown(["P@1, layer", *found], rows)


def retrieval_by_language() -> str:
    """The last layer, a row a language."""
    found = {title: read("retrieval", folder, "retrieval.json") for folder, title in MODELS.items()}
    last = list(next(iter(found.values()))["average"])[-1]
    rows = []
    for code in next(iter(found.values()))["languages"]:
        cells = []
        for scores in found.values():
            values = scores["languages"][code]["layers"][last]
            pairs = [with_interval(values[way], values[f"{way}_interval"]) for way in ("to_english", "from_english")]
            cells.append(" / ".join(pairs))
        rows.append([code, *cells])
    return markdown([f"P@1, layer {last}, to / from English", *found], rows)


def rankc() -> str:
    """Mean RankC of each language with the others, of the models that were scored."""
    found = {
        title: read("rankc", folder, "rankc.json")
        for folder, title in MODELS.items()
        if (HERE / "rankc" / folder / "rankc.json").is_file()
    }
    rows = []
    for code in next(iter(found.values()))["matrix"]:
        cells = []
        for scores in found.values():
            others = [value for other, value in scores["matrix"][code].items() if other != code]
            cells.append(f"{sum(others) / len(others):.1f}")
        rows.append([code, *cells])
    rows.append(["**all pairs**", *(f"{scores['average']:.2f}" for scores in found.values())])
    rows.append(["**pairs with English**", *(f"{scores['average_with_english']:.2f}" for scores in found.values())])
    return markdown(["RankC", *found], rows)


def main() -> None:
    sections = [comparison("wikiann", "f1", *TAGGERS), missed("wikiann")]
    sections += [comparison("udpos", metric, *TAGGERS) for metric in ("f1", "accuracy")]
    sections += [missed("udpos"), comparison("xnli", "accuracy", *ALIGNED), single("xquad", "f1", "exact_match")]
    sections += [single("pawsx", "accuracy", "majority_rate"), retrieval(), retrieval_by_language(), rankc()]
    print("\n\n".join(sections))


if __name__ == "__main__":
    main()
