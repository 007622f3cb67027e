"""Print the tables of results/epsilon/README.md from report/report.json."""

import json
from pathlib import Path
from typing import Any

REPORT = Path(__file__).parent / "report" / "report.json"
ARM = "main"
TASKS = {"xnli": "XNLI", "xquad": "XQuAD"}
METRICS = {"accuracy": "accuracy", "f1": "F1", "exact_match": "EM"}
# In order of the plans' entropy, with the levels of epsilon where None stands.
ORDER = ("no_ot", "exact", None, "product", "shuffled_pairs")
NAMES = {
    "no_ot": "no transport term",
    "exact": "exact (epsilon → 0)",
    "product": "product (epsilon → ∞)",
    "shuffled_pairs": "shuffled pairs, epsilon 0.1",
}


def main() -> None:
    report = json.loads(REPORT.read_text(encoding="utf-8"))
    for task in TASKS:
        print(table(report, task), end="\n\n")
    print(table_of_weights(report))


def table(report: dict[str, Any], task: str) -> str:
    """A row a condition of the main arm at its first weight: scores, differences to no OT, what the term did."""
    metrics = report["tasks"][task]["metrics"]
    lines = (ARM, report["lines"][0])
    conditions = {own["condition"]: own for own in report["conditions"] if own["task"] == task and own["line"] in lines}
    names = [name for own in ORDER for name in (report["axis"]["levels"] if own is None else [own])]
    first, *others = (METRICS[metric] for metric in metrics)
    heading = [
        *(TASKS[task], "seeds", f"{first} (95 %)", *others, f"difference to no OT, {first} (95 %)", "p (Holm)"),
        *("enf", "noenf", "P@1 after", "plan perplexity", "absolute epsilon", "gradient ratio, first / late"),
    ]
    rows = [row(conditions[name], metrics) for name in names if name in conditions]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heading, ["---"] * len(heading), *rows])


def table_of_weights(report: dict[str, Any]) -> str:
    """A row a weight: mean differences to no OT, over the seeds that all weights have, by task and epsilon."""
    found = {(own["task"], own["line"], own["condition"]): own for own in report["conditions"] if own["kind"] == "grid"}
    lines = sorted(report["lines"], key=lambda line: float(line.split()[-1]))
    lines_of_tasks = [(task, line) for task in TASKS for line in lines]
    levels = [level for level in report["axis"]["levels"] if all((*own, level) in found for own in lines_of_tasks)]
    seeds = sorted(set.intersection(*(set(own["seeds"]) for own in found.values())))
    heading = ["ot_weight", *(f"{name}, epsilon {level}" for name in TASKS.values() for level in levels)]
    rows = [heading, ["---"] * len(heading)]
    for line in lines:
        rows.append([line.split()[-1]])
        for task in TASKS:
            for level in levels:
                by_seed = found[task, line, level]["difference"]["by_seed"]
                mean = sum(by_seed[str(seed)] for seed in seeds) / len(seeds)
                rows[-1].append(f"{signed(mean)} ({', '.join(signed(by_seed[str(seed)]) for seed in seeds)})")
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def row(condition: dict[str, Any], metrics: list[str]) -> list[str]:
    name = condition["condition"]
    headline = condition["scores"][metrics[0]]["headline"]
    low, high = headline["interval"]
    cells = [NAMES.get(name, f"epsilon {name}"), str(len(condition["seeds"]))]
    cells += [f"{headline['value']:.2f} ({low:.1f} to {high:.1f})"]
    cells += [f"{condition['scores'][metric]['headline']['value']:.2f}" for metric in metrics[1:]]
    cells += [""] * 4 if condition["difference"] is None else difference(condition["difference"], metrics[0])
    return [*cells, f"{condition['retrieval']['after']['mean']:.1f}", *transport(condition)]


def difference(found: dict[str, Any], metric: str) -> list[str]:
    scores = found["scores"][metric]
    low, high = map(signed, scores["headline"]["interval"])
    p = "–" if found["p_holm"] is None else f"{found['p_holm']:.3f}"
    groups = [signed(scores[group]["value"]) for group in ("enf", "noenf")]
    return [f"{signed(scores['headline']['value'])} ({low} to {high})", p, *groups]


def transport(condition: dict[str, Any]) -> list[str]:
    """Plan perplexity, absolute epsilon and the gradient ratios; empty where there are none."""
    found, ratio = condition["transport"], condition["gradient_ratio"]
    if found is None:
        return [""] * 3
    epsilon = "" if found["epsilon"] is None else f"{found['epsilon']:.2g}"
    return [f"{found['plan_perplexity']:.2f}", epsilon, f"{ratio['first']:.2f} / {ratio['late']:.3f}"]


def signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")


if __name__ == "__main__":
    main()
