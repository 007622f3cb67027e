"""What a study shows and what it does not, in words that follow from the content of `report.json`.

A difference is called shown where its test rejects (p below 0.05, adjusted for a family) and its interval leaves 0 out.
A slope is, where the permutation test rejects, the interval leaves 0 out, and so does the t test over the slopes of the
seeds, for the first is about these seeds alone. A dependence on a field without an order is shown where omega squared's
test rejects. Everything else is not shown, which is not the same as shown to be nothing: the smallest effect that the
design would have found stands beside it, where there is one.
"""

import itertools
from collections.abc import Callable
from typing import Any

from xlfa.scores import describe_examples
from xlfa.study.analysis import DEVIATIONS, POINTS
from xlfa.study.conditions import CONTROL, GRID
from xlfa.study.figures import METRIC_NAMES, condition_name, control_name, of_line, task_name
from xlfa.study.resampling import ENF, HEADLINE, leaves_zero_out
from xlfa.study.significance import ALPHA

SHOWN, NOT_SHOWN, NOT_TESTED = "Shown", "Not shown", "Not tested"
BETTER, WORSE = "better", "worse"


def conclude(report: dict[str, Any]) -> list[dict[str, str]]:
    """Statements in reading order: `verdict` (empty for a plain fact) and `text`."""
    statements = [_statement("", _setting(report))]
    for line in report["lines"]:
        where = f" ({line})" if len(report["lines"]) > 1 else ""
        statements += _interactions(report, line, where)
        for task in report["tasks"]:
            if of_line(report, task, line):
                statements.append(_trend(report, task, line, where))
                statements += _differences(report, of_line(report, task, line), where)
                statements += _contrasts(report, of_line(report, task, line), where)
    for arm, task in itertools.product(report["arms"], report["tasks"]):
        where = f" ({arm})" if len(report["arms"]) > 1 else ""
        statements += _effects(report, task, arm, where)
        of_arm = [own for own in report["conditions"] if (own["task"], own["arm"]) == (task, arm)]
        statements += _differences(report, [own for own in of_arm if own["kind"] == CONTROL], where)
    for task in report["tasks"]:
        statements += _effects(report, task, None, "")
    for line in report["lines"]:
        statements += _choices(report, line, f" ({line})" if len(report["lines"]) > 1 else "")
    statements += _transport(report)
    return [*statements, _statement("", _limits(report))]


def _statement(verdict: str, text: str) -> dict[str, str]:
    return {"verdict": verdict, "text": text}


def is_shown(p: float | None, bounds: list[float] | None) -> bool:
    """Whether the test rejects and the interval leaves 0 out."""
    return p is not None and p < ALPHA and bounds is not None and leaves_zero_out(bounds)


def is_slope_shown(entry: dict[str, Any]) -> bool:
    """Whether both tests reject and the interval leaves 0 out."""
    over_seeds = entry["slopes_p"]
    return is_shown(entry["test"]["slope_p"], entry["interval"]) and over_seeds is not None and over_seeds < ALPHA


def format_p(p: float | None) -> str:
    """`p = 0.012`, `p < 0.001`, or that there is none."""
    if p is None:
        return "no test"
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def signed(value: float) -> str:
    """`+1.20`, with a minus sign and not a hyphen."""
    return f"{round(value, 2) + 0.0:+.2f}".replace("-", "\N{MINUS SIGN}")


def format_interval(bounds: list[float] | None, show: Callable[[float], str] = signed) -> str:
    """`95 % interval −0.30 to +1.20`."""
    return "no interval" if bounds is None else f"95 % interval {show(bounds[0])} to {show(bounds[1])}"


def slope_text(value: float) -> str:
    """`+1.2`, to three digits: a slope's size depends on the field's unit."""
    return f"{value + 0.0:+.3g}".replace("-", "\N{MINUS SIGN}")


def join(words: list[str]) -> str:
    """`a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def count(number: int, noun: str) -> str:
    """`1 seed`, `2 seeds`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _setting(report: dict[str, Any]) -> str:
    facts = report["facts"]
    parts = [
        f"{count(report['cells'], 'finished cell')} of the study {report['study']}, encoder "
        f"{join(facts['encoders'] or ['not recorded'])}, {count(len(facts['seeds']), 'seed')}."
    ]
    for task, own in facts["tasks"].items():
        trained = join([str(name) for name in own["train_dataset"]] or ["the task's own training set"])
        limits = [f"{number:,}" for number in own["max_train_examples"]]
        most = f", at most {join(limits)} examples of it" if limits else ""
        parts.append(
            f"{task_name(task)}: trained on {trained}{most}, scored on {describe_examples(report['tasks'][task])} in "
            f"{len(report['tasks'][task]['languages'])} languages."
        )
    parts.append(f"The headline is the mean over {' '.join(report['headline'])}.")
    if report["missing"] or report["unfinished"]:
        parts.append(
            f"The study is not complete: {count(len(report['missing']), 'cell')} of the grid not there, "
            f"{count(len(report['unfinished']), 'cell')} begun without a result. Comparisons use the seeds that both "
            "sides have."
        )
    if facts["seeds_on_several_machines"]:
        seeds = join([str(seed) for seed in facts["seeds_on_several_machines"]])
        parts.append(
            f"Cells of seed {seeds} that are compared ran on different kinds of machine, whose rounding differs."
        )
    return " ".join(parts)


