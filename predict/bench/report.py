"""What a run found: figures for programs (a dictionary, written as JSON) and a table for people.

The JSON, schema_version 2. All times in seconds, sizes in bytes, rates per second; of rank 0 where ranks differ.

    schema_version, date (ISO 8601, UTC), version, paddle_version, command (the arguments)
    machine     processor, processors, memory, instruction_set, load_average (1 minute, before the run), device: null,
                or name, memory, used_bytes (at the end) of the GPU that did the work
    model       name, mode, dtype, quant_type, num_hidden_layers, num_local_experts, weight_bytes (all ranks),
                ranks, threads (of a rank), block_size, max_position_embeddings
    loading     seconds, peak_bytes, before_bytes (the process before it loaded anything)
    running     peak_bytes (cache and the buffer the read rate is measured on included), buffer_bytes
    ceilings    memory: {p10, p50, p90, readings}; memory_kind: "read", or "copy" (bytes read and written);
                matrix: {unit: the same}; matrix_unit: the one percentages are of; null: ``missing`` says why
    left_out    defaults the model was too short for, as sentences
    measurements, a list of
        kind            "prefill" or "decode"
        batch_size, context_len (decode: before the first step), new_tokens (a repetition)
        tokens_per_s    {p10, p50, p90}: of steps of decode, of prompts of prefill
        step_s          the same of the time itself; for prefill the time to first token
        bytes_per_s, operations_per_s, share_of_memory_rate, share_of_matrix_rate (or null)   medians over samples
        active_bytes, operations, experts_hit (a layer), busiest_share   medians over samples
        outside_kernels_s, share_outside_kernels   medians over samples; null on a GPU, whose kernels are not timed
        kernel_share    {kernel: its share of the time}
        samples         every step (decode) or prompt (prefill): the fields of predict.bench.measure.Sample
"""

import dataclasses
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np

from predict.bench.measure import STEPS_BETWEEN_RATES, Sample
from predict.bench.plan import Decode

SCHEMA_VERSION = 2
MEMORY_VERBS = {"read": "reads", "copy": "copies (read and written)"}


def percentiles(values: Seq[float]) -> dict[str, float]:
    """p10, p50 and p90."""
    return {f"p{p}": float(np.percentile(values, p)) for p in (10, 50, 90)}


def measurement(what: int | Decode, samples: list[Sample], gen_len: int) -> dict[str, Any]:
    """One entry of the JSON's measurements: of a prompt length, or of a decode."""
    if isinstance(what, Decode):
        tokens = what.batch_size
        kind = {"kind": "decode", "batch_size": tokens, "context_len": what.context_len, "new_tokens": gen_len}
    else:
        tokens = what
        kind = {"kind": "prefill", "batch_size": 1, "context_len": 0, "new_tokens": what}
    total = sum(s.seconds for s in samples)
    names = sorted({name for s in samples for name in s.kernel_s})
    kernels = {name: sum(s.kernel_s.get(name, 0.0) for s in samples) / total for name in names}
    outside = [s.seconds - sum(s.kernel_s.values()) if s.kernel_s else None for s in samples]
    return {
        **kind,
        "tokens_per_s": percentiles([tokens / s.seconds for s in samples]),
        "step_s": percentiles([s.seconds for s in samples]),
        "bytes_per_s": _median(s.active_bytes / s.seconds for s in samples),
        "operations_per_s": _median(s.operations / s.seconds for s in samples),
        "share_of_memory_rate": _median(s.active_bytes / s.seconds / s.memory_rate for s in samples),
        "share_of_matrix_rate": _median(s.matrix_rate and s.operations / s.seconds / s.matrix_rate for s in samples),
        "active_bytes": _median(s.active_bytes for s in samples),
        "operations": _median(s.operations for s in samples),
        "experts_hit": _median(s.experts_hit for s in samples),
        "busiest_share": _median(s.busiest_share for s in samples),
        "outside_kernels_s": _median(outside),
        "share_outside_kernels": _median(o and o / s.seconds for o, s in zip(outside, samples, strict=True)),
        "kernel_share": dict(sorted(kernels.items(), key=lambda item: -item[1])),
        "samples": [dataclasses.asdict(s) for s in samples],
    }


def _median(values: Iterable[float | None]) -> float | None:
    """None where any value is."""
    found = list(values)
    known = [value for value in found if value is not None]
    return float(np.median(known)) if len(known) == len(found) else None


def table(found: dict[str, Any]) -> str:
    """The report for people."""
    parts = [_header(found), _speeds(found), _shares(found), _footer(found)]
    return "\n\n".join(filter(None, parts))


def name_of(entry: dict[str, Any]) -> str:
    """What a measurement is called in the table and the picture."""
    if entry["kind"] == "prefill":
        return f"prefill {entry['new_tokens']}"
    return f"decode, batch {entry['batch_size']}, context {entry['context_len']}"


def describe(found: dict[str, Any]) -> list[str]:
    """Two lines: the model and how it runs, and on what."""
    machine, model = found["machine"], found["model"]
    weights = model["quant_type"] or f"{model['dtype']} weights"
    device = machine["device"]
    kernels = f"{machine['instruction_set']} kernels" if device is None else f"on {device['name']}"
    return [
        f"{model['name']}, {_plural(model['num_hidden_layers'], 'layer')}, {model['dtype']}, {weights} "
        f"({model['weight_bytes'] / 1e9:.2f} GB), {model['mode']}; {_plural(model['ranks'], 'rank')} of "
        f"{_plural(model['threads'], 'thread')}, {kernels}",
        f"{machine['processor']}, {_plural(machine['processors'], 'processor')}, {machine['memory'] / 1e9:.1f} GB; "
        f"{found['date']}, paddle-mixtral {found['version']}, Paddle {found['paddle_version']}",
    ]


