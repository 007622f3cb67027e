"""Print the tables of results/first_run/README.md from the scores beside this file."""

import json
from pathlib import Path

HERE = Path(__file__).parent
VARIANTS = ("plain", "dlfa", "ot", "dlfa_ot")
SUMMARIES = ("average", "average_xtreme", "enf", "noenf", "transfer_gap")


def table(task: str, metric: str) -> str:
    """A Markdown table of one metric: a row a language and mean, a column a model that has been scored."""
    scores = {
        variant: json.loads((HERE / task / variant / "scores.json").read_text(encoding="utf-8"))
        for variant in VARIANTS
        if (HERE / task / variant / "scores.json").is_file()
    }
    if len({tuple(run["ids"]) for run in scores.values()}) != 1:
        raise SystemExit(f"{task}: the models were not scored on the same examples")
    first = next(iter(scores.values()))
    lines = [f"| {task}, {metric} | " + " | ".join(scores) + " |", "|---" * (len(scores) + 1) + "|"]
    for language in first["languages"]:
        cells = (f"{run['languages'][language][metric]:.1f}" for run in scores.values())
        lines.append(f"| {language} | " + " | ".join(cells) + " |")
    for name in SUMMARIES:
        lines.append(f"| **{name}** | " + " | ".join(f"{run[name][metric]:.2f}" for run in scores.values()) + " |")
    return "\n".join([*lines, f"\n{first['examples']} examples a language."])


if __name__ == "__main__":
    for task, metric in (("xnli", "accuracy"), ("xquad", "f1"), ("xquad", "exact_match")):
        print(table(task, metric), end="\n\n")