def _interactions(report: dict[str, Any], line: str, where: str) -> list[dict[str, str]]:
    statements = []
    entries = [entry for entry in report["interactions"] if entry["line"] == line]
    for points in (entry for entry in entries if entry["unit"] == POINTS):
        standardised = next(
            entry for entry in entries if entry["unit"] == DEVIATIONS and entry["tasks"] == points["tasks"]
        )
        first, second = map(task_name, points["tasks"])
        question = f"that {report['axis']['name']} acts differently on {second} than on {first}{where}"
        if points["primary"]:
            question += " (the primary test)"
        statements.append(
            _dependence(report, points, standardised, question, f"the slope of {second} minus that of {first}")
        )
    return statements


def _trend(report: dict[str, Any], task: str, line: str, where: str) -> dict[str, str]:
    entry = next(own for own in report["trends"] if (own["task"], own["line"]) == (task, line))
    name = task_name(task)
    axis = report["axis"]
    verb = "depends on" if axis["kind"] == "categorical" else "rises or falls with"
    return _dependence(report, entry, None, f"that {name} {verb} {axis['name']}{where}", f"the slope of {name}")


def _dependence(
    report: dict[str, Any], entry: dict[str, Any], standardised: dict[str, Any] | None, question: str, slope: str
) -> dict[str, str]:
    """Whether a response depends on the axis: by the slope on an axis of numbers, else by omega squared."""
    test = entry["test"]
    if test is None or (test["slope"] is None and test["omega_squared"] is None):
        return _statement(NOT_TESTED, f"{question}: no seed has two levels of it, or nothing is left for the error.")
    size = f"n = {count(len(entry['seeds']), 'seed')}, {_observations(report, entry)}"
    omega = ""
    if test["omega_squared"] is not None:
        omega = (
            f"omega² = {signed(test['omega_squared'])} ({format_p(test['omega_squared_p'])}; of pure noise "
            f"{signed(test['null_mean'])} on average, and below {test['null_high']:.2f} in 95 % of cases)"
        )
    if test["slope"] is None:
        verdict = SHOWN if test["omega_squared_p"] < ALPHA else NOT_SHOWN
        found = f"{question}: {omega}, {size}.{_too_few(test['smallest_omega_p'])}"
        if standardised is not None and standardised["test"] is not None:
            found += f" In units of the seeds' deviation: {format_p(standardised['test']['omega_squared_p'])}."
        return _statement(verdict, found)
    found = (
        f"{question}: {slope} is {slope_text(test['slope'])} points per {report['axis']['unit']} "
        f"({format_interval(entry['interval'], slope_text)}, permutation {format_p(test['slope_p'])}, "
        f"t over seeds {format_p(entry['slopes_p'])}, {size})" + (f"; as a factor, {omega}." if omega else ".")
    )
    if entry["slopes_p"] is None:
        return _statement(NOT_TESTED, f"{found} To say something of other seeds takes two, and a spread between them.")
    shown = is_slope_shown(entry)
    parts = {test["slope_p"] < ALPHA, entry["slopes_p"] < ALPHA, leaves_zero_out(entry["interval"])}
    if len(parts) > 1:
        found += " The tests and the interval disagree."
    if standardised is not None and standardised["test"] is not None:
        found += _in_deviations(standardised, test["slope"], shown)
    if not shown:
        if omega and test["omega_squared_p"] < ALPHA:
            found += " Its levels differ as a factor: a dependence that is no straight line is not ruled out."
        too_few = _too_few(test["smallest_slope_p"])
        found += too_few
        if not too_few and entry["detectable"] is not None:
            found += f" A true slope below {entry['detectable']:.3g} would be missed in more than 1 of 5 such studies."
    return _statement(SHOWN if shown else NOT_SHOWN, found)