def _header(found: dict[str, Any]) -> str:
    loading, running, ceilings = found["loading"], found["running"], found["ceilings"]
    memory, kind, device = ceilings["memory"], ceilings["memory_kind"], found["machine"]["device"]
    units = ", ".join(f"{name} {_tera(rate['p50'])}" for name, rate in ceilings["matrix"].items())
    matrix = f"TFLOP/s: {units}" if units else f"matrix rate: not measured ({ceilings['missing']})"
    model, machine = describe(found)
    buffer = f" ({running['buffer_bytes'] / 1e9:.2f} GB of it to measure memory)" if running["buffer_bytes"] else ""
    on_device = f"; of {device['memory'] / 1e9:.1f} GB on the GPU {device['used_bytes'] / 1e9:.1f}" if device else ""
    lines = {
        "model": model,
        "machine": f"{machine}; load average {found['machine']['load_average']:.1f} before the run",
        "loading": f"{loading['seconds']:.1f} s, peak memory {loading['peak_bytes'] / 1e9:.2f} GB "
        f"({loading['before_bytes'] / 1e9:.2f} GB of it before); running {running['peak_bytes'] / 1e9:.2f} GB"
        f"{buffer}{on_device}",
        "ceilings": f"memory {MEMORY_VERBS[kind]} {memory['p50'] / 1e9:.1f} GB/s (p10 {memory['p10'] / 1e9:.1f}, "
        f"p90 {memory['p90'] / 1e9:.1f}); {matrix}",
    }
    return "\n".join(f"{name:<9} {text}" for name, text in lines.items())


def _speeds(found: dict[str, Any]) -> str:
    ceilings, experts = found["ceilings"], found["model"]["num_local_experts"]
    shares = f"of {ceilings['memory_kind']}", f"of {ceilings['matrix_unit'] or 'matrix rate'}"
    head = ["", "tokens/s p10", "p50", "p90", "ms", "GB/s", shares[0], "TFLOP/s", shares[1], "experts"]
    rows = [[*head, "outside kernels"]]
    for entry in found["measurements"]:
        speed, outside = entry["tokens_per_s"], entry["outside_kernels_s"]
        rows.append(
            [
                name_of(entry),
                *(_speed(speed[p]) for p in ("p10", "p50", "p90")),
                f"{entry['step_s']['p50'] * 1e3:.2f}",
                f"{entry['bytes_per_s'] / 1e9:.2f}",
                _percent(entry["share_of_memory_rate"]),
                _tera(entry["operations_per_s"]),
                _percent(entry["share_of_matrix_rate"]),
                f"{entry['experts_hit']:.1f} of {experts}",
                "-" if outside is None else f"{outside * 1e6:.0f} us {_percent(entry['share_outside_kernels'])}",
            ]
        )
    return _aligned(rows)


def _shares(found: dict[str, Any]) -> str:
    """Where the time goes, in the kernels that take a hundredth of any measurement."""
    entries = found["measurements"]
    if found["machine"]["device"] is not None:
        return ""
    names: list[str] = []
    for entry in entries:
        names += [n for n, share in entry["kernel_share"].items() if share >= 0.01 and n not in names]
    rows = [["share of the time", *names, "other kernels", "outside kernels"]]
    for entry in entries:
        shares = entry["kernel_share"]
        others = sum(share for name, share in shares.items() if name not in names)
        row = [*(shares.get(name, 0.0) for name in names), others, 1 - sum(shares.values())]
        rows.append([name_of(entry), *map(_percent, row)])
    return _aligned(rows)


def _footer(found: dict[str, Any]) -> str:
    unit, kind = found["ceilings"]["matrix_unit"], found["ceilings"]["memory_kind"]
    lines = [
        "tokens/s: median, 10th and 90th percentile over all steps of decoding, over the repetitions of a prefill.",
        "ms: a step of decoding; of a prefill, the time to first token. Decoding begins at the stated context.",
        "GB/s: weights used (experts that had a token, as the router chose) and keys and values, each read once.",
        "TFLOP/s: two operations a weight used and token, and attention; however a kernel splits its products.",
    ]
    if found["machine"]["device"] is None:
        lines += [
            f"of {kind}, of {unit}: against the rates measured around every {STEPS_BETWEEN_RATES} steps; {unit} is the",
            "  fastest unit of this processor for these weights, its operands in registers.",
            "experts: that had a token, a layer. outside kernels: time of a step that no operator's kernel spent.",
        ]
    else:
        lines += [
            f"of {kind}, of {unit or 'matrix rate'}: against rates measured around every {STEPS_BETWEEN_RATES} steps:",
            "  copies within the GPU's memory; a library's product of two large matrices of bfloat16.",
            "experts: that had a token, a layer. outside kernels: of a CPU's alone, as is each kernel's share.",
        ]
    if found["model"]["ranks"] > 1:
        lines.append("Several ranks: tokens/s are the job's; all else is rank 0's share, while all ranks run.")
    return "\n".join([*lines, *found["left_out"]])


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(lines)


def _plural(n: int, noun: str) -> str:
    return f"{n} {noun}" + "s" * (n != 1)


def _speed(tokens_per_s: float) -> str:
    return f"{tokens_per_s:.1f}" if tokens_per_s >= 100 else f"{tokens_per_s:.2f}"


def _tera(operations_per_s: float) -> str:
    return f"{operations_per_s / 1e12:.3g}"


def _percent(share: float | None) -> str:
    if share is None:
        return "-"
    return f"{100 * share:.1f} %" if share < 0.095 else f"{100 * share:.0f} %"
