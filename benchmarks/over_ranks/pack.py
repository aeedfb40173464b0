"""Section pack: a rank's work on tokens before and after they travel, over the rate of a copy.

Bytes a second that are read and written, for tokens that go to some of PACK_RANKS ranks.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from moezoo.layers.kernels.row_format import RowFormat
from moezoo.parallel.pack import destinations, pack_order, pack_rows, sum_answers, unpack_rows
from over_ranks.job import Job, Row

SIZES = ((4096, 2048, 8), (16384, 2048, 8), (4096, 7168, 8), (16384, 7168, 8))
"""Tokens, hidden size and experts per token."""
SMALL = ((64, 128, 2),)
PACK_RANKS = 8


def pack(job: Job) -> Iterator[Row]:
    for tokens, hidden_size, k in SMALL if job.small else SIZES:
        if not job.has(5):
            return
        slots = torch.rand(tokens, 256, device=job.device).topk(k).indices.int()
        owners = torch.arange(256 + 1, device=job.device) // (256 // PACK_RANKS)
        there = destinations(slots, owners, PACK_RANKS)
        num_rows = int(there.sum())
        order, places = pack_order(there, there.sum(0), num_rows, k)
        x = torch.randn(tokens, hidden_size, device=job.device).bfloat16()
        rows = x.index_select(0, order)
        other = torch.empty_like(rows)
        topk_weights = torch.rand(tokens, k, device=job.device)
        runs: dict[str, tuple[Callable[[], object], int]] = {
            "copy": (partial(other.copy_, rows), 2 * rows.nbytes),
            "gather": (partial(x.index_select, 0, order), x.nbytes + rows.nbytes),
            "sum_answers": (partial(sum_answers, rows, places), x.nbytes + rows.nbytes),
        }
        for name, fp8 in (("", False), (" fp8", True)):
            form = RowFormat(hidden_size, k, x.dtype, fp8)
            packed = pack_rows(form, x, topk_weights, slots, tokens)
            moved = x.nbytes + packed.nbytes
            runs["pack" + name] = partial(pack_rows, form, x, topk_weights, slots, tokens), moved
            runs["unpack" + name] = partial(unpack_rows, form, packed, 0, 32), moved
        rates = {name: nbytes / job.replayed(run) for name, (run, nbytes) in runs.items()}
        of_copy = {name: rate / rates["copy"] for name, rate in rates.items()}
        yield {"tokens": tokens, "hidden_size": hidden_size, "rows": num_rows, **of_copy} | {
            "copy": rates["copy"]
        }
