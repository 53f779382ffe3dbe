"""The roofline picture: each measurement under what memory and matrix units of this machine allow.

Source: Williams, Waterman, Patterson, Roofline: An Insightful Visual Performance Model, CACM 52 (2009).
"""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import StrMethodFormatter

from predict.bench.report import describe, name_of

ROOF, LESSER_ROOF = "#222222", "#9a9a9a"
SHADES = {"decode": "Blues", "prefill": "Oranges"}
MARKERS = "osD^vP*X"


def draw(found: dict[str, Any], path: Path) -> None:
    """Writes the picture of a run (predict.bench.report) as a PNG."""
    entries, ceilings = found["measurements"], found["ceilings"]
    read, unit = ceilings["memory"]["p50"], ceilings["matrix_unit"]
    rates = {name: rate["p50"] for name, rate in ceilings["matrix"].items()}
    intensities = [e["operations"] / e["active_bytes"] for e in entries]
    left = min(*intensities, min(rates.values()) / read) / 4
    right = max(*intensities, max(rates.values()) / read) * 4
    figure = Figure(figsize=(11, 6), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xscale="log", yscale="log")
    axes.set_xlim(left, right)
    lowest = min(e["operations_per_s"] for e in entries)
    axes.set_ylim(min(lowest, left * read * 4) / 3 / 1e12, max(rates.values()) * 3 / 1e12)
    slope_label = _draw_roofs(axes, read, rates, unit)
    drawn = dict.fromkeys(SHADES, 0)
    for entry, intensity in zip(entries, intensities, strict=True):
        kind = entry["kind"]
        shades = matplotlib.colormaps[SHADES[kind]]
        same = sum(e["kind"] == kind for e in entries)
        axes.plot(
            intensity,
            entry["operations_per_s"] / 1e12,
            MARKERS[drawn[kind] % len(MARKERS)],
            color=shades(0.5 + 0.45 * (drawn[kind] + 1) / same),
            markersize=max(6, 13 - 2 * drawn[kind]),  # so that those that coincide are seen
            markeredgecolor="white",
            linestyle="none",
            label=f"{name_of(entry)}\n    {_reached(entry, unit)}",
        )
        drawn[kind] += 1
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_xlabel("operations for each byte of weights and cache that is read")
    axes.set_ylabel("TFLOP/s")
    axes.grid(True, which="major", color="#e4e4e4")
    axes.set_axisbelow(True)
    axes.set_title("\n".join(describe(found)), loc="left", fontsize=9)
    figure.legend(loc="outside right upper", fontsize=8, labelspacing=0.9, frameon=False)
    figure.draw_without_rendering()  # settles where the axes lie, and so how steep the slope looks
    (x0, y0), (x1, y1) = axes.transData.transform([(1, read / 1e12), (10, read / 1e11)])
    slope_label.set_rotation(np.degrees(np.arctan2(y1 - y0, x1 - x0)))
    figure.savefig(path, format="png")


def _draw_roofs(axes: Axes, read: float, rates: dict[str, float], unit: str) -> Annotation:
    """The slope of the read rate and the level of every matrix unit; bold those of the percentages.

    Returns:
        The label of the slope, still level.
    """
    (left, right), lowest = axes.get_xlim(), axes.get_ylim()[0] * 1e12
    corner, low = rates[unit] / read, max(left, lowest / read)  # where the slope ends and where it comes into sight
    slope = np.array([left, max(rates.values()) / read])
    axes.plot(slope, slope * read / 1e12, color=LESSER_ROOF, linewidth=1, zorder=1)
    axes.plot([left, corner, right], np.array([left * read, rates[unit], rates[unit]]) / 1e12, color=ROOF, linewidth=2)
    middle = np.sqrt(low * corner)
    label = axes.annotate(
        f"memory reads {read / 1e9:.1f} GB/s",
        (middle, middle * read / 1e12),
        xytext=(-4, 4),
        ha="center",
        textcoords="offset points",
        rotation_mode="anchor",
        color=ROOF,
        fontsize=9,
    )
    for name, rate in rates.items():
        color = ROOF if name == unit else LESSER_ROOF
        if name != unit:
            axes.plot([rate / read, right], [rate / 1e12] * 2, color=color, linewidth=1, zorder=1)
        axes.annotate(
            f"{name} {rate / 1e12:.3g} TFLOP/s",
            (right, rate / 1e12),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            color=color,
            fontsize=9,
        )
    return label


def _reached(entry: dict[str, Any], unit: str) -> str:
    """The tokens a second, and the share of whichever roof is nearer."""
    memory, matrix = entry["share_of_memory_rate"], entry["share_of_matrix_rate"]
    share = f"{100 * memory:.0f} % of the read rate" if memory >= matrix else f"{100 * matrix:.0f} % of {unit}"
    return f"{entry['tokens_per_s']['p50']:.4g} tokens/s, {share}"
