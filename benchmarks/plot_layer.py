"""docs/layer.png: time over the floor by tokens, one line an implementation, one panel a layer.

python benchmarks/plot_layer.py benchmarks/results/layer_nvidia_h100_80gb_hbm3.json
"""

from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from layer_tables import time_of
from matplotlib.figure import Figure
from plots import save, short

COLORS = {
    "moezoo": "black",
    "vllm_tuned": "tab:green",
    "triton_kernels": "tab:orange",
    "torch_grouped_mm": "tab:blue",
    "hf_grouped_mm": "tab:red",
    "hf_batched_mm": "tab:pink",
    "deepgemm": "tab:purple",
}
"""Implementations that are drawn; others (untuned, or far slower) would hide them."""
CEILING = 5.0


def ratios(cells: list[dict[str, Any]], name: str) -> tuple[list[int], list[float], bool]:
    """Return tokens, times over the floor, and whether all times are kept from earlier runs."""
    tokens, over, kept = [], [], True
    for cell in cells:
        us = time_of(cell, name)
        if us is not None:
            tokens.append(cell["num_tokens"])
            over.append(us / cell["floor_us"])
            kept = kept and name not in cell["timings"]
    return tokens, over, kept


def plot(document: dict[str, Any]) -> Figure:
    layers = list(dict.fromkeys(cell["layer"] for cell in document["cells"]))
    columns = min(3, len(layers))
    rows = -(-len(layers) // columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(4.2 * columns, 3.2 * rows + 0.8), sharey=True, squeeze=False
    )
    lines: dict[str, Any] = {}
    for panel, layer in zip(panels.flat, layers, strict=False):
        cells = [cell for cell in document["cells"] if cell["layer"] == layer]
        for name, color in COLORS.items():
            tokens, over, kept = ratios(cells, name)
            if not tokens:
                continue
            own = name == "moezoo"
            (line,) = panel.plot(
                *(tokens, over),
                color=color,
                linestyle="--" if kept else "-",
                linewidth=2.4 if own else 1.3,
                marker="o",
                markersize=4 if own else 3,
                zorder=3 if own else 2,
            )
            lines.setdefault(name + (" (measured earlier)" if kept else ""), line)
        panel.axhline(1, color="gray", linewidth=0.8)
        panel.set(title=layer, xscale="log", xlabel="tokens", ylim=(0.9, CEILING))
        panel.set_xticks([cell["num_tokens"] for cell in cells])
        panel.set_xticklabels([short(cell["num_tokens"]) for cell in cells], fontsize=8)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    for panel in panels.flat[len(layers) :]:
        panel.set_visible(False)
    for row in panels:
        row[0].set_ylabel("time / floor")
    figure.legend(lines.values(), lines.keys(), loc="lower center", ncol=4, frameon=False)
    figure.suptitle(f"MoE layer, {document['dtype']}, {document['device']}: 1 is the roofline")
    figure.tight_layout(rect=(0, 0.5 / figure.get_figheight(), 1, 1))
    return figure


if __name__ == "__main__":
    save(plot, __doc__, "layer.png", rows="cells")
