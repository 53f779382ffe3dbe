"""The results as a page for people (Markdown) and as JSON for programs."""

import statistics
from dataclasses import asdict
from typing import Any

from tests.benchmarks.markdown import markdown_table
from tests.benchmarks.peers.entries import Entry
from tests.benchmarks.peers.protocol import Case
from tests.benchmarks.peers.rounds import Results

IDLE = 0.05  # more of the processors' time in use than this, and the page says so


def page(
    results: Results, entries: list[Entry], cases: tuple[Case, ...], active_bytes: dict[str, int], facts: dict[str, str]
) -> str:
    """Facts of the run, the table, ratios, and what did not run.

    Args:
        entries: rows, in order.
        active_bytes: bytes a token reads, by an entry's key.
        facts: what is known of machine, date and model: name and value.
    """
    parts = [
        "\n".join(f"- {name}: {value}" for name, value in facts.items()) + "\n" + _conditions(results),
        _speeds(results, entries, cases, active_bytes),
    ]
    for ours in [entry for entry in entries if entry.ours and results.of(entry.key)]:
        parts.append(_ratios(results, ours, entries, cases))
    parts.append(_versions(results, entries))
    if missing := _missing(results, entries, cases):
        parts.append(missing)
    return "\n\n".join(parts) + "\n"


def figures(
    results: Results, entries: list[Entry], cases: tuple[Case, ...], active_bytes: dict[str, int], facts: dict[str, str]
) -> dict[str, Any]:
    """The same for programs: rates in tokens per second, sizes in bytes, and every single run."""
    engines = {}
    for entry in entries:
        rates = {case.name: results.rates(entry.key, case.name) for case in cases}
        engines[entry.key] = {
            "title": entry.title,
            "weight_format": entry.weight_format,
            "active_bytes": active_bytes.get(entry.key),
            "did_not_run": results.failed.get(entry.key),
            "tokens_per_s": {name: _summary(found) for name, found in rates.items() if found},
        }
    return {
        "facts": facts,
        "cases": [asdict(case) | {"name": case.name} for case in cases],
        "engines": engines,
        "runs": [asdict(run) for run in results.runs],
    }


def _summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _conditions(results: Results) -> str:
    if not results.runs:
        return "- nothing ran"
    rates = [run.bandwidth / 1e9 for run in results.runs]
    busy = [run.busy for run in results.runs]
    warning = f" (over {IDLE:.0%}: not a quiet machine, do not quote these figures)" if max(busy) > IDLE else ""
    return (
        f"- read bandwidth around the runs: {statistics.median(rates):.1f} GB/s "
        f"({min(rates):.1f} to {max(rates):.1f})\n"
        f"- processors in use before the runs: {statistics.median(busy):.0%}, at most {max(busy):.0%}{warning}"
    )


def _speeds(results: Results, entries: list[Entry], cases: tuple[Case, ...], active_bytes: dict[str, int]) -> str:
    header = ["tokens/s"]
    for case in cases:
        header += [case.name, "% of read"] if _reads_once(case) else [case.name]
    rows = [[*header, "load s", "peak GB"]]
    for entry in entries:
        runs = results.of(entry.key)
        if not runs:
            reason = results.failed.get(entry.key, "not reached")
            rows.append([entry.title, f"did not run: {_cell(reason)}", *[""] * (len(rows[0]) - 2)])
            continue
        row = [entry.title]
        for case in cases:
            row.append(_median(results.rates(entry.key, case.name)))
            if _reads_once(case):
                shares = results.shares(entry.key, case.name, active_bytes[entry.key])
                row.append(f"{statistics.median(shares):.0%}" if shares else "-")
        row.append(_median([run.answer.load_s for run in runs]))
        row.append(f"{max(run.answer.peak_bytes for run in runs) / 1e9:.1f}")
        rows.append(row)
    return markdown_table(rows)


def _ratios(results: Results, ours: Entry, entries: list[Entry], cases: tuple[Case, ...]) -> str:
    rows = [[f"{ours.title}, times as fast as", *(case.name for case in cases)]]
    for entry in entries:
        if entry is not ours and results.of(entry.key):
            ratios = [results.ratios(ours.key, entry.key, case.name) for case in cases]
            rows.append([entry.title, *(f"{statistics.median(found):.2f}x" if found else "-" for found in ratios)])
    return markdown_table(rows)


def _versions(results: Results, entries: list[Entry]) -> str:
    lines = []
    for entry in entries:
        if runs := results.of(entry.key):
            versions = ", ".join(f"{name} {version}" for name, version in runs[0].answer.versions.items())
            lines.append(f"- {entry.title}: {versions}")
    return "\n".join(lines)


def _missing(results: Results, entries: list[Entry], cases: tuple[Case, ...]) -> str:
    lines = []
    for entry in entries:
        runs = results.of(entry.key)
        if runs and entry.key in results.failed:
            lines.append(f"- {entry.title} stopped after {len(runs)} round(s): {results.failed[entry.key]}")
        elif not runs:
            lines.append(f"- {entry.title} did not run: {results.failed.get(entry.key, 'not reached')}")
        for case in cases:
            if reason := results.why_not(entry.key, case.name):
                lines.append(f"- {entry.title}, {case.name}: {reason}")
    return "\n".join(lines)


def _reads_once(case: Case) -> bool:
    """Whether a step reads the active weights of one token, so that bandwidth bounds it."""
    return case.batch == 1 and case.new_tokens > 1


def _median(values: list[float]) -> str:
    if not values:
        return "-"
    digits = 0 if statistics.median(values) >= 100 else 1
    text = f"{statistics.median(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} [{min(values):.{digits}f} - {max(values):.{digits}f}]"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
