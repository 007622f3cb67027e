"""Print the tables of results/tasks/README.md from the files beside this one."""

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MODELS = {"before": "before", "ot_weight-0": "after, without OT", "ot_weight-0.1": "after, with OT"}


def read(*parts: str) -> dict[str, Any]:
    return json.loads(HERE.joinpath(*parts).read_text(encoding="utf-8"))


def markdown(heading: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [heading, ["---"] * len(heading), *rows])


def with_interval(value: float, interval: list[float] | None) -> str:
    return f"{value:.1f}" if interval is None else f"{value:.1f} [{interval[0]:.1f}, {interval[1]:.1f}]"


def tagging(task: str, metric: str) -> str:
    """Both models and their difference, a row a language and mean; `scores.json` has the families too."""
    found = read(task, "compare.json")
    plain, dlfa = (read(task, fusion, "scores.json") for fusion in ("none", "dlfa"))
    rows = []
    for name, row in found["differences"].items():
        cell = row[metric]
        if cell["difference"] is None or name in plain["families"]:
            continue
        values = [row_of(scores, name) for scores in (plain, dlfa)]
        cells = [with_interval(score[metric], interval[metric]) for score, interval in values]
        p = cell.get("p_adjusted", cell["p"])
        rows.append([name, *cells, with_interval(cell["difference"], cell["interval"]), f"{p:.3f}"])
    return markdown([f"{task}, {metric}", "plain", "DLFA", "DLFA - plain", "p"], rows)


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


def pawsx() -> str:
    scores = read("pawsx", "scores.json")
    rows = [
        [
            name,
            with_interval(values["accuracy"], intervals["accuracy"]),
            with_interval(values["majority_rate"], intervals["majority_rate"]),
        ]
        for name in (*scores["languages"], "average")
        for values, intervals in [row_of(scores, name)]
    ]
    return markdown(["pawsx", "accuracy", "majority rate"], rows)


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
    sections = [tagging("wikiann", "f1"), missed("wikiann"), tagging("udpos", "f1"), tagging("udpos", "accuracy")]
    sections += [missed("udpos"), pawsx(), retrieval(), retrieval_by_language(), rankc()]
    print("\n\n".join(sections))


if __name__ == "__main__":
    main()
