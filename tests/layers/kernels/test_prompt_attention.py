import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor
from torch.nn import functional as F

from moezoo.layers.kernels import prompt_attention as module
from moezoo.layers.kernels.prompt_attention import (
    Plan,
    prompt_attention,
    prompt_attention_ref,
    query_tiles,
)
from moezoo.layers.kernels.windows import Chunked

PAGE_SIZE = 16
NUM_NEW = (37, 1, 16)
NUM_KEYS = (37, 70, 48)

SHAPES = {
    "gqa": (4, 2, 32, 32),
    "mha": (3, 3, 16, 16),
    "one_head": (1, 1, 64, 64),
    "odd": (4, 2, 48, 20),
    "odder": (1, 1, 10, 13),
    "wide": (2, 1, 80, 96),
    "mla": (2, 2, 24, 16),
    "latents": (3, 1, 40, 32),
}
"""Query heads, key heads, key width, value width."""


def inputs(
    shape: str,
    dtype: torch.dtype,
    device: torch.device,
    num_new: tuple[int, ...] = NUM_NEW,
    num_keys: tuple[int, ...] = NUM_KEYS,
    page_size: int | None = PAGE_SIZE,
) -> dict[str, Any]:
    """Pages in random order; everything that no query may see is NaN, pages that do not exist."""
    num_heads, num_key_heads, dim, value_dim = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    tables: dict[str, Any] = {}
    if page_size is None:
        present = torch.ones(sum(num_keys), dtype=torch.bool)
    else:
        pages = [-(-length // page_size) for length in num_keys]
        physical = torch.randperm(sum(pages) + 3, generator=generator).int()
        table = torch.full((len(num_keys), max(pages, default=0) + 2), 2**30, dtype=torch.int32)
        present = torch.zeros(len(physical) * page_size, dtype=torch.bool)
        taken = 0
        for b, (length, count) in enumerate(zip(num_keys, pages, strict=True)):
            table[b, :count] = physical[taken : taken + count]
            taken += count
            present[slots(table[b], page_size, length)] = True
        tables = {"page_table": table.to(device), "page_size": page_size}

    def cache(width: int) -> Tensor:
        x = torch.randn(len(present), num_key_heads, width, generator=generator)
        return x.masked_fill(~present[:, None, None], torch.nan).to(device, dtype)

    q = torch.randn(sum(num_new), num_heads, dim, generator=generator)
    return {
        "q": q.to(device, dtype),
        "keys": cache(dim),
        "values": cache(value_dim),
        "tiles": query_tiles(list(num_new), list(num_keys)).to(device),
        "scale": dim**-0.5,
        **tables,
    }


def slots(table: Tensor, page_size: int, length: int) -> Tensor:
    at = torch.arange(length, device=table.device)
    return table[at // page_size].long() * page_size + at % page_size


def gathered(
    arguments: dict[str, Any],
    b: int,
    num_new: tuple[int, ...] = NUM_NEW,
    num_keys: tuple[int, ...] = NUM_KEYS,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [1, Hq, t, D], keys [1, Hk, s, D] and values [1, Hk, s, Dv] of one sequence, fp64."""
    if arguments.get("page_table") is None:
        seen = slice(sum(num_keys[:b]), sum(num_keys[: b + 1]))
    else:
        seen = slots(arguments["page_table"][b], arguments["page_size"], num_keys[b])
    q = arguments["q"].split(num_new)[b]
    q, k, v = (x.double().transpose(0, 1)[None] for x in (q, *(arguments[n][seen] for n in KV)))
    return q, k, v


KV = ("keys", "values")


def hidden(new: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """bool [new, keys]: which of its sequence's keys a query does not see."""
    ages = torch.arange(keys - new, keys, device=device)[:, None] - torch.arange(
        keys, device=device
    )
    return (ages < 0) | (ages >= (window or keys))


def sdpa(
    arguments: dict[str, Any],
    window: int | None = None,
    num_new: tuple[int, ...] = NUM_NEW,
    num_keys: tuple[int, ...] = NUM_KEYS,
) -> Tensor:
    rows = []
    for b, (new, keys) in enumerate(zip(num_new, num_keys, strict=True)):
        q, k, v = gathered(arguments, b, num_new, num_keys)
        mask = ~hidden(new, keys, window, q.device)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=arguments["scale"], enable_gqa=True
        )
        rows.append(out[0].transpose(0, 1))
    return torch.cat(rows).to(arguments["q"].dtype)


def use(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    plan = module.plan

    def changed(*arguments: Any, **settings: Any) -> Plan:
        return Plan(**(vars(plan(*arguments, **settings)) | changes))

    monkeypatch.setattr(module, "plan", changed)


@pytest.fixture(params=["descriptors", "pointers"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With descriptors or without; in blocks as small as can be."""
    use(
        monkeypatch,
        block_keys=16,
        block_queries=32,
        num_warps=4,
        descriptors=request.param == "descriptors",
    )


def test_query_tiles() -> None:
    tiles = query_tiles([300, 0, 1, 128], [300, 5, 200, 1000]).T.tolist()
    assert tiles == [
        [3, 301, 429, 872, 505],
        [0, 256, 300, 256, 0],
        [2, 300, 301, 199, 305],
        [0, 128, 300, 128, 0],
        [0, 0, 300, 0, 0],
    ]
    assert query_tiles([], []).shape == (5, 0)
    with pytest.raises(ValueError, match="sequence 1 cannot have 3 new tokens and 2 keys"):
        query_tiles([1, 3], [1, 2])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.sampled(n=2)
def test_matches_sdpa(shape: str, dtype: torch.dtype, device: torch.device) -> None:
    arguments = inputs(shape, dtype, device)
    out = prompt_attention(**arguments)
    assert out.is_contiguous()
    assert_close(out, sdpa(arguments))
    assert_close(prompt_attention_ref(**arguments), sdpa(arguments))


@pytest.mark.parametrize("shape", ["gqa", "mla"])
def test_packed(shape: str, dtype: torch.dtype, device: torch.device) -> None:
    arguments = inputs(shape, dtype, device, page_size=None)
    assert_close(prompt_attention(**arguments), sdpa(arguments))
    assert_close(prompt_attention_ref(**arguments), sdpa(arguments))


@pytest.mark.parametrize(("shape", "page_size"), [("gqa", 16), ("mla", None), ("mla", 32)])
def test_ways(shape: str, page_size: int | None, device: torch.device, way: None) -> None:
    arguments = inputs(shape, torch.float16, device, page_size=page_size)
    assert_close(prompt_attention(**arguments), sdpa(arguments))


@pytest.mark.parametrize("window", [1, 20, 500])
def test_window(window: int, device: torch.device, way: None) -> None:
    arguments = inputs("gqa", torch.float16, device)
    expected = sdpa(arguments, window)
    # Pages that fell out of the window are another sequence's by now.
    for b, (new, keys) in enumerate(zip(NUM_NEW, NUM_KEYS, strict=True)):
        arguments["page_table"][b, : max(keys - new - window + 1, 0) // PAGE_SIZE] = 2**30
    assert_close(prompt_attention(**arguments, window=window), expected)
    assert_close(prompt_attention_ref(**arguments, window=window), expected)


@pytest.mark.parametrize("chunk", [1, 16, 23, 500])
def test_chunks(chunk: int, device: torch.device, way: None) -> None:
    arguments = inputs("gqa", torch.float16, device)
    rows = []
    for b, (new, keys) in enumerate(zip(NUM_NEW, NUM_KEYS, strict=True)):
        q, k, v = gathered(arguments, b)
        at = torch.arange(keys, device=device)
        queries = at[keys - new :, None]
        mask = (at <= queries) & (at // chunk == queries // chunk)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=arguments["scale"], enable_gqa=True
        )
        rows.append(out[0].transpose(0, 1))
        # Pages of chunks that are complete are another sequence's by now.
        arguments["page_table"][b, : (keys - new) // chunk * chunk // PAGE_SIZE] = 2**30
    expected = torch.cat(rows).to(arguments["q"].dtype)
    assert_close(prompt_attention(**arguments, window=Chunked(chunk)), expected)
    assert_close(prompt_attention_ref(**arguments, window=Chunked(chunk)), expected)


@pytest.mark.parametrize("window", [None, 20])
def test_sinks_as_gpt_oss(window: int | None, device: torch.device, way: None) -> None:
    gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    arguments = inputs("gqa", torch.float16, device)
    sinks = torch.linspace(-2, 4, 4, device=device)
    attention = SimpleNamespace(num_key_value_groups=2, sinks=sinks.double(), training=False)
    rows = []
    for b, (new, keys) in enumerate(zip(NUM_NEW, NUM_KEYS, strict=True)):
        mask = torch.zeros(1, 1, new, keys, dtype=torch.float64, device=device)
        mask.masked_fill_(hidden(new, keys, window, device), -torch.inf)
        expected, _ = gpt_oss.eager_attention_forward(
            attention, *gathered(arguments, b), mask, scaling=arguments["scale"]
        )
        rows.append(expected[0])
    expected = torch.cat(rows).half()
    out = prompt_attention(**arguments, sinks=sinks, window=window)
    assert_close(out, expected)
    assert torch.equal(prompt_attention(**arguments, sinks=sinks.half(), window=window), out)
    assert_close(prompt_attention_ref(**arguments, sinks=sinks, window=window), expected)


@pytest.mark.parametrize("with_sinks", [False, True])
def test_softcap(with_sinks: bool, device: torch.device, way: None) -> None:
    arguments = inputs("gqa", torch.float16, device) | {"scale": 1.0}
    sinks = torch.linspace(-2, 4, 4, device=device) if with_sinks else None
    rows = []
    for b, (new, keys) in enumerate(zip(NUM_NEW, NUM_KEYS, strict=True)):
        q, k, v = gathered(arguments, b)
        scores = 3.0 * torch.tanh(q[0] @ k[0].repeat_interleave(2, 0).mT / 3.0)
        numerators = scores.exp().masked_fill(hidden(new, keys, None, device), 0.0)
        total = numerators.sum(-1, keepdim=True)
        if sinks is not None:
            total += sinks.double().exp()[:, None, None]
        rows.append((numerators / total @ v[0].repeat_interleave(2, 0)).transpose(0, 1))
    expected = torch.cat(rows).half()
    assert_close(prompt_attention(**arguments, sinks=sinks, softcap=3.0), expected)
    assert_close(prompt_attention_ref(**arguments, sinks=sinks, softcap=3.0), expected)


@pytest.mark.parametrize(
    ("num_new", "num_keys"),
    [
        ((260,), (260,)),
        ((129, 128), (129, 256)),
        ((5, 130), (300, 131)),
    ],
    ids=str,
)
@pytest.mark.parametrize("window", [None, 100])
def test_several_tiles(
    num_new: tuple[int, ...],
    num_keys: tuple[int, ...],
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    arguments = inputs("one_head", dtype, device, num_new, num_keys, page_size=64)
    out = prompt_attention(**arguments, window=window)
    assert_close(out, sdpa(arguments, window, num_new, num_keys))


def test_a_sequence_gets_the_same_whatever_the_others(device: torch.device, way: None) -> None:
    arguments = inputs("gqa", torch.float16, device)
    rows = prompt_attention(**arguments).split(NUM_NEW)
    for b in (0, 2):
        alone = arguments | {
            "q": arguments["q"].split(NUM_NEW)[b],
            "tiles": query_tiles([NUM_NEW[b]], [NUM_KEYS[b]]).to(device),
            "page_table": arguments["page_table"][b : b + 1],
        }
        assert torch.equal(prompt_attention(**alone), rows[b])


def test_strided_views(device: torch.device, way: None) -> None:
    arguments = inputs("gqa", torch.float16, device)
    expected = prompt_attention(**arguments)
    q, both = arguments["q"], torch.cat((arguments["keys"], arguments["values"]), -1)
    strided = {
        "q": torch.cat((q, q), -1).transpose(0, 1).contiguous().transpose(0, 1)[..., :32],
        "keys": both[..., :32],
        "values": both[..., 32:],
        "page_table": F.pad(arguments["page_table"], (0, 3))[:, :-3],
        "tiles": arguments["tiles"].T.contiguous().T,
    }
    assert torch.equal(prompt_attention(**(arguments | strided)), expected)
    heads_first = {
        name: arguments[name].transpose(0, 1).contiguous().transpose(0, 1) for name in KV
    }
    assert torch.equal(prompt_attention(**(arguments | heads_first)), expected)


def test_values_that_are_part_of_keys(device: torch.device, way: None) -> None:
    arguments = inputs("latents", torch.float16, device)
    arguments["values"] = arguments["keys"][..., :32]
    assert_close(prompt_attention(**arguments), sdpa(arguments))


@pytest.mark.parametrize(("shape", "rest"), [("mla", 8), ("latents", 8), ("wide", 32)])
@pytest.mark.parametrize("page_size", [None, 32])
def test_last_numbers_of_keys_in_a_tensor_of_their_own(
    shape: str, rest: int, page_size: int | None, device: torch.device, way: None
) -> None:
    arguments = inputs(shape, torch.float16, device, page_size=page_size)
    keys = arguments["keys"]
    keys[..., -rest:] = keys[:, :1, -rest:]
    expected = sdpa(arguments)
    latents = F.pad(keys[:, 0, -rest:], (8, 0), value=torch.nan)
    apart = {"keys": keys[..., :-rest], "shared_keys": latents[:, 8:]}
    assert_close(prompt_attention(**(arguments | apart)), expected)
    assert_close(prompt_attention_ref(**(arguments | apart)), expected)


def test_strides_that_boxes_cannot_take(device: torch.device) -> None:
    arguments = inputs("gqa", torch.float16, device)
    expected = prompt_attention(**arguments)
    for name in KV:
        arguments[name] = F.pad(arguments[name], (0, 1))[..., :32]
    assert_close(prompt_attention(**arguments), expected)


def test_large_scores(device: torch.device, way: None) -> None:
    arguments = inputs("gqa", torch.float16, device) | {"scale": 1e2}
    assert_close(prompt_attention(**arguments), sdpa(arguments))


def test_no_sequences(device: torch.device) -> None:
    arguments = inputs("gqa", torch.float32, device, num_new=(), num_keys=())
    assert prompt_attention(**arguments).shape == (0, 4, 32)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "key_heads", "dim", "value_dim"),
    [
        (32, 4, 128, 128),
        (16, 16, 128, 128),
        (64, 8, 64, 64),
        (16, 8, 256, 256),
        (32, 8, 80, 80),
        (16, 16, 192, 128),
        (16, 1, 576, 512),
    ],
)
@pytest.mark.parametrize(
    ("page_size", "window", "dtype"),
    [
        (64, None, torch.bfloat16),
        (64, 128, torch.bfloat16),
        (None, 700, torch.bfloat16),
        (64, 700, torch.float16),
        (16, None, torch.float32),
    ],
    ids=str,
)
def test_models_shapes(
    heads: int,
    key_heads: int,
    dim: int,
    value_dim: int,
    page_size: int | None,
    window: int | None,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shape = (heads, key_heads, dim, value_dim)
    monkeypatch.setitem(SHAPES, "model", shape)
    num_new, num_keys = (1000, 64, 300, 1), (1000, 192, 1111, 65)
    arguments = inputs("model", dtype, torch.device("cuda"), num_new, num_keys, page_size)
    out = prompt_attention(**arguments, window=window)
    assert_close(out, sdpa(arguments, window, num_new, num_keys))
    assert torch.equal(out, prompt_attention(**arguments, window=window))


@pytest.mark.gpu
def test_captured_graph() -> None:
    arguments = inputs("gqa", torch.float16, torch.device("cuda"))
    expected = prompt_attention(**arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = prompt_attention(**arguments)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(5, 4, 31)}, "q must be [T, Hq, D] and keys [S, Hk, D]"),
        ({"q": torch.zeros(5, 5, 32)}, "5 query heads cannot share 2 key heads"),
        ({"values": torch.zeros(3, 2, 32)}, "values must be ["),
        ({"shared_keys": torch.zeros(5, 4)}, "shared_keys must be ["),
        ({"q": torch.zeros(5, 32, 4).mT}, "the last stride of q must be 1"),
        ({"q": torch.zeros(5, 4, 32).half()}, "must be torch.float16 as q is"),
        ({"tiles": torch.zeros(4, 3).int()}, "tiles must be int32 [5, N]"),
        ({"tiles": torch.zeros(5, 3)}, "tiles must be int32 [5, N]"),
        ({"page_table": None}, "page_table and page_size go together"),
        ({"page_table": torch.zeros(5, 9)}, "page_table must be int32 [B, P]"),
        ({"page_size": 24}, "page_size must be a power of two"),
        ({"page_size": 8}, "page_size must be a power of two"),
        ({"scale": -1.0}, "scale must be above 0"),
        ({"window": 0}, "window must be at least 1"),
        ({"softcap": 0.0}, "softcap must be above 0"),
        ({"sinks": torch.zeros(2)}, "sinks must be [4]"),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    arguments = inputs("gqa", torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=re.escape(message)):
        prompt_attention(**(arguments | change))
