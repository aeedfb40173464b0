"""docs/generate.png: one line a model; decoding, prefill and many prompts beside transformers.

python benchmarks/plot_generate.py benchmarks/results/generate_partial_<..>.json [more]
"""

from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from plots import save, short

COLORS = {
    "moezoo": "black",
    "transformers": "tab:red",
    "transformers_grouped_mm": "tab:pink",
    "transformers_generate_batch": "tab:orange",
}
CONTEXT_STYLES = ("-", "--", ":", "-.")
Row = dict[str, Any]


def decode(panel: Axes, rows: list[Row]) -> None:
    """Plot the share of the roofline over the batch, one line per context."""
    contexts = sorted({row["context"] for row in rows})
    batches = sorted({row["batch"] for row in rows})
    for name in ("moezoo", "transformers"):
        for context, style in zip(contexts, CONTEXT_STYLES, strict=False):
            points = [
                (
                    row["batch"],
                    100 * row["tokens_per_second"][name] / row["roofline_tokens_per_second"],
                )
                for row in rows
                if row["context"] == context
                and name in row["tokens_per_second"]
                and "roofline_tokens_per_second" in row
            ]
            if points:
                panel.plot(
                    *zip(*points, strict=True),
                    color=COLORS[name],
                    linestyle=style,
                    marker="o",
                    markersize=4,
                    label=f"{name}, context {short(context)}",
                )
    panel.set(xlabel="rows", xscale="log", ylim=(0, 100), ylabel="decoding, % of read bandwidth")
    ticks(panel, batches)


def prefill(panel: Axes, rows: list[Row]) -> None:
    """Plot the share of the matmul peak over the tokens."""
    for name, color in COLORS.items():
        points = [
            (row["prompt_tokens"], 100 * row["of_peak"][name])
            for row in rows
            if name in row["of_peak"]
        ]
        if points:
            line = {"color": color, "marker": "o", "markersize": 4, "label": name}
            panel.plot(*zip(*points, strict=True), **line)
    panel.set(
        xlabel="prompt tokens", xscale="log", ylim=(0, 100), ylabel="prefill, % of matmul peak"
    )
    ticks(panel, [row["prompt_tokens"] for row in rows])


def offline(panel: Axes, rows: list[Row]) -> None:
    """Plot the output tokens per second of many prompts."""
    found = rows[0]["contenders"]
    names = list(found)
    speeds = [found[name]["output_tokens_per_second"] for name in names]
    colors = [COLORS.get(name, COLORS["transformers"]) for name in names]
    bars = panel.barh(range(len(names)), speeds, color=colors)
    panel.bar_label(bars, [f"{speed:,.0f}" for speed in speeds], padding=3, fontsize=8)
    labels = [name.replace("transformers_", "").replace("_", " ") for name in names]
    panel.set_yticks(range(len(names)), labels, fontsize=8)
    panel.invert_yaxis()
    panel.margins(x=0.2)
    panel.set(xlabel=f"{rows[0]['prompts']} prompts, output tokens/s")


PANELS = {"decode": decode, "prefill": prefill, "offline": offline}


def plot(document: dict[str, Any]) -> Figure:
    rows = document["rows"]
    cases = list(dict.fromkeys(row["case"] for row in rows if row["section"] in PANELS))
    measured = {row["section"] for row in rows if "failed" not in row}
    sections = [name for name in PANELS if name in measured]
    figure, panels = plt.subplots(
        len(cases),
        len(sections),
        figsize=(4.4 * len(sections), 3.2 * len(cases) + 0.4),
        squeeze=False,
    )
    for line, case in zip(panels, cases, strict=True):
        for panel, section in zip(line, sections, strict=True):
            own = [row for row in rows if (row["section"], row["case"]) == (section, case)]
            own = [row for row in own if "failed" not in row]
            if not own:
                panel.set_visible(False)
                continue
            PANELS[section](panel, own)
            panel.set_title(case, fontsize=10)
            panel.grid(alpha=0.3)
            if section != "offline":
                panel.legend(fontsize=7, frameon=False)
    figure.suptitle(f"random weights in bfloat16, {document['device']}", fontsize=9)
    figure.tight_layout()
    return figure


def ticks(panel: Axes, values: list[int]) -> None:
    panel.set_xticks(values)
    panel.set_xticklabels([short(value) for value in values], fontsize=8)
    panel.minorticks_off()


if __name__ == "__main__":
    save(plot, __doc__, "generate.png", rows="rows")
