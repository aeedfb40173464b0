"""A recorded routing as one page of HTML: no script, no other file, readable on a phone.

Legend: L MoE layers, E experts, S forward passes.
"""

import math
from collections.abc import Iterable, Iterator
from html import escape
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from moezoo.tools.routing import RoutingTrace

SIZE = 10
"""Size of a heat map's cell, in units of the map."""

PAIRS = 10
POINTS = 600
"""Most columns of passes; more passes are drawn as means of neighbours."""

STYLE = """
:root { color-scheme: light dark; --fg: #1c2430; --bg: #fff; --soft: #667085; --line: #d8dee6;
  --card: #f4f6f9; --mark: #2166ac; --dead: #e8e8e8; }
@media (prefers-color-scheme: dark) { :root { --fg: #e6e9ee; --bg: #14181e; --soft: #98a2b3;
  --line: #333c48; --card: #1d232c; --mark: #6baed6; --dead: #2a2f37; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; background: var(--bg); color: var(--fg);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; margin: .5rem 0; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { margin: .3rem 0 .8rem; color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .6rem; }
.cards div { background: var(--card); border-radius: .4rem; padding: .6rem .8rem; }
.cards b { display: block; font-size: 1.3rem; }
.cards span { color: var(--soft); font-size: .85rem; }
.scroll { overflow-x: auto; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font: 7px system-ui, sans-serif; }
svg.line text { font-size: 13px; }
@media (hover: none) { .hover { display: none; } }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem min(.6rem, 1.3vw); text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { white-space: normal; font-weight: 600; font-size: .85rem; color: var(--soft); }
.bar { display: inline-block; width: calc(var(--part) * min(6rem, 9vw)); height: .6rem;
  background: var(--mark); vertical-align: middle; }
.dead { fill: var(--dead); stroke: var(--soft); stroke-width: .4; }
.key { display: flex; align-items: center; gap: .2rem .5rem; margin-bottom: .4rem;
  font-size: .85rem; color: var(--soft); flex-wrap: wrap; }
.key i { display: inline-block; width: 8rem; height: .7rem; }
.key i.none { width: .8rem; background: var(--dead); border: 1px solid var(--soft); }
"""

COLD, EVEN, HOT = (33, 102, 172), (240, 240, 240), (202, 79, 27)
"""Colours of a quarter of the mean or less, of the mean, and of four times the mean or more."""


