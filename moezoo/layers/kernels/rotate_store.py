"""rotate_and_store: the operations between the query, key and value product and attention.

    q, k    = norm(q) * q_weight, norm(k) * k_weight    each head alone, or all at once
    q, k, v = q, k, v bounded to [-clip, clip]
    q, k    = q, k * cos + their pairs exchanged * sin  in the first R numbers of each head
    keys[slots[n]], values[slots[n]] = k[n], v[n]       where slots[n] is not negative

with norm(x) = x / sqrt(mean(x^2) + eps). The pairs are i and i + R/2, or 2i and 2i + 1
(`interleaved`); the result has the pairs' first members before their second ones. Computed in fp32;
q, k and v are rounded once, at the end.

Legend: N rows, Hq query heads, Hk key heads, D head width, Dv value width, R rotated width, S slots
of the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from moezoo.layers.kernels.overlap import launch_options, wait
from moezoo.layers.kernels.sizes import cdiv, next_power_of_2

BLOCK = 512
"""Numbers that one warp holds: 32 bytes of 16-bit numbers per thread."""


def rotate_and_store_ref(
    qkv: Tensor,
    rotation: tuple[Tensor, Tensor] | None,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    clip: float | None = None,
    interleaved: bool = False,
) -> Tensor:
    head_dim, value_dim = keys.shape[-1], values.shape[-1]

    def normed(x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return x
        groups = x.unflatten(-1, (-1, weight.numel()))
        return F.rms_norm(groups, weight.shape, offset + weight.float(), eps).flatten(1)

    def rotated(x: Tensor) -> Tensor:
        if rotation is None:
            return x
        cos, sin = (part.reshape(len(qkv), 1, part.shape[-1]).float() for part in rotation)
        dim = cos.shape[-1]
        pairs, rest = x[..., :dim], x[..., dim:]
        if interleaved:
            pairs = pairs.unflatten(-1, (-1, 2)).mT.flatten(-2)
        return torch.cat((pairs * cos + pairs.roll(dim // 2, -1) * sin, rest), -1)

    q, k, v = qkv.float().split_with_sizes(
        [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * value_dim], -1
    )
    q, k = normed(q, q_weight), normed(k, k_weight)
    if clip is not None:
        q, k, v = (x.clamp(-clip, clip) for x in (q, k, v))
    q, k = (x.unflatten(-1, (-1, head_dim)) for x in (q, k))
    kept = slots >= 0
    keys[slots[kept].long()] = rotated(k)[kept].to(keys.dtype)
    values[slots[kept].long()] = v.unflatten(-1, (-1, value_dim))[kept].to(values.dtype)
    return rotated(q).to(qkv.dtype)


@triton.jit
def load_rotation(p_cos, p_sin, cols, mask, HALF: tl.constexpr):
    """Cosine and sine of the pairs' first members, and of their second ones, at `cols` < HALF."""
    cos_1 = tl.load(p_cos + cols, mask=mask, other=0.0).to(tl.float32)
    sin_1 = tl.load(p_sin + cols, mask=mask, other=0.0).to(tl.float32)
    cos_2 = tl.load(p_cos + HALF + cols, mask=mask, other=0.0).to(tl.float32)
    sin_2 = tl.load(p_sin + HALF + cols, mask=mask, other=0.0).to(tl.float32)
    return cos_1, sin_1, cos_2, sin_2


@triton.jit
def rotate_pairs(first, second, cos_1, sin_1, cos_2, sin_2):
    return first * cos_1 + second * sin_1, second * cos_2 + first * sin_2


