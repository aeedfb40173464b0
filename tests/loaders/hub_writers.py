"""Weights in the hub's quantised formats, each beside what it decodes to.

compressed-tensors' own compressors write and read theirs. GPTQ and AWQ are written here from the
definition of their layouts, and decoded element by element.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Encoded = tuple[dict[str, Tensor], Tensor]
"""The tensors of a module by the ends of their names, and the weight [N, K] that they stand for."""

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)


def grouped_codes(
    w: Tensor, groups: Tensor, *, bits: int, symmetric: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Round-to-nearest codes [N, K], scales and zero points [N, G] of columns in these groups."""
    n, levels = len(w), 2**bits
    num_groups = int(groups.max()) + 1
    codes = torch.empty_like(w, dtype=torch.int64)
    scales = torch.empty(n, num_groups, dtype=dtype)
    zeros = torch.full((n, num_groups), levels // 2)
    for group in range(num_groups):
        x = w[:, groups == group].float()
        low, high = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
        if symmetric:
            scale = x.abs().amax(1) / (levels // 2 - 1)
        else:
            scale = (high - low) / (levels - 1)
            zeros[:, group] = (-low / scale).round().clamp(0, levels - 1).long()
        scales[:, group] = scale.to(dtype)
        code = (x / scales[:, group, None].float()).round() + zeros[:, group, None]
        codes[:, groups == group] = code.clamp(0, levels - 1).long()
    return codes, scales, zeros


def decoded(codes: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor) -> Tensor:
    return (codes - zeros[:, groups]).float() * scales.float()[:, groups]


def words(codes: Tensor, bits: int) -> Tensor:
    """Codes [.., C] into int32 [.., C * bits / 32], the lowest bits first."""
    each = 32 // bits
    shifts = torch.arange(each) * bits
    packed = (codes.unflatten(-1, (-1, each)) << shifts).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def gptq(
    w: Tensor,
    *,
    bits: int = 4,
    group_size: int = 32,
    sym: bool = True,
    desc_act: bool = False,
    v2: bool = False,
    seed: int = 0,
) -> Encoded:
    k = w.shape[1]
    size = k if group_size == -1 else group_size
    groups = torch.arange(k) // size
    if desc_act:
        groups = groups[torch.randperm(k, generator=torch.Generator().manual_seed(k + seed))]
    codes, scales, zeros = grouped_codes(w, groups, bits=bits, symmetric=sym, dtype=torch.float16)
    ones = 0x11111111 if bits == 4 else 0x01010101
    return {
        "qweight": words(codes, bits).T.contiguous(),
        "qzeros": words(zeros.T.contiguous(), bits) - (0 if v2 else ones),
        "scales": scales.T.contiguous(),
        "g_idx": groups.to(torch.int32),
    }, decoded(codes, scales, zeros, groups)


def awq(w: Tensor, *, group_size: int = 32) -> Encoded:
    k = w.shape[1]
    groups = torch.arange(k) // (k if group_size == -1 else group_size)
    codes, scales, zeros = grouped_codes(w, groups, bits=4, symmetric=False, dtype=torch.float16)

    def in_turn(values: Tensor) -> Tensor:
        return words(values.unflatten(-1, (-1, 8))[..., list(AWQ_COLUMNS)].flatten(-2), 4)

    return {
        "qweight": in_turn(codes.T.contiguous()),
        "qzeros": in_turn(zeros.T.contiguous()),
        "scales": scales.T.contiguous(),
    }, decoded(codes, scales, zeros, groups)


def ordered_compressed_tensors(
    w: Tensor, *, group_size: int, bits: int = 4, symmetric: bool = True
) -> Encoded:
    """Packed, with groups of columns anywhere, which the package does not write now."""
    k = w.shape[1]
    groups = torch.arange(k)[torch.randperm(k, generator=torch.Generator().manual_seed(k))]
    groups = groups // group_size
    how = {"bits": bits, "symmetric": symmetric, "dtype": torch.bfloat16}
    codes, scales, zeros = grouped_codes(w, groups, **how)
    points = {} if symmetric else {"weight_zero_point": words(zeros.T.contiguous(), bits).T}
    return {
        "weight_packed": words(codes, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor(w.shape),
        "weight_g_idx": groups.to(torch.int32),
        **{end: tensor.contiguous() for end, tensor in points.items()},
    }, decoded(codes, scales, zeros, groups)


def compressed_tensors(stored: str, **weights: Any) -> Callable[[Tensor], Encoded]:
    """What the package's compressor of this format makes of a weight, and reads from that."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(stored)

    def encode(w: Tensor) -> Encoded:
        k = w.shape[1]
        if args.strategy == "tensor":
            tiles = w.reshape(1, -1)
        elif args.strategy == "block":
            tiles = w.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).transpose(1, 2).flatten(2)
        else:
            tiles = w.unflatten(1, (-1, args.group_size if args.strategy == "group" else k))
        scale, zero = calculate_qparams(tiles.amin(-1), tiles.amax(-1), args)
        state = {"weight": w, "weight_scale": scale}
        if not args.symmetric:
            state["weight_zero_point"] = zero
        state = compressor.compress(state, scheme)
        back = compressor.decompress(state, scheme)["weight"]
        return {name: tensor.contiguous() for name, tensor in state.items()}, back.float()

    return encode
