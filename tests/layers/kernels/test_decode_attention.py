import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor
from torch.nn import functional as F

from moezoo.layers.kernels import decode_attention as module
from moezoo.layers.kernels.decode_attention import Plan, decode_attention, decode_attention_ref
from moezoo.layers.kernels.windows import Chunked

PAGE_SIZE = 16
LENGTHS = (37, 1, 0, 16, 81)

SHAPES = {
    "gqa": (8, 2, 32, 32),
    "mha": (3, 3, 16, 16),
    "mqa": (20, 1, 32, 16),
    "one_head": (1, 1, 64, 64),
    "odd": (4, 2, 48, 20),
    "wide": (4, 1, 80, 96),
    "mla": (4, 1, 40, None),
    "mla_many_heads": (34, 1, 48, None),
    "mla_odd": (5, 1, 29, None),
}
"""Query heads, key heads, key width, value width; None: the first 24 numbers of the keys."""


def inputs(
    shape: str,
    dtype: torch.dtype,
    device: torch.device,
    lengths: tuple[int, ...] = LENGTHS,
    page_size: int = PAGE_SIZE,
) -> dict[str, Any]:
    """Pages in random order; everything that no query may see is NaN, pages that do not exist."""
    num_heads, num_key_heads, dim, value_dim = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    pages = [-(-length // page_size) for length in lengths]
    physical = torch.randperm(sum(pages) + 3, generator=generator).int()
    table = torch.full((len(lengths), max(pages, default=0) + 2), 2**30, dtype=torch.int32)
    present = torch.zeros(len(physical) * page_size, dtype=torch.bool)
    taken = 0
    for b, (length, count) in enumerate(zip(lengths, pages, strict=True)):
        table[b, :count] = physical[taken : taken + count]
        taken += count
        for s in range(length):
            present[int(table[b, s // page_size]) * page_size + s % page_size] = True

    def cache(width: int) -> Tensor:
        x = torch.randn(len(present), num_key_heads, width, generator=generator)
        return x.masked_fill(~present[:, None, None], torch.nan).to(device, dtype)

    q = torch.randn(len(lengths), num_heads, dim, generator=generator)
    return {
        "q": q.to(device, dtype),
        "keys": cache(dim),
        "values": None if value_dim is None else cache(value_dim),
        "page_table": table.to(device),
        "lengths": torch.tensor(lengths, dtype=torch.int32, device=device),
        "page_size": page_size,
        "scale": dim**-0.5,
        "value_dim": 24 if value_dim is None else None,
    }


def gathered(
    arguments: dict[str, Any], b: int, window: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """q [1, Hq, 1, D], keys [1, Hk, s, D] and values [1, Hk, s, Dv] of one sequence, fp64."""
    size, length = arguments["page_size"], int(arguments["lengths"][b])
    keys, values = arguments["keys"], arguments["values"]
    if values is None:
        values = keys[..., : arguments["value_dim"]]
    pages = arguments["page_table"][b, : -(-length // size)].long()
    first = max(length - (window or length), 0)
    k, v = (
        x.unflatten(0, (-1, size))[pages].flatten(0, 1)[first:length].double().transpose(0, 1)[None]
        for x in (keys, values)
    )
    return arguments["q"][b].double()[None, :, None], k, v


def sdpa(arguments: dict[str, Any], window: int | None = None) -> Tensor:
    rows = []
    for b in range(len(arguments["lengths"])):
        q, k, v = gathered(arguments, b, window)
        if k.shape[2] == 0:
            rows.append(q.new_zeros(q.shape[1], v.shape[3]))
            continue
        out = F.scaled_dot_product_attention(q, k, v, scale=arguments["scale"], enable_gqa=True)
        rows.append(out[0, :, 0])
    return torch.stack(rows).to(arguments["q"].dtype)


@pytest.fixture(params=[1, 4], ids=["one_share", "four_shares"])
def splits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys in one share, or in four, some of which have none."""
    use(monkeypatch, num_splits=request.param)


def use(monkeypatch: pytest.MonkeyPatch, **changes: int) -> None:
    plan = module.plan

    def changed(*arguments: Any, **settings: Any) -> Plan:
        return Plan(**(vars(plan(*arguments, **settings)) | changes))

    monkeypatch.setattr(module, "plan", changed)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.sampled(n=5)
def test_matches_sdpa(shape: str, dtype: torch.dtype, device: torch.device, splits: None) -> None:
    arguments = inputs(shape, dtype, device)
    out = decode_attention(**arguments)
    assert out.is_contiguous()
    assert not out[LENGTHS.index(0)].any()
    assert_close(out, sdpa(arguments))
    assert_close(decode_attention_ref(**arguments), sdpa(arguments))


@pytest.mark.parametrize("shape", ["mla", "mla_odd"])
def test_keys_in_parts(
    shape: str,
    dtype: torch.dtype,
    device: torch.device,
    splits: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use(monkeypatch, num_parts=2)
    arguments = inputs(shape, dtype, device)
    assert_close(decode_attention(**arguments), sdpa(arguments))


@pytest.mark.parametrize("window", [1, 16, 40, 500])
@pytest.mark.parametrize("shape", ["gqa", "mla"])
@pytest.mark.sampled(n=4)
def test_window(shape: str, window: int, device: torch.device, splits: None) -> None:
    arguments = inputs(shape, torch.float32, device)
    expected = sdpa(arguments, window)
    # Pages that fell out of the window are another sequence's by now.
    for b, length in enumerate(LENGTHS):
        arguments["page_table"][b, : max(length - window, 0) // PAGE_SIZE] = 2**30
    assert_close(decode_attention(**arguments, window=window), expected)


@pytest.mark.parametrize("chunk", [1, 16, 23, 500])
@pytest.mark.parametrize("shape", ["gqa", "mla"])
@pytest.mark.sampled(n=4)
def test_chunks(shape: str, chunk: int, device: torch.device, splits: None) -> None:
    arguments = inputs(shape, torch.float32, device)
    out = decode_attention(**arguments, window=Chunked(chunk))
    for b, length in enumerate(LENGTHS):
        if length:
            expected = sdpa(arguments, (length - 1) % chunk + 1)
            assert_close(out[b], expected[b])
    assert_close(decode_attention_ref(**arguments, window=Chunked(chunk)), out)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("sink_dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.sampled(n=2)
def test_sinks_as_gpt_oss(
    sink_dtype: torch.dtype, window: int | None, device: torch.device, splits: None
) -> None:
    gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    arguments = inputs("gqa", torch.float32, device)
    sinks = torch.linspace(-2, 4, 8, device=device).to(sink_dtype)
    attention = SimpleNamespace(num_key_value_groups=4, sinks=sinks.double(), training=False)
    out = decode_attention(**arguments, sinks=sinks, window=window)
    assert not out[LENGTHS.index(0)].any()
    for b, length in enumerate(LENGTHS):
        if length:
            q, k, v = gathered(arguments, b, window)
            expected, _ = gpt_oss.eager_attention_forward(
                attention, q, k, v, None, scaling=arguments["scale"]
            )
            assert_close(out[b], expected[0, 0].float())
    expected = decode_attention_ref(**arguments, sinks=sinks, window=window)
    assert_close(out, expected)


@pytest.mark.parametrize("with_sinks", [False, True])
def test_softcap(with_sinks: bool, device: torch.device, splits: None) -> None:
    arguments = inputs("gqa", torch.float32, device) | {"scale": 1.0}
    sinks = torch.linspace(-2, 4, 8, device=device) if with_sinks else None
    out = decode_attention(**arguments, sinks=sinks, softcap=3.0)
    for b, length in enumerate(LENGTHS):
        if length:
            q, k, v = gathered(arguments, b)
            scores = 3.0 * torch.tanh(q[0] @ k[0].repeat_interleave(4, 0).mT / 3.0)
            numerators = scores.exp()
            total = numerators.sum(-1, keepdim=True)
            if sinks is not None:
                total += sinks.double().exp()[:, None, None]
            expected = numerators / total @ v[0].repeat_interleave(4, 0)
            assert_close(out[b], expected[:, 0].float())
    assert_close(out, decode_attention_ref(**arguments, sinks=sinks, softcap=3.0))


@pytest.mark.parametrize("block_keys", [16, 32, 64])
@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.sampled(n=2)
def test_pages_of_several_blocks(
    block_keys: int, window: int | None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, block_keys=block_keys, num_splits=3)
    arguments = inputs("gqa", torch.float32, device, (1, 150, 64, 65, 128), page_size=64)
    assert_close(decode_attention(**arguments, window=window), sdpa(arguments, window))


@pytest.mark.parametrize("shape", ["gqa", "mla"])
def test_a_sequence_gets_the_same_whatever_the_others(
    shape: str, device: torch.device, splits: None
) -> None:
    arguments = inputs(shape, torch.float32, device)
    out = decode_attention(**arguments)
    order = torch.tensor([4, 3, 1, 0, 2], device=device)
    moved = {name: arguments[name][order] for name in ("q", "page_table", "lengths")}
    moved["lengths"][1:3] = 0
    if device.type == "cuda":
        torch.cuda.synchronize()  # lengths are read before the kernel that wrote them has ended
    changed = decode_attention(**(arguments | moved))
    for b in (0, 3, 4):
        assert torch.equal(changed[b], out[order[b]])


def test_strided_views(device: torch.device) -> None:
    arguments = inputs("gqa", torch.float32, device)
    expected = decode_attention(**arguments)
    both = torch.cat((arguments["keys"], arguments["values"]), -1)
    q = arguments["q"]
    strided = {
        "q": torch.cat((q, q), -1).transpose(0, 1).contiguous().transpose(0, 1)[..., :32],
        "keys": both[..., :32],
        "values": both[..., 32:],
        "page_table": F.pad(arguments["page_table"], (0, 3))[:, :-3],
    }
    assert torch.equal(decode_attention(**(arguments | strided)), expected)


def test_large_scores(device: torch.device, splits: None) -> None:
    arguments = inputs("gqa", torch.float32, device) | {"scale": 1e3}
    assert_close(decode_attention(**arguments), sdpa(arguments))


def test_no_sequences(device: torch.device) -> None:
    arguments = inputs("gqa", torch.float32, device, lengths=())
    assert decode_attention(**arguments).shape == (0, 8, 32)


def test_unused_rows_alone(device: torch.device, splits: None) -> None:
    arguments = inputs("gqa", torch.float32, device, lengths=(0, 0))
    sinks = torch.zeros(8, device=device)
    arguments["q"].fill_(torch.nan)
    assert not decode_attention(**arguments).any()
    assert not decode_attention(**arguments, sinks=sinks).any()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "key_heads", "dim", "value_dim"),
    [
        (32, 4, 128, None),
        (16, 16, 128, None),
        (64, 8, 64, None),
        (16, 8, 256, None),
        (8, 8, 192, None),
        (16, 1, 576, 512),
        (128, 1, 576, 512),
    ],
)
@pytest.mark.parametrize(
    "lengths",
    [(8192, 500, 0, 3001), (8192,) * 8, (1, 64, 65, 700) * 16],
    ids=["4", "8_long", "64"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_models_shapes(
    heads: int,
    key_heads: int,
    dim: int,
    value_dim: int | None,
    lengths: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    num_pages = sum(-(-length // 64) for length in lengths)
    cache = torch.randn(
        2, num_pages * 64, key_heads, dim, device=device, dtype=dtype, generator=generator
    )
    table = torch.zeros(len(lengths), 256, dtype=torch.int32, device=device)
    pages = torch.randperm(num_pages, device=device, generator=generator).int()
    for row, length in zip(table, lengths, strict=True):
        count = -(-length // 64)
        row[:count], pages = pages[:count], pages[count:]
    arguments = {
        "q": torch.randn(len(lengths), heads, dim, device=device, dtype=dtype, generator=generator),
        "keys": cache[0],
        "values": cache[1] if value_dim is None else None,
        "page_table": table,
        "lengths": torch.tensor(lengths, dtype=torch.int32, device=device),
        "page_size": 64,
        "scale": dim**-0.5,
        "value_dim": value_dim,
    }
    out = decode_attention(**arguments)
    assert_close(out, decode_attention_ref(**arguments))
    assert torch.equal(out, decode_attention(**arguments))


@pytest.mark.gpu
def test_cache_of_more_numbers_than_int32_counts(splits: None) -> None:
    device = torch.device("cuda")
    num_slots = 2**20 + 256
    cache = torch.empty(num_slots, 16, 128, device=device, dtype=torch.float16)
    used = cache[-256:]
    used.copy_(torch.randn(used.shape, generator=torch.Generator().manual_seed(0)))
    table = torch.tensor([[2, 0], [3, 1]], dtype=torch.int32, device=device)

    def attended(cache: Tensor, first_slot: int) -> Tensor:
        return decode_attention(
            used[:2, :8],
            cache[:, :8],
            cache[:, 8:],
            table + first_slot // 64,
            torch.tensor([128, 100], dtype=torch.int32, device=device),
            page_size=64,
            scale=0.1,
        )

    assert torch.equal(attended(cache, num_slots - 256), attended(used, 0))


@pytest.mark.gpu
def test_captured_graph_follows_lengths() -> None:
    arguments = inputs("gqa", torch.float16, torch.device("cuda"))
    decode_attention(**arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(**arguments)
    arguments["lengths"].copy_(torch.tensor([20, 1, 0, 9, 33]))
    graph.replay()
    assert torch.equal(out, decode_attention(**arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(5, 8, 31)}, "q must be [B, Hq, D] and keys [S, Hk, D]"),
        ({"q": torch.zeros(5, 5, 32)}, "5 query heads cannot share 2 key heads"),
        ({"value_dim": 16}, "one of values and value_dim"),
        ({"values": None}, "one of values and value_dim"),
        ({"values": None, "value_dim": 33}, "value_dim must be in 1..32"),
        ({"values": torch.zeros(3, 2, 32)}, "values must be ["),
        ({"q": torch.zeros(5, 32, 8).mT}, "the last stride of q must be 1"),
        ({"q": torch.zeros(5, 8, 32).half()}, "must be torch.float16 as q is"),
        ({"lengths": torch.zeros(4).int()}, "page_table must be [5, P] and lengths [5]"),
        ({"lengths": torch.zeros(5).long()}, "must be int32"),
        ({"page_size": 24}, "page_size must be a power of two"),
        ({"page_size": 8}, "page_size must be a power of two"),
        ({"window": 0}, "window must be at least 1"),
        ({"softcap": 0.0}, "softcap must be above 0"),
        ({"sinks": torch.zeros(2)}, "sinks must be [8]"),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    arguments = inputs("gqa", torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=re.escape(message)):
        decode_attention(**(arguments | change))
