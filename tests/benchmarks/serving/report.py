"""What a run found, as a page for people (Markdown); the JSON is the same dictionary.

The JSON, schema_version 1: times in seconds, rates a second. A measurement that was not made is absent.

    schema_version, facts (names and values), seconds (of the whole run), notes (sentences)
    batching   max_num_seqs; continuous, static: ways; ratio
    modes      dynamic, static: ways; ratio
    prefix     requests, shared_tokens (of each prompt), prompt_tokens (of all); with, without: ways; ratio. These also
               have hit_rate and first_token_s {p50, p99}, medians over the turns
    arrivals   capacity (requests a second); rates, a list: rate, beyond_capacity, and what measure.served returns
    overhead   sequences, steps, context_len, limit_s, within_limit, step_s {name: {p50, p99}}

A way: seconds, tokens_per_s (medians over the turns), seconds_turns, steps, new_tokens,
prompt_tokens_computed, preemptions. A ratio: median, min, max, turns; how many times as fast.
"""

from typing import Any

from tests.benchmarks.markdown import markdown_table

SCHEMA_VERSION = 1


def page(found: dict[str, Any]) -> str:
    """The whole report."""
    facts = [f"- {name}: {value}" for name, value in found["facts"].items()]
    parts = ["\n".join([*facts, *(f"- {note}" for note in found["notes"]), f"- took {found['seconds']:.0f} s"])]
    parts += [section(found[name]) for name, section in SECTIONS.items() if name in found]
    return "\n\n".join(parts)


def _batching(found: dict[str, Any]) -> str:
    ways = {"continuous": found["continuous"], f"static, groups of {found['max_num_seqs']}": found["static"]}
    return _compared("Continuous against static batching", ways, found["ratio"], "continuous batching")


def _modes(found: dict[str, Any]) -> str:
    ways = {"static program": found["static"], "dynamic graph": found["dynamic"]}
    return _compared("Static program against dynamic graph", ways, found["ratio"], "the static program")


def _compared(title: str, ways: dict[str, Any], ratio: dict[str, Any], fast: str) -> str:
    rows = [["", "tokens/s", "s", "steps", "new tokens", "prompt tokens computed"]]
    for name, way in ways.items():
        counts = (way["steps"], way["new_tokens"], way["prompt_tokens_computed"])
        rows.append([name, f"{way['tokens_per_s']:.0f}", f"{way['seconds']:.2f}", *map(str, counts)])
    return (
        f"## {title}\n\n{markdown_table(rows)}\n\n{_times_as_fast(ratio, fast)}; the same tokens and log-probabilities."
    )


def _prefix(found: dict[str, Any]) -> str:
    rows = [["", "prompt tokens computed", "hit rate", "first token p50 ms", "p99 ms", "s"]]
    for name in ("with", "without"):
        way = found[name]
        first = way["first_token_s"]
        computed, rate = str(way["prompt_tokens_computed"]), f"{way['hit_rate']:.0%}"
        rows.append(
            [f"{name} prefix cache", computed, rate, _ms(first["p50"]), _ms(first["p99"]), f"{way['seconds']:.2f}"]
        )
    head = (
        f"## Prefix cache\n\n{found['requests']} requests at once, {found['prompt_tokens']} prompt tokens; "
        f"the first {found['shared_tokens']} of each are the same"
    )
    return f"{head}\n\n{markdown_table(rows)}\n\n{_times_as_fast(found['ratio'], 'with the cache')}; the same tokens."


def _arrivals(found: dict[str, Any]) -> str:
    rows = [
        [
            *("requests/s", "arrived/s", "answered/s", "unfinished at the last arrival"),
            *("first token p50 ms", "p99 ms", "time per token p50 ms", "p99 ms", ""),
        ]
    ]
    for rate in found["rates"]:
        arrived, first, token = rate["arrived_per_s"], rate["first_token_s"], rate["token_s"]
        rows.append(
            [
                f"{rate['rate']:.2f}",
                "-" if arrived is None else f"{arrived:.2f}",
                f"{rate['answered_per_s']:.2f}",
                f"{rate['unfinished_at_last_arrival']} of {rate['requests']}",
                *(_ms(times[p]) for times in (first, token) for p in ("p50", "p99")),
                "beyond capacity" if rate["beyond_capacity"] else "",
            ]
        )
    return (
        "## Requests that arrive one by one\n\nPoisson arrivals at `paddle-mixtral serve`, streamed. "
        f"Capacity, when all are there at once: {found['capacity']:.2f} requests/s\n\n{markdown_table(rows)}"
    )


def _overhead(found: dict[str, Any]) -> str:
    rows = [["decode step without a model", "p50 us", "p99 us"]]
    for name, seconds in found["step_s"].items():
        rows.append([name, *(f"{1e6 * seconds[p]:.0f}" for p in ("p50", "p99"))])
    limit, kept = f"{1e6 * found['limit_s']:.0f} us", "kept" if found["within_limit"] else "MISSED"
    return (
        f"## Engine overhead\n\n{found['sequences']} sequences running, contexts from {found['context_len']}, "
        f"{found['steps']} steps\n\n{markdown_table(rows)}\n\nLimit, for the median of tokens only: {limit}: {kept}."
    )


SECTIONS = {"batching": _batching, "arrivals": _arrivals, "prefix": _prefix, "overhead": _overhead, "modes": _modes}


def _times_as_fast(ratio: dict[str, Any], fast: str) -> str:
    return (
        f"{fast[0].upper()}{fast[1:]}: **{ratio['median']:.2f} times as fast** "
        f"({ratio['min']:.2f} to {ratio['max']:.2f} in {len(ratio['turns'])} turns)"
    )


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.1f}"