def _observations(report: dict[str, Any], entry: dict[str, Any]) -> str:
    """How many there are and what of; which levels, where these are not all."""
    whole = len(entry["seeds"]) * len(entry["levels"])
    found = str(entry["observations"]) + (f" of {whole}" if entry["observations"] < whole else "")
    found += " scores" if entry["reference"] is None else f" differences to {control_name(entry['reference'])}"
    return found + (f" at {join(entry['levels'])}" if len(entry["levels"]) < len(report["axis"]["levels"]) else "")


def _in_deviations(standardised: dict[str, Any], slope: float, shown: bool) -> str:
    """The slope in the other unit, and whether that says something else."""
    other = standardised["test"]
    if is_slope_shown(standardised) != shown:
        remark = ": the verdict depends on the unit."
    else:
        remark = ", of the other sign." if other["slope"] * slope < 0 else "."
    p = format_p(other["slope_p"])
    return f" In units of the seeds' deviation it is {slope_text(other['slope'])} ({p}){remark}"


def _too_few(smallest_p: float) -> str:
    """That no arrangement of the values has a p below 0.05, where it is so."""
    if smallest_p < ALPHA:
        return ""
    return f" With so few seeds nothing could have been shown: the smallest possible p is {smallest_p:.3f}."


def _differences(report: dict[str, Any], conditions: list[dict[str, Any]], where: str) -> list[dict[str, str]]:
    """The secondary tests: levels or controls of a task against the baseline."""
    family = [own for own in conditions if own["difference"]]
    if not family:
        return []
    metric = report["tasks"][family[0]["task"]]["metrics"][0]
    effects = []
    for own in family:
        found = own["difference"]
        effects.append((condition_name(report, own), found | found["scores"][metric][HEADLINE]))
    baseline = control_name(family[0]["difference"]["baseline"])
    words = {
        BETTER: f"better than {baseline}",
        WORSE: f"worse than {baseline}",
        NOT_SHOWN: f"a difference to {baseline}",
    }
    least = _least([effect for _, effect in effects])
    return _secondary(report, family[0]["task"], effects, where, words, _unit_of(family), least)


def _unit_of(family: list[dict[str, Any]]) -> str:
    """What is counted in a family of conditions."""
    return "level" if family[0]["kind"] == GRID else "control"


def _least(effects: list[dict[str, Any]]) -> str:
    """What a family of tests could have found."""
    # A level of few seeds does not say what those of more could have found.
    by_seeds: dict[int, tuple[float, float]] = {}
    for own in effects:
        if own["detectable"]:
            found = own["detectable"], own["detectable_holm"]
            by_seeds[len(own["seeds"])] = max(found, by_seeds.get(len(own["seeds"]), found))
    if not by_seeds:
        return ""
    found = join(
        [
            f"{single:.2f} points"
            + (f" ({strictest:.2f} at the strictest of Holm's steps)" if strictest > single else "")
            + (f" with {count(seeds, 'seed')}" if len(by_seeds) > 1 else "")
            for seeds, (single, strictest) in sorted(by_seeds.items(), reverse=True)
        ]
    )
    return f" The smallest true difference that 4 in 5 such studies find: {found}."


def _effects(report: dict[str, Any], task: str, arm: str | None, where: str) -> list[dict[str, str]]:
    """The values of each field beside the axis, or without an arm the arms, held against each other."""
    own = [effect for effect in report["effects"] if (effect["task"], effect["arm"]) == (task, arm)]
    metric = report["tasks"][task]["metrics"][0]
    statements = []
    for (name, is_mean), group in itertools.groupby(own, key=lambda effect: (effect["field"], effect["at"] is None)):
        family = list(group)
        effects = [
            (
                f"{effect['second']} − {effect['first']}" + ("" if is_mean else f" at {effect['at']}"),
                effect | effect["scores"][metric][HEADLINE],
            )
            for effect in family
        ]
        pairs = sorted({effect["pairs"] for effect in family})
        over = "" if pairs == [1] else f", a mean over {join([str(number) for number in pairs])} other settings"
        words = {
            BETTER: f"a better value of {name}{over}",
            WORSE: f"a worse value of {name}{over}",
            NOT_SHOWN: f"a difference between values of {name}{over}",
        }
        statements += _secondary(report, task, effects, where, words, "pair", _least(family))
    return statements


def _contrasts(report: dict[str, Any], conditions: list[dict[str, Any]], where: str) -> list[dict[str, str]]:
    """Whether levels do more for English and German than for the other languages."""
    family = [own for own in conditions if own["difference"] and own["difference"]["contrast"]]
    if not family:
        return []
    effects = [(condition_name(report, own), own["difference"]["contrast"]) for own in family]
    baseline = control_name(family[0]["difference"]["baseline"])
    near = join(report["tasks"][family[0]["task"]]["groups"][ENF])
    # Of two losses the smaller one is the higher difference.
    words = {
        BETTER: f"a higher difference to {baseline} on {near} than on the others",
        WORSE: f"a lower difference to {baseline} on {near} than on the others",
        NOT_SHOWN: f"another difference to {baseline} on {near} than on the others",
    }
    return _secondary(report, family[0]["task"], effects, where, words, _unit_of(family), "")


