"""permute_and_quantize: `permute`, and the tokens quantised to fp8 in the same launch.

    x8, scales = per token and 128 of H: x * (448 / max|x|) rounded to fp8, max|x| / 448

The programs of `permute` are few and wait for memory; those that quantise run beside them, of
many rows in the first of two launches. Doing it here, by token, reads x once and writes T rows. In
the first product's loads it would be done again for each of its I/128 column tiles and K experts,
on operands that then could not go straight to shared memory; in expert order it would write K times
as much.

Legend: T tokens, H hidden, K experts per token, E experts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moezoo.layers.kernels import permute as permuting
from moezoo.layers.kernels.overlap import launch_options, wait
from moezoo.layers.kernels.permute import (
    Permutation,
    block_rows,
    count_block,
    empty_counts,
    empty_permutation,
    few_rows_options,
    permute_expert,
    permute_ref,
    place,
)
from moezoo.layers.kernels.sizes import cdiv
from moezoo.layers.quant.format import TINY
from moezoo.layers.quant.fp8 import BLOCK, LARGEST, Fp8Rows, blocks, quantize_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST, FULL = tl.constexpr(TINY), tl.constexpr(LARGEST)


def permute_and_quantize_ref(
    x: Tensor, topk_ids: Tensor, num_experts: int, tile_rows: int
) -> tuple[Permutation, Fp8Rows]:
    return permute_ref(topk_ids, num_experts, tile_rows), quantize_rows(x)


@triton.jit
def fp8_factor(largest):
    """What maps values up to `largest` to fp8's range, and the scale that maps them back.

    `tl.max` passes over NaN, which then stays NaN in fp8, and its group's scale finite.
    """
    largest = tl.maximum(largest, LEAST)
    full = tl.full(largest.shape, FULL, tl.float32)
    return tl.div_rn(full, largest), tl.div_rn(largest, full)


@triton.jit
def quantize_groups(
    program,
    x_ptr,
    x8_ptr,
    scales_ptr,
    num_tokens,
    num_groups,
    hidden_size,
    stride_xt,
    stride_xh,
    stride_st,
    stride_sg,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    rows = program * GROUPS + tl.arange(0, GROUPS)
    tokens = (rows // num_groups).to(tl.int64)
    m_rows = tokens < num_tokens
    inner = tl.arange(0, GROUP)[None, :]
    cols = (rows % num_groups)[:, None] * GROUP + inner
    p_x = x_ptr + tokens[:, None] * stride_xt + cols * stride_xh
    x = tl.load(p_x, mask=m_rows[:, None] & (cols < hidden_size), other=0.0).to(tl.float32)
    factors, scales = fp8_factor(tl.max(tl.abs(x), 1))
    x8 = (x * factors[:, None]).to(x8_ptr.dtype.element_ty)
    # Groups lie one after the other, tokens too.
    p_x8 = x8_ptr + rows.to(tl.int64)[:, None] * GROUP + inner
    tl.store(p_x8, x8, mask=m_rows[:, None])
    p_scales = scales_ptr + tokens * stride_st + rows % num_groups * stride_sg
    tl.store(p_scales, scales, mask=m_rows)


# num_groups stays a variable: with H = 1 ptxas 12.8 would know values to be equal, and lose a
# conversion to fp8.
@triton.jit(do_not_specialize=["num_rows", "max_tiles", "num_tokens", "num_groups"])
def _permute_and_quantize_kernel(
    ids_ptr,
    order_ptr,
    positions_ptr,
    offsets_ptr,
    tiles_ptr,
    num_tiles_ptr,
    x_ptr,
    x8_ptr,
    scales_ptr,
    num_rows,
    num_experts,
    max_tiles,
    num_tokens,
    num_groups,
    hidden_size,
    stride_xt,
    stride_xh,
    TILE_ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    program = tl.program_id(0)
    if program < num_experts:
        # fmt: off
        permute_expert(
            program, ids_ptr, order_ptr, positions_ptr, offsets_ptr, tiles_ptr, num_tiles_ptr,
            num_rows, num_experts, max_tiles, TILE_ROWS, BLOCKS, BLOCK_S, BLOCK_E, BLOCK_N,
        )
        # fmt: on
    else:
        # fmt: off
        quantize_groups(
            program - num_experts, x_ptr, x8_ptr, scales_ptr, num_tokens, num_groups,
            hidden_size, stride_xt, stride_xh, num_groups, 1, GROUPS, GROUP,
        )
        # fmt: on


@triton.jit(do_not_specialize=["num_rows", "num_blocks", "num_tokens", "num_groups"])
def _count_and_quantize_kernel(
    ids_ptr,
    counts_ptr,
    x_ptr,
    x8_ptr,
    scales_ptr,
    num_rows,
    num_experts,
    num_blocks,
    num_tokens,
    num_groups,
    hidden_size,
    stride_xt,
    stride_xh,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    program = tl.program_id(0)
    if program < num_blocks:
        count_block(program, ids_ptr, counts_ptr, num_rows, num_experts, BLOCK_S, BLOCK_E)
    else:
        # fmt: off
        quantize_groups(
            program - num_blocks, x_ptr, x8_ptr, scales_ptr, num_tokens, num_groups,
            hidden_size, stride_xt, stride_xh, num_groups, 1, GROUPS, GROUP,
        )
        # fmt: on


def permute_and_quantize(
    x: Tensor, topk_ids: Tensor, num_experts: int, tile_rows: int
) -> tuple[Permutation, Fp8Rows]:
    """Return the permutation of topk_ids [T, K] int32 or int64, and x [T, H] quantised to fp8.

    x is fp32, bf16 or fp16.

    Raises ValueError for other ids or shapes, or more than 2**31 - 1 rows.
    """
    if x.ndim != 2 or len(x) != len(topk_ids) or x.dtype not in DTYPES:
        raise ValueError(
            f"x must be [{len(topk_ids)}, H] as topk_ids are, in float32, bfloat16 or float16, got "
            f"{list(x.shape)} {x.dtype}"
        )
    out = empty_permutation(topk_ids, num_experts, tile_rows)
    num_tokens, hidden_size = x.shape
    num_groups = blocks(hidden_size)
    rows = Fp8Rows(
        torch.empty(num_tokens, num_groups * BLOCK, dtype=torch.float8_e4m3fn, device=x.device),
        torch.empty(num_tokens, num_groups, dtype=torch.float32, device=x.device),
    )
    num_rows, topk_ids = topk_ids.numel(), topk_ids.contiguous()
    options = launch_options(x.device)
    if num_rows > permuting.FEW_ROWS:
        counts = empty_counts(num_rows, num_experts, x.device)
        num_programs = len(counts) + cdiv(num_tokens * num_groups, 32)
        _count_and_quantize_kernel[(num_programs,)](
            topk_ids,
            counts,
            x,
            *rows,
            num_rows,
            num_experts,
            len(counts),
            num_tokens,
            num_groups,
            hidden_size,
            *x.stride(),
            BLOCK_S=block_rows(num_rows),
            BLOCK_E=counts.shape[1],
            GROUPS=32,
            GROUP=BLOCK,
            num_warps=8,
            **options,
        )
        place(topk_ids, counts, out, num_experts, tile_rows)
        return out, rows
    # Smaller than `permute`'s: its registers would leave room for one program on a multiprocessor.
    few = few_rows_options(num_rows, num_experts, most=2048)
    groups = 8 if few["num_warps"] == 4 else 32
    num_programs = num_experts + cdiv(num_tokens * num_groups, groups)
    _permute_and_quantize_kernel[(num_programs,)](
        topk_ids,
        *out,
        x,
        *rows,
        num_rows,
        num_experts,
        out.tiles.shape[1],
        num_tokens,
        num_groups,
        hidden_size,
        *x.stride(),
        TILE_ROWS=tile_rows,
        GROUPS=groups,
        GROUP=BLOCK,
        **few,
        **options,
    )
    return out, rows
