"""The page about a recorded routing: whole in itself, and drawn by a browser where there is one."""

import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser

import pytest
import torch

import moezoo
from moezoo.assets import tiny_model
from moezoo.tools.routing import RoutingTrace

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
VOID = {"meta", "br"}
EMPTY_IN_SVG = {"line", "polyline"}


class Reader(HTMLParser):
    """Tags with their attributes, each of them closed in its turn."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in EMPTY_IN_SVG
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def trace():
    model = moezoo.from_pretrained(tiny_model(), dtype="float32", device="cpu", progress=False)
    with moezoo.record_routing(model, choices=True) as trace, torch.inference_mode():
        for length in (3, 40, 11):
            model(torch.arange(length)[None])
    return trace


def test_it_needs_no_other_file_and_shows_every_expert(trace):
    page = Reader(trace.html())
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags}
    assert not any("src" in attrs or "href" in attrs for _, attrs in page.tags)
    assert "url(" not in trace.html() and "@import" not in trace.html()
    for row, layer in enumerate(trace.layers):
        for expert, tokens in enumerate(trace.expert_load[row].tolist()):
            says = [x for x in page.texts if x.startswith(f"layer {layer}, expert {expert}: ")]
            assert says and says[0].split(": ")[1].startswith(f"{tokens:,} tokens")
    assert "54" in page.texts  # tokens in a layer
    assert {"Tokens of each expert", "Experts that are chosen together"} <= set(page.texts)


def test_dead_experts_are_marked(trace):
    load = trace.expert_load.clone()
    load[2, 5] = 0
    tensors = {"expert_load": load, "load_history": trace.load_history[:0]}
    tensors["score_histogram"] = torch.zeros(6, 50, dtype=torch.int64)
    page = Reader(RoutingTrace(trace.layers, tensors, experts_per_token=4).html())
    dead = [attrs for tag, attrs in page.tags if tag == "rect" and attrs.get("class") == "dead"]
    assert any((attrs["x"], attrs["y"]) == ("50", "20") for attrs in dead)
    assert len(dead) == int((load == 0).sum())
    assert not {"Experts that are chosen together", "How much a chosen expert counts"} & set(
        page.texts
    )


def test_without_a_token_it_is_still_a_page():
    tensors = {
        "expert_load": torch.zeros(2, 4, dtype=torch.int64),
        "load_history": torch.zeros(0, 2, 4, dtype=torch.int32),
        "score_histogram": torch.zeros(2, 50, dtype=torch.int64),
    }
    html = RoutingTrace((0, 1), tensors, experts_per_token=2, model="<a & b>").html()
    assert "Routing of &lt;a &amp; b&gt;" in html
    assert not any("nan" in text for text in Reader(html).texts)


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
@pytest.mark.parametrize("width", [360, 1200], ids=["phone", "desk"])
def test_a_browser_draws_it_within_the_width(trace, tmp_path, width):
    """In a frame, since no window of a desktop's browser is as narrow as a phone."""
    measure = (
        "const page = frames[0].document, root = page.documentElement;"
        "const scale = x => x.ownerSVGElement ? x.ownerSVGElement.getBoundingClientRect().width "
        "/ x.ownerSVGElement.viewBox.baseVal.width : 1;"
        "const sizes = [...page.querySelectorAll('p, td, text')].map("
        "x => scale(x) * parseFloat(frames[0].getComputedStyle(x).fontSize));"
        "document.title = [root.scrollWidth, frames[0].innerWidth, "
        "page.querySelectorAll('rect').length, "
        "page.querySelector('svg').getBoundingClientRect().height, "
        "Math.min(...sizes)].join(' ')"
    )
    path = tmp_path / "page.html"
    path.write_text(
        f'<title>none</title><iframe style="width: {width}px; height: 900px; border: 0" '
        f'srcdoc="{escape(trace.html())}" onload="{measure}"></iframe>'
    )
    command = (
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
        *(f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000", path.as_uri()),
    )
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>([\d. ]+)</title>", done.stdout)
    assert title, done.stderr
    needed, inner, rectangles, height, smallest = map(float, title[1].split())
    assert inner == width
    assert needed <= inner
    assert rectangles > 6 * 16
    assert height > 50
    assert smallest >= 9.5