@triton.jit
def _places(cols, HALF: tl.constexpr, ROTATED: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Where in a head the two members of the pair `cols` < HALF are.

    The first ROTATED pairs are what is rotated; the others are the rest, first half and second.
    """
    if ROTATED == HALF or ROTATED == 0:
        first, second = cols, cols + HALF
    else:
        first = tl.where(cols < ROTATED, cols, cols + ROTATED)
        second = tl.where(cols < ROTATED, cols + ROTATED, cols + HALF)
    if INTERLEAVED:
        first = tl.where(cols < ROTATED, 2 * cols, first)
        second = tl.where(cols < ROTATED, 2 * cols + 1, second)
    return first, second


@triton.jit
def _part(
    row,
    first_head,
    p_x,
    weight_ptr,
    p_cos,
    p_sin,
    slots_ptr,
    out_ptr,
    stride_row,
    stride_head,
    eps,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    CLIP: tl.constexpr,
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BY_SLOT: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """BLOCK_HEADS heads of a row's queries, keys or values, which lie at p_x."""
    HALF: tl.constexpr = HEAD_DIM // 2
    heads = first_head + tl.arange(0, BLOCK_HEADS)[:, None]
    cols = tl.arange(0, BLOCK_HALF)[None, :]
    m_x = (heads < NUM_HEADS) & (cols < HALF)
    in_1, in_2 = _places(cols, HALF, ROTATED, INTERLEAVED)
    if NORM != "none":
        p_weight = weight_ptr + heads * (HEAD_DIM if NORM == "all_heads" else 0)
        weight_first = tl.load(p_weight + in_1, mask=m_x, other=0.0).to(tl.float32) + OFFSET
        weight_second = tl.load(p_weight + in_2, mask=m_x, other=0.0).to(tl.float32) + OFFSET
    wait(OVERLAP)
    out_row = row
    if BY_SLOT:
        out_row = tl.load(slots_ptr + row).to(tl.int64)
    p_heads = p_x + heads * HEAD_DIM
    first = tl.load(p_heads + in_1, mask=m_x, other=0.0).to(tl.float32)
    second = tl.load(p_heads + in_2, mask=m_x, other=0.0).to(tl.float32)
    if ROTATED > 0:
        # Before the sum of squares, so that nothing waits for memory twice; and for each head, in
        # the threads that have its numbers: from one to all, a row would go through shared memory.
        o_rotation = tl.broadcast_to(cols, [BLOCK_HEADS, BLOCK_HALF])
        m_rotated = m_x & (o_rotation < ROTATED)
        cos_1, sin_1, cos_2, sin_2 = load_rotation(p_cos, p_sin, o_rotation, m_rotated, ROTATED)
    if NORM != "none":
        squares = tl.sum(first * first + second * second, 1)
        if NORM == "all_heads":
            scale = tl.rsqrt(tl.sum(squares, 0) / (NUM_HEADS * HEAD_DIM) + eps)
        else:
            scale = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        first = first * scale * weight_first
        second = second * scale * weight_second
    if CLIP is not None:
        # Not minimum and maximum, which would swallow NaN.
        first = tl.where(first > CLIP, CLIP, tl.where(first < -CLIP, -CLIP, first))
        second = tl.where(second > CLIP, CLIP, tl.where(second < -CLIP, -CLIP, second))
    if ROTATED == HALF:
        first, second = rotate_pairs(first, second, cos_1, sin_1, cos_2, sin_2)
    elif ROTATED > 0:
        turned_1, turned_2 = rotate_pairs(first, second, cos_1, sin_1, cos_2, sin_2)
        first = tl.where(m_rotated, turned_1, first)
        second = tl.where(m_rotated, turned_2, second)
    dtype = out_ptr.dtype.element_ty
    out_1, out_2 = _places(cols, HALF, ROTATED, False)
    p_out = out_ptr + out_row * stride_row + heads * stride_head
    m_out = m_x & (out_row >= 0)
    tl.store(p_out + out_1, first.to(dtype), mask=m_out)
    tl.store(p_out + out_2, second.to(dtype), mask=m_out)


@triton.jit
def _rotate_and_store_kernel(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    q_weight_ptr,
    k_weight_ptr,
    q_ptr,
    keys_ptr,
    values_ptr,
    eps,
    stride_qkv,
    stride_cos,
    stride_sin,
    stride_ks,
    stride_kh,
    stride_vs,
    stride_vh,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    CLIP: tl.constexpr,
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    Q_BLOCKS: tl.constexpr = (NUM_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    KV_BLOCKS: tl.constexpr = (NUM_KV_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    BLOCKS: tl.constexpr = Q_BLOCKS + 2 * KV_BLOCKS
    row = (tl.program_id(0) // BLOCKS).to(tl.int64)
    block = tl.program_id(0) % BLOCKS
    p_q = qkv_ptr + row * stride_qkv
    p_k = p_q + NUM_HEADS * HEAD_DIM
    p_v = p_k + NUM_KV_HEADS * HEAD_DIM
    p_cos = cos_ptr + row * stride_cos
    p_sin = sin_ptr + row * stride_sin
    # fmt: off
    if block < Q_BLOCKS:
        _part(
            row, block * BLOCK_HEADS, p_q, q_weight_ptr, p_cos, p_sin, slots_ptr, q_ptr,
            NUM_HEADS * HEAD_DIM, HEAD_DIM, eps, NUM_HEADS, HEAD_DIM, NORM, OFFSET, CLIP, ROTATED,
            INTERLEAVED, False, BLOCK_HEADS, BLOCK_HALF, OVERLAP,
        )
    elif block < Q_BLOCKS + KV_BLOCKS:
        _part(
            row, (block - Q_BLOCKS) * BLOCK_HEADS, p_k, k_weight_ptr, p_cos, p_sin, slots_ptr,
            keys_ptr, stride_ks, stride_kh, eps, NUM_KV_HEADS, HEAD_DIM, NORM, OFFSET, CLIP,
            ROTATED, INTERLEAVED, True, BLOCK_HEADS, BLOCK_HALF, OVERLAP,
        )
    else:
        _part(
            row, (block - Q_BLOCKS - KV_BLOCKS) * BLOCK_HEADS, p_v, None, p_cos, p_sin, slots_ptr,
            values_ptr, stride_vs, stride_vh, eps, NUM_KV_HEADS, VALUE_DIM, "none", 0.0, CLIP, 0,
            False, True, BLOCK_HEADS, BLOCK_HALF, OVERLAP,
        )
    # fmt: on


def rotation_rows(
    rotation: tuple[Tensor, Tensor], num_rows: int, dim: int
) -> tuple[Tensor, Tensor]:
    """View cosine and signed sine, of any shape with that many rows, as [num_rows, dim].

    Raises ValueError for another number of rows, or rows that are not dense.
    """
    cos, sin = rotation
    for part in rotation:
        if part.shape[-1] != dim or part.numel() != num_rows * dim or part.stride(-1) != 1:
            raise ValueError(
                f"rotation must be a cosine and a sine [{num_rows}, {dim}] of dense rows, "
                f"got {list(part.shape)}, {part.stride()}"
            )
    return cos.reshape(num_rows, dim), sin.reshape(num_rows, dim)


def check_slots(slots: Tensor, num_rows: int) -> None:
    if slots.shape != (num_rows,) or slots.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"slots must be [{num_rows}] int32 or int64, got {list(slots.shape)} {slots.dtype}"
        )


def _norm(q_weight: Tensor | None, k_weight: Tensor | None, widths: tuple[int, int, int]) -> str:
    """Return which kind of norm the weights' sizes imply.

    `widths` are those of all query heads, of all key heads and of one head.
    """
    if q_weight is None and k_weight is None:
        return "none"
    sizes = tuple(None if w is None else tuple(w.shape) for w in (q_weight, k_weight))
    q_width, k_width, head_dim = widths
    if sizes == ((head_dim,), (head_dim,)):
        return "each_head"
    if sizes != ((q_width,), (k_width,)):
        raise ValueError(
            f"q_weight and k_weight must both be [{head_dim}], or [{q_width}] and [{k_width}], "
            f"or None, got {sizes[0]} and {sizes[1]}"
        )
    return "all_heads"


def rotate_and_store(
    qkv: Tensor,
    rotation: tuple[Tensor, Tensor] | None,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    clip: float | None = None,
    interleaved: bool = False,
) -> Tensor:
    """Return q [N, Hq, D] of qkv [N, (Hq + Hk) D + Hk Dv], and store keys and values in the cache.

    The cache is keys [S, Hk, D] and values [S, Hk, Dv].

    `rotation` is cosine and signed sine, [N, R] or [1, N, 1, R], of any float dtype, R even and up
    to D; None leaves the heads unrotated. slots [N] int32 or int64, below S; a row whose slot is
    negative is stored nowhere. q_weight and k_weight are [D] and [D], or [Hq D] and [Hk D], of any
    float dtype, or both None: no norm. qkv, keys and values are of one dtype. Rows and heads may
    lie apart.

    Raises ValueError for shapes, dtypes or strides that do not fit.
    """
    num_rows, head_dim, value_dim = len(qkv), keys.shape[-1], values.shape[-1]
    q_width, k_width = num_heads * head_dim, num_kv_heads * head_dim
    width = q_width + k_width + num_kv_heads * value_dim
    if qkv.shape != (num_rows, width) or qkv.stride(1) != 1:
        raise ValueError(
            f"qkv must be [N, {width}] of dense rows, got {list(qkv.shape)}, {qkv.stride()}"
        )
    if head_dim % 2 or value_dim % 2:
        raise ValueError(f"heads must be of even width, got {head_dim} and {value_dim}")
    for name, cache in (("keys", keys), ("values", values)):
        if cache.ndim != 3 or cache.shape[1] != num_kv_heads or cache.dtype != qkv.dtype:
            raise ValueError(
                f"{name} must be [S, {num_kv_heads}, ..] {qkv.dtype} as qkv is, "
                f"got {list(cache.shape)} {cache.dtype}"
            )
        if cache.stride(2) != 1:
            raise ValueError(f"{name} must have dense heads, got strides {cache.stride()}")
    check_slots(slots, num_rows)
    rotated_dim = 0 if rotation is None else rotation[0].shape[-1]
    if rotated_dim % 2 or rotated_dim > head_dim:
        raise ValueError(f"rotation must be of an even width up to {head_dim}, got {rotated_dim}")
    cos, sin = (qkv, qkv)  # not read
    if rotation is not None:
        cos, sin = rotation_rows(rotation, num_rows, rotated_dim)
    norm = _norm(q_weight, k_weight, (q_width, k_width, head_dim))
    q = torch.empty(num_rows, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    if q.numel() == 0:
        return q
    block_half = next_power_of_2(max(head_dim, value_dim) // 2)
    block_heads = next_power_of_2(max(num_heads, num_kv_heads))
    if norm != "all_heads":
        block_heads = min(block_heads, max(1, BLOCK // (2 * block_half)))
    blocks = cdiv(num_heads, block_heads) + 2 * cdiv(num_kv_heads, block_heads)
    _rotate_and_store_kernel[(num_rows * blocks,)](
        qkv,
        cos,
        sin,
        slots.contiguous(),
        None if q_weight is None else q_weight.contiguous(),
        None if k_weight is None else k_weight.contiguous(),
        q,
        keys,
        values,
        eps,
        qkv.stride(0),
        cos.stride(0),
        sin.stride(0),
        *keys.stride()[:2],
        *values.stride()[:2],
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        VALUE_DIM=value_dim,
        NORM=norm,
        OFFSET=offset,
        CLIP=clip,
        ROTATED=rotated_dim // 2,
        INTERLEAVED=interleaved,
        BLOCK_HEADS=block_heads,
        BLOCK_HALF=block_half,
        num_warps=min(16, max(1, 2 * block_heads * block_half // BLOCK)),
        **launch_options(qkv.device),
    )
    return q
