"""latent_store: the operations between MLA's first products and attention over the latents.

    cache[slots[n], 0] = (norm(kv_a[n, :C]) * norm_weight, rotated(kv_a[n, C:]))
                                                    where slots[n] is not negative
    out[n, head, -R:]  = rotated(q[n, head, -R:])

with norm(x) = x / sqrt(mean(x^2) + eps). The pairs that are rotated are i and i + R/2, or 2i and
2i + 1 (`interleaved`); the result has the pairs' first members before their second ones. Computed
in fp32, rounded once.

Legend: N rows, C latent width, R rotated width, S slots of the cache.
"""

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from moezoo.layers.kernels.overlap import launch_options, wait
from moezoo.layers.kernels.rotate_store import (
    check_slots,
    load_rotation,
    rotate_pairs,
    rotation_rows,
)
from moezoo.layers.kernels.sizes import cdiv, next_power_of_2


def latent_store_ref(
    q: Tensor,
    kv_a: Tensor,
    rotation: tuple[Tensor, Tensor],
    slots: Tensor,
    cache: Tensor,
    *,
    norm_weight: Tensor,
    eps: float,
    interleaved: bool,
    out: Tensor,
) -> None:
    latent_dim = norm_weight.numel()
    rope_dim = kv_a.shape[1] - latent_dim
    cos, sin = (part.reshape(len(kv_a), 1, rope_dim).float() for part in rotation)

    def rotated(x: Tensor) -> Tensor:
        if interleaved:
            x = x.unflatten(-1, (-1, 2)).mT.flatten(-2)
        return x * cos + x.roll(rope_dim // 2, -1) * sin

    latent, k = kv_a.float().split_with_sizes((latent_dim, rope_dim), -1)
    latent = F.rms_norm(latent, norm_weight.shape, norm_weight.float(), eps)
    kept = slots >= 0
    cache[slots[kept].long(), 0, :latent_dim] = latent[kept].to(cache.dtype)
    cache[slots[kept].long(), :, latent_dim:] = rotated(k.unsqueeze(1))[kept].to(cache.dtype)
    out[..., -rope_dim:] = rotated(q[..., -rope_dim:].float()).to(out.dtype)


@triton.jit
def _rotate(
    p_x,
    p_out,
    m_rows,
    p_cos,
    p_sin,
    DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """DIM numbers at each of p_x [ROWS, 1], to p_out [ROWS, 1]."""
    HALF: tl.constexpr = DIM // 2
    cols = tl.arange(0, BLOCK_HALF)[None, :]
    m_x = m_rows & (cols < HALF)
    o_rotation = tl.broadcast_to(cols, [ROWS, BLOCK_HALF])
    cos_1, sin_1, cos_2, sin_2 = load_rotation(p_cos, p_sin, o_rotation, m_x, HALF)
    if INTERLEAVED:
        both = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        x = tl.load(p_x + both, mask=m_rows & (both < DIM), other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(x, [ROWS, BLOCK_HALF, 2]))
        # A number's place may belong to another thread, where p_out is p_x.
        tl.debug_barrier()
    else:
        first = tl.load(p_x + cols, mask=m_x, other=0.0).to(tl.float32)
        second = tl.load(p_x + HALF + cols, mask=m_x, other=0.0).to(tl.float32)
    first, second = rotate_pairs(first, second, cos_1, sin_1, cos_2, sin_2)
    dtype = p_out.dtype.element_ty
    tl.store(p_out + cols, first.to(dtype), mask=m_x)
    tl.store(p_out + HALF + cols, second.to(dtype), mask=m_x)


@triton.jit
def _latent_store_kernel(
    q_ptr,
    kv_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    weight_ptr,
    cache_ptr,
    out_ptr,
    eps,
    stride_qn,
    stride_qh,
    stride_kv,
    stride_cos,
    stride_sin,
    stride_cache,
    stride_on,
    stride_oh,
    NUM_HEADS: tl.constexpr,
    Q_START: tl.constexpr,
    OUT_START: tl.constexpr,
    LATENT_DIM: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    BLOCKS: tl.constexpr = 1 + (NUM_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    row = (tl.program_id(0) // BLOCKS).to(tl.int64)
    block = tl.program_id(0) % BLOCKS
    p_cos = cos_ptr + row * stride_cos
    p_sin = sin_ptr + row * stride_sin
    if block == 0:
        cols = tl.arange(0, BLOCK_C)
        m_cols = cols < LATENT_DIM
        weight = tl.load(weight_ptr + cols, mask=m_cols, other=0.0).to(tl.float32)
        wait(OVERLAP)
        slot = tl.load(slots_ptr + row).to(tl.int64)
        stored = slot >= 0
        p_kv = kv_ptr + row * stride_kv
        p_cache = cache_ptr + slot * stride_cache
        latent = tl.load(p_kv + cols, mask=m_cols, other=0.0).to(tl.float32)
        one = tl.arange(0, 1)[:, None]
        p_k, p_out = p_kv + LATENT_DIM + one, p_cache + LATENT_DIM + one
        m_k = (one == 0) & stored
        _rotate(p_k, p_out, m_k, p_cos, p_sin, ROPE_DIM, INTERLEAVED, 1, BLOCK_HALF)
        scale = tl.rsqrt(tl.sum(latent * latent, 0) / LATENT_DIM + eps)
        latent = (latent * scale * weight).to(cache_ptr.dtype.element_ty)
        tl.store(p_cache + cols, latent, mask=m_cols & stored)
    else:
        wait(OVERLAP)
        heads = (block - 1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
        p_q = q_ptr + row * stride_qn + heads * stride_qh + Q_START
        p_head = out_ptr + row * stride_on + heads * stride_oh + OUT_START
        # fmt: off
        _rotate(
            p_q, p_head, heads < NUM_HEADS, p_cos, p_sin, ROPE_DIM, INTERLEAVED, BLOCK_HEADS,
            BLOCK_HALF,
        )
        # fmt: on


def latent_store(
    q: Tensor,
    kv_a: Tensor,
    rotation: tuple[Tensor, Tensor],
    slots: Tensor,
    cache: Tensor,
    *,
    norm_weight: Tensor,
    eps: float,
    interleaved: bool,
    out: Tensor,
) -> None:
    """Store kv_a [N, C + R] in cache [S, 1, C + R], and write q's rotated part to out.

    q and out are [N, heads, .. + R]. Only the last R numbers of out are written; it may be q
    itself. `rotation` is cosine and signed sine, [N, R] or [1, N, 1, R], and norm_weight [C], of
    any float dtype. slots [N] int32 or int64, below S; a row whose slot is negative is stored
    nowhere. q, kv_a, cache and out are of one dtype. Rows and heads may lie apart.

    Raises ValueError for shapes, dtypes or strides that do not fit.
    """
    num_rows, latent_dim = len(kv_a), norm_weight.numel()
    if kv_a.ndim != 2 or kv_a.shape[1] <= latent_dim or kv_a.stride(1) != 1:
        raise ValueError(
            f"kv_a must be [N, {latent_dim} + R] of dense rows, norm_weight being "
            f"{list(norm_weight.shape)}, got {list(kv_a.shape)}, {kv_a.stride()}"
        )
    width = kv_a.shape[1]
    rope_dim = width - latent_dim
    if rope_dim % 2:
        raise ValueError(f"R must be even, got {rope_dim}")
    if cache.shape[1:] != (1, width) or cache.dtype != kv_a.dtype or cache.stride(2) != 1:
        raise ValueError(
            f"cache must be [S, 1, {width}] {kv_a.dtype} of dense rows as kv_a is, "
            f"got {list(cache.shape)} {cache.dtype}, {cache.stride()}"
        )
    for name, heads in (("q", q), ("out", out)):
        if heads.ndim != 3 or heads.shape[:2] != (num_rows, q.shape[1]):
            raise ValueError(f"{name} must be [{num_rows}, heads, ..], got {list(heads.shape)}")
        if heads.shape[2] < rope_dim or heads.dtype != kv_a.dtype or heads.stride(2) != 1:
            raise ValueError(
                f"{name} must have dense heads of at least {rope_dim} {kv_a.dtype} as kv_a's, "
                f"got {list(heads.shape)} {heads.dtype}, {heads.stride()}"
            )
    check_slots(slots, num_rows)
    cos, sin = rotation_rows(rotation, num_rows, rope_dim)
    if num_rows == 0:
        return
    num_heads = q.shape[1]
    block_half = next_power_of_2(rope_dim // 2)
    # Eight numbers a thread.
    block_heads = min(next_power_of_2(num_heads), max(1, 512 // block_half))
    _latent_store_kernel[(num_rows * (1 + cdiv(num_heads, block_heads)),)](
        q,
        kv_a,
        cos,
        sin,
        slots.contiguous(),
        norm_weight.contiguous(),
        cache,
        out,
        eps,
        *q.stride()[:2],
        kv_a.stride(0),
        cos.stride(0),
        sin.stride(0),
        cache.stride(0),
        *out.stride()[:2],
        NUM_HEADS=num_heads,
        Q_START=q.shape[2] - rope_dim,
        OUT_START=out.shape[2] - rope_dim,
        LATENT_DIM=latent_dim,
        ROPE_DIM=rope_dim,
        INTERLEAVED=interleaved,
        BLOCK_HEADS=block_heads,
        BLOCK_C=next_power_of_2(latent_dim),
        BLOCK_HALF=block_half,
        num_warps=4,
        **launch_options(kv_a.device),
    )
