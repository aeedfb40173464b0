"""choose_and_count_: the slots of the experts that tokens chose, counted, in one launch.

    spread      = (first_token + t) * GOLDEN mod 2^32
    slots[t, k] = replicas[e, spread * counts[e] >> 32],  e = topk_ids[t, k];  -1 for an e below 0
    load[slot] += 1                                       for each slot of a real token

Its reference is `EPLBState.physical_ids` followed by `record_`.

Legend: T tokens, K experts per token, E experts (logical), X the most replicas of an expert, P
slots.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256
"""Choices of a program."""


@triton.jit
def _choose_and_count_kernel(
    ids_ptr,
    replicas_ptr,
    counts_ptr,
    first_token_ptr,
    load_ptr,
    real_ptr,
    slots_ptr,
    num_choices,
    stride_replicas,
    K: tl.constexpr,
    GOLDEN: tl.constexpr,
    HAS_REAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    choices = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_choices = choices < num_choices
    tokens = choices // K
    expert = tl.load(ids_ptr + choices, mask=m_choices, other=-1).to(tl.int64)
    m_expert = expert >= 0
    spread = (tl.load(first_token_ptr) + tokens) * GOLDEN & 0xFFFFFFFF
    count = tl.load(counts_ptr + expert, mask=m_expert, other=1)
    p_slot = replicas_ptr + expert * stride_replicas + (spread * count >> 32)
    slot = tl.load(p_slot, mask=m_expert, other=-1)
    tl.store(slots_ptr + choices, slot.to(tl.int32), mask=m_choices)
    m_counted = m_expert
    if HAS_REAL:
        m_counted &= tl.load(real_ptr + tokens, mask=m_choices, other=0) != 0
    tl.atomic_add(load_ptr + slot, 1, mask=m_counted, sem="relaxed")


def choose_and_count_(
    topk_ids: Tensor,
    replicas: Tensor,
    counts: Tensor,
    *,
    first_token: Tensor,
    load: Tensor,
    real: Tensor | None,
    golden: int,
) -> Tensor:
    """topk_ids int [T, K] -> slots int32 [T, K], and their number added to load int32 [P or more].

    replicas int64 [E, X] and counts int64 [E] are of one layer; first_token int64 [1]; real is bool
    [T], False at tokens that do not count, or None.
    """
    slots = torch.empty(topk_ids.shape, dtype=torch.int32, device=topk_ids.device)
    num_choices = topk_ids.numel()
    if num_choices:
        _choose_and_count_kernel[(triton.cdiv(num_choices, BLOCK),)](
            topk_ids.contiguous(),
            replicas,
            counts,
            first_token,
            load,
            load if real is None else real.contiguous().view(torch.uint8),
            slots,
            num_choices,
            replicas.stride(0),
            K=topk_ids.shape[1],
            GOLDEN=golden,
            HAS_REAL=real is not None,
            BLOCK=BLOCK,
        )
    return slots