def page(trace: "RoutingTrace") -> str:
    """Return the whole page, from <!doctype html> on."""
    name = escape(trace.model_name)
    parts = [
        f"<h1>Routing of {name}</h1>",
        *_figures(trace),
        *_loads(trace),
        *_layers(trace),
        *_passes(trace),
        *_weights(trace),
        *_pairs(trace),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Routing of {name}</title>\n<style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _figures(trace: "RoutingTrace") -> Iterator[str]:
    summary, num_experts = trace.summary(), trace.expert_load.shape[1]
    with_tokens = [layer for layer in summary if layer.tokens]
    yield '<div class="cards">'
    yield _card(f"{max(layer.tokens for layer in summary):,}", "tokens in a layer")
    yield _card(f"{len(summary)} x {num_experts}", "layers with experts, experts in each")
    if with_tokens:
        worst = max(with_tokens, key=lambda layer: layer.imbalance)
        mean = sum(layer.imbalance for layer in with_tokens) / len(with_tokens)
        even = sum(layer.effective_experts for layer in with_tokens) / len(with_tokens)
        yield _card(f"{mean:.2f}", "busiest expert over mean, mean of layers")
        yield _card(f"{worst.imbalance:.2f}", f"the same of layer {worst.layer}, the least even")
        yield _card(f"{even:.1f}", "experts with even loads would have this entropy")
        yield _card(f"{sum(len(layer.dead) for layer in summary):,}", "experts without a token")
    yield "</div>"


def _card(number: str, text: str) -> str:
    return f"<div><b>{number}</b><span>{text}</span></div>"


def _loads(trace: "RoutingTrace") -> Iterator[str]:
    load = trace.expert_load.double()
    relative = (load / load.mean(1, keepdim=True).clamp(min=1e-9)).tolist()
    yield "<h2>Tokens of each expert</h2>"
    yield (
        '<p>A row is a layer, a column an expert. <span class="hover">Point at a cell for its '
        "numbers.</span></p>"
    )
    gradient = ", ".join(_rgb(_mix(step / 4 - 1)) for step in range(9))
    yield (
        '<div class="key"><span>a quarter of the layer\'s mean</span>'
        f'<i style="background: linear-gradient(90deg, {gradient})"></i>'
        '<span>four times</span><i class="none"></i><span>no token</span></div>'
    )
    cells = []
    for row, layer in enumerate(trace.layers):
        for expert, times in enumerate(relative[row]):
            tokens = int(load[row, expert])
            what = f"layer {layer}, expert {expert}: {tokens:,} tokens, {times:.2f} of the mean"
            color = _mix(math.log2(times) / 2) if tokens else None
            cells.append(_cell(expert, row, color, what))
    yield _map(cells, load.shape[1], trace.layers)


def _layers(trace: "RoutingTrace") -> Iterator[str]:
    most = math.log2(trace.expert_load.shape[1])
    yield "<h2>Layer by layer</h2>"
    yield f"<p>Entropy in bits; {most:.2f} where every expert gets as many tokens.</p>"
    rows = []
    summary = trace.summary()
    widest = max((x.imbalance for x in summary if x.tokens), default=1.0)
    for layer in summary:
        bar = f'<span class="bar" style="--part:{layer.imbalance / widest:.2f}"></span>'
        rows.append(
            (
                str(layer.layer),
                f"{layer.tokens:,}",
                str(layer.busiest),
                f"{bar} {layer.imbalance:.2f}" if layer.tokens else "-",
                f"{layer.entropy:.2f}" if layer.tokens else "-",
                str(len(layer.dead)),
            )
        )
    names = ("layer", "tokens", "busiest expert", "over mean", "entropy", "without a token")
    yield _table(names, rows)


def _passes(trace: "RoutingTrace") -> Iterator[str]:
    history = trace.load_history.double()
    if len(history) < 2:
        return
    mean = history.mean(2).sum(1)
    imbalance = (history.amax(2).sum(1) / mean)[mean > 0]
    if len(imbalance) < 2:
        return
    size = math.ceil(len(imbalance) / POINTS)
    points = [float(part.mean()) for part in imbalance.split(size)]
    top = max(points)
    yield "<h2>Forward pass by forward pass</h2>"
    yield (
        f"<p>Busiest expert over mean, of all layers together, in the last {len(imbalance):,} "
        "passes. A pass of few tokens is uneven of necessity.</p>"
    )
    step = 370 / max(len(points) - 1, 1)
    line = " ".join(
        f"{30 + step * i:.1f},{120 - 105 * value / top:.1f}" for i, value in enumerate(points)
    )
    yield (
        '<svg class="line" viewBox="0 0 410 130" role="img" '
        'aria-label="imbalance of forward passes">'
        '<line x1="30" y1="120" x2="400" y2="120" stroke="var(--line)"/>'
        f'<text x="26" y="124" text-anchor="end">0</text>'
        f'<text x="26" y="19" text-anchor="end">{top:.1f}</text>'
        f'<polyline points="{line}" fill="none" stroke="var(--mark)" stroke-width="1.2"/></svg>'
    )


def _weights(trace: "RoutingTrace") -> Iterator[str]:
    histogram = trace.score_histogram.double()
    if not histogram.sum():
        return
    bins = histogram.shape[1]
    yield "<h2>How much a chosen expert counts</h2>"
    yield (
        "<p>A row is a layer; from left to right, shares of a token's weight from 0 to 1. The "
        "stronger the colour, the more of the chosen experts have that share.</p>"
    )
    cells = []
    for row, layer in enumerate(trace.layers):
        total = histogram[row].sum().clamp(min=1.0)
        for column in histogram[row].nonzero().flatten().tolist():
            part = float(histogram[row, column] / total)
            what = (
                f"layer {layer}: {part:.1%} of the chosen experts have "
                f"{column / bins:.0%} to {(column + 1) / bins:.0%}"
            )
            cells.append(_cell(column, row, _mix(-min(1.0, part / 0.2)), what))
    yield _map(cells, bins, trace.layers, last="1")


def _pairs(trace: "RoutingTrace") -> Iterator[str]:
    together = trace.coactivation
    if together is None:
        return
    tokens = torch.tensor([layer.tokens for layer in trace.summary()]).clamp(min=1)
    upper = together.double().triu(1)
    flat = upper.flatten().argsort(descending=True)[:PAIRS].tolist()
    yield "<h2>Experts that are chosen together</h2>"
    yield "<p>Expected: if the two were chosen independently of each other.</p>"
    rows = []
    num_experts = together.shape[1]
    for place in flat:
        row, pair = divmod(place, num_experts**2)
        a, b = divmod(pair, num_experts)
        count = int(together[row, a, b])
        if not count:
            break
        expected = _alone(together[row], a) * _alone(together[row], b) / int(tokens[row])
        times = f"{count / expected:.2f}"
        rows.append((str(trace.layers[row]), f"{a} and {b}", f"{count:,}", times))
    yield _table(("layer", "experts", "tokens", "over expected"), rows)


def _alone(together: Tensor, expert: int) -> int:
    return int(together[expert, expert])


def _cell(x: int, y: int, color: tuple[int, int, int] | None, what: str) -> str:
    fill = 'class="dead"' if color is None else f'fill="{_rgb(color)}"'
    place = f'x="{x * SIZE}" y="{y * SIZE}" width="{SIZE}" height="{SIZE}"'
    return f"<rect {place} {fill}><title>{what}</title></rect>"


def _map(
    cells: Iterable[str],
    columns: int,
    layers: tuple[int, ...],
    *,
    last: str | None = None,
) -> str:
    """Return a heat map with layer numbers on the left and the first and last column's below."""
    width, height = columns * SIZE, len(layers) * SIZE
    every = math.ceil(len(layers) / 30)
    marks = [
        f'<text x="-3" y="{row * SIZE + 7.5}" text-anchor="end">{layer}</text>'
        for row, layer in enumerate(layers)
        if row % every == 0
    ]
    last = str(columns - 1) if last is None else last
    marks.append(f'<text x="0" y="{height + 9}">0</text>')
    marks.append(f'<text x="{width}" y="{height + 9}" text-anchor="end">{last}</text>')
    # A phone scrolls through a wide map rather than show numbers that nobody can read.
    least = f"min-width: {min(columns * 15, 4000)}px"
    limit = f"max-width: {columns * 28 + 40}px"
    return (
        f'<div class="scroll"><svg viewBox="-20 0 {width + 22} {height + 12}" role="img" '
        f'aria-label="heat map" style="{least}; {limit}">{"".join(cells)}{"".join(marks)}'
        "</svg></div>"
    )


def _table(names: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in names)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _mix(at: float) -> tuple[int, int, int]:
    """Return the colour of a value from -1 (cold) over 0 (even) to 1 (hot)."""
    end, part = (HOT if at > 0 else COLD), min(abs(at), 1.0)
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(EVEN, end, strict=True))
    return red, green, blue


def _rgb(color: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)