def _secondary(
    report: dict[str, Any],
    task: str,
    effects: list[tuple[str, dict[str, Any]]],
    where: str,
    words: dict[str, str],
    unit: str,
    least: str,
) -> list[dict[str, str]]:
    """A statement for each verdict that the effects of a family have.

    Args:
        effects: a name, and its effect's `value`, `interval`, `p_holm`, `family`, `seeds`.
        words: what is shown, or not, by verdict.
        unit: what the effects are of.
        least: what could have been found, where nothing is shown.
    """
    metric = report["tasks"][task]["metrics"][0]
    by_verdict: dict[str, list[str]] = {}
    for label, effect in effects:
        p, bounds, value = effect["p_holm"], effect["interval"], effect["value"]
        verdict = NOT_TESTED if p is None else SHOWN if is_shown(p, bounds) else NOT_SHOWN
        direction = {SHOWN: BETTER if value > 0 else WORSE}.get(verdict, verdict)
        by_verdict.setdefault(direction, []).append(
            f"{label} {signed(value)} ({format_interval(bounds)}, {format_p(p)}, n = {len(effect['seeds'])})"
        )
    name = f"{task_name(task)} {METRIC_NAMES.get(metric, metric)}{where}"
    adjusted = f"p adjusted (Holm) for {count(effects[0][1]['family'], unit)}."
    statements = []
    for direction, verdict, text, after in (
        (BETTER, SHOWN, words[BETTER], adjusted),
        (WORSE, SHOWN, words[WORSE], adjusted),
        (NOT_SHOWN, NOT_SHOWN, words[NOT_SHOWN], adjusted + least),
        (NOT_TESTED, NOT_TESTED, words[NOT_SHOWN], "It takes two seeds, and a spread between them."),
    ):
        if direction in by_verdict:
            statements.append(_statement(verdict, f"{name}, {text}: {'; '.join(by_verdict[direction])}. {after}"))
    return statements


def _choices(report: dict[str, Any], line: str, where: str) -> list[dict[str, str]]:
    statements = []
    for own in report["selection"]:
        if own["line"] != line:
            continue
        chosen, best = (_level(report, own[name]) for name in ("chosen_by_english", "best_by_targets"))
        seeds = f"n = {count(len(own['seeds']), 'seed')}"
        if own["left_out"]:
            seeds += f", without {join([_level(report, level) for level in own['left_out']])}, of fewer"
        text = f"{task_name(own['task'])}{where} ({seeds}): English validation would choose {chosen}, "
        if chosen == best:
            text += "which is also the best in the target languages."
        else:
            text += (
                f"the target languages are best at {best}; the choice costs {own['cost']:.2f} points "
                f"({format_interval(own['interval'])}; never below 0, as the best is chosen on the same scores)."
            )
        if own["held_out_cost"] is not None:
            text += f" With both choices made on the other seeds it costs {signed(own['held_out_cost'])} points."
        statements.append(_statement("", text))
    return statements


def _level(report: dict[str, Any], level: str) -> str:
    """A level with the field's name, which a categorical one has already."""
    return level if report["axis"]["kind"] == "categorical" else f"{report['axis']['name']} {level}"


def _transport(report: dict[str, Any]) -> list[dict[str, str]]:
    """A warning where transport plans were not converged."""
    worst = []
    for own in report["conditions"]:
        share = (own["transport"] or {}).get("not_converged") or 0.0
        if share >= 0.01:
            where = f" ({own['line']})" if len(report["lines"]) > 1 else ""
            worst.append(f"{task_name(own['task'])}{where} {condition_name(report, own)} {100 * share:.1f} %")
    if not worst:
        return []
    return [_statement("", f"Pairs whose transport plan had not converged, 1 % or more of them: {'; '.join(worst)}.")]


def _limits(report: dict[str, Any]) -> str:
    seeds = len(report["facts"]["seeds"])
    return (
        f"Limits: {count(len(report['facts']['encoders']), 'encoder')}; permutation tests are about these seeds on "
        "these examples, t tests say what other seeds would do on them, intervals also what other examples would do, "
        f"all from {count(seeds, 'seed')}. Intervals of few seeds hold the truth less often than they say, and those "
        "of a single one say nothing of other seeds. Languages one by one are not adjusted for their number. Not shown "
        "does not mean that there is no effect."
    )
