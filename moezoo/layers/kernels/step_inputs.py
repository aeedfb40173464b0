"""step_inputs: the inputs of a decode step, computed in one launch.

    lengths[b]    += 1                           where it is not 0, the mark of an unused row
    position       = lengths[b] - 1
    x[b]           = embedding[ids[b]]
    cos[b], sin[b] = cosines[position], sines[position]
    slots[w, b]    = tables[w, b, position // page_size] * page_size + position % page_size

An unused row has position 0 and slots of -1.

Legend: B rows, W page tables, P pages of a row, V vocabulary, H hidden, S positions, D rotated
width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moezoo.layers.kernels.overlap import launch_options, wait
from moezoo.layers.kernels.sizes import next_power_of_2


def step_inputs_ref(
    ids: Tensor,
    lengths: Tensor,
    tables: Tensor,
    *,
    page_size: int,
    embedding: Tensor,
    rotation: tuple[Tensor, Tensor],
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    lengths += lengths > 0
    positions = (lengths - 1).clamp(min=0).long()
    pages = tables.gather(2, (positions // page_size).expand(len(tables), -1)[..., None])[..., 0]
    slots = torch.where(lengths > 0, pages.long() * page_size + positions % page_size, -1)
    cos, sin = (part[positions] for part in rotation)
    return embedding[ids], (cos, sin), slots


@triton.jit
def _copy_row(from_ptr, to_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    for start in tl.static_range(0, WIDTH, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        m_cols = cols < WIDTH
        tl.store(to_ptr + cols, tl.load(from_ptr + cols, mask=m_cols), mask=m_cols)


@triton.jit
def _step_inputs_kernel(
    ids_ptr,
    lengths_ptr,
    tables_ptr,
    embedding_ptr,
    cosines_ptr,
    sines_ptr,
    x_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    stride_tw,
    stride_tb,
    NUM_TABLES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HIDDEN: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    wait(OVERLAP)
    row = tl.program_id(0)
    token = tl.load(ids_ptr + row).to(tl.int64)
    length = tl.load(lengths_ptr + row)
    length += (length > 0).to(tl.int32)
    tl.store(lengths_ptr + row, length)
    position = tl.maximum(length - 1, 0)
    for w in tl.static_range(NUM_TABLES):
        page = tl.load(tables_ptr + w * stride_tw + row * stride_tb + position // PAGE_SIZE)
        slot = page.to(tl.int64) * PAGE_SIZE + position % PAGE_SIZE
        p_slot = slots_ptr + w * tl.num_programs(0) + row
        tl.store(p_slot, tl.where(length > 0, slot, -1))
    _copy_row(cosines_ptr + position.to(tl.int64) * DIM, cos_ptr + row * DIM, DIM, BLOCK_D)
    _copy_row(sines_ptr + position.to(tl.int64) * DIM, sin_ptr + row * DIM, DIM, BLOCK_D)
    p_x = x_ptr + row.to(tl.int64) * HIDDEN
    _copy_row(embedding_ptr + token * HIDDEN, p_x, HIDDEN, BLOCK_H)


def step_inputs(
    ids: Tensor,
    lengths: Tensor,
    tables: Tensor,
    *,
    page_size: int,
    embedding: Tensor,
    rotation: tuple[Tensor, Tensor],
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """Return x [B, H], the rotation [B, D] twice, and slots [W, B] int64; change lengths in place.

    ids [B] are int64, lengths [B] int32, tables [W, B, P] int32, embedding [V, H], and the rotation
    of all positions [S, D] twice.

    ids lie in 0..V-1; no length passes S, nor the pages of its table. The last stride of tables is
    1, all else is contiguous.

    Raises ValueError for shapes, dtypes or strides that do not fit.
    """
    num_rows, num_tables = len(ids), len(tables)
    if tables.ndim != 3 or tables.shape[1] != num_rows or lengths.shape != ids.shape:
        raise ValueError(
            f"ids and lengths must be [B] and tables [W, B, P], got {list(ids.shape)}, "
            f"{list(lengths.shape)} and {list(tables.shape)}"
        )
    dtypes = (ids.dtype, lengths.dtype, tables.dtype)
    if dtypes != (torch.int64, torch.int32, torch.int32):
        raise ValueError(f"ids must be int64, lengths and tables int32, got {dtypes}")
    dense = (lengths, embedding, *rotation)
    if tables.stride(2) != 1 or not all(tensor.is_contiguous() for tensor in dense):
        raise ValueError("tables need dense rows; lengths, embedding, rotation must be contiguous")
    cosines, sines = rotation
    hidden_size, dim = embedding.shape[1], cosines.shape[1]
    x = embedding.new_empty(num_rows, hidden_size)
    cos, sin = (part.new_empty(num_rows, dim) for part in rotation)
    slots = ids.new_empty(num_tables, num_rows)
    if num_rows == 0:
        return x, (cos, sin), slots
    _step_inputs_kernel[(num_rows,)](
        ids.contiguous(),
        lengths,
        tables,
        embedding,
        cosines,
        sines,
        x,
        cos,
        sin,
        slots,
        tables.stride(0),
        tables.stride(1),
        NUM_TABLES=num_tables,
        PAGE_SIZE=page_size,
        HIDDEN=hidden_size,
        DIM=dim,
        BLOCK_H=min(2048, next_power_of_2(hidden_size)),
        BLOCK_D=next_power_of_2(dim),
        **launch_options(ids.device),
    )
    return x, (cos, sin), slots
