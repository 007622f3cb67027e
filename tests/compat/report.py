"""A pytest plugin: closes a run with one line for each check, whose cases are too many to name."""

from collections import Counter, defaultdict


def pytest_terminal_summary(terminalreporter):
    counts, reasons = defaultdict(Counter), defaultdict(set)
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            check = report.nodeid.split("[")[0].split("::")[-1].removeprefix("test_").replace("_", " ")
            counts[check][outcome] += 1
            if outcome == "skipped":
                reasons[check].add(report.longrepr[2].removeprefix("Skipped: "))
    for check, outcomes in sorted(counts.items()):
        result = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items())
        why = f" ({', '.join(sorted(reasons[check]))})" if reasons[check] else ""
        terminalreporter.write_line(f"{check}: {result}{why}")
