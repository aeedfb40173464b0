"""Integers of 4 and 8 bits in int32 words, as GPTQ, AWQ and compressed-tensors pack them.

Codes are unsigned: what stands for zero is 8 or 128 where there are no zero points.
"""

from functools import partial

import torch
from torch import Tensor

from moezoo.layers.quant import Int4, Int8
from moezoo.layers.quant.groups import GROUP_SIZES, PER_CHANNEL, pack, unpack
from moezoo.layers.quant.kind import Kind
from moezoo.loaders.encodings.stored import Check, Extra

OF_THE_RUN = (
    *("dataset", "tokenizer", "nsamples", "seqlen", "model_seqlen", "batch_size", "pad_token_id"),
    *("damp_percent", "damp_auto_increment", "mse", "true_sequential", "static_groups"),
    *("act_group_aware", "hyb_act", "iters", "lr", "minmax_lr", "enable_minmax_tuning"),
    *("enable_norm_bias_tuning", "enable_quanted_input", "gradient_accumulate_steps", "amp"),
    *("low_gpu_mem_usage", "cache_block_outputs", "parallel_packing", "pack_impl"),
    *("offload_to_disk", "offload_to_disk_path", "scale_dtype", "lm_head", "sym"),
    *("block_name_to_quantize", "to_quant_block_names", "quant_block_list"),
    *("module_name_preceding_first_block", "model_name_or_path", "model_file_base_name"),
    *("meta", "provider", "autoround_version", "packing_format", "backend", "use_exllama"),
    *("disable_exllama", "exllama_config", "use_cuda_fp16", "max_input_length", "do_fuse"),
    *("modules_to_fuse", "fuse_max_seq_len", "method"),
)
"""Config fields on how a quantiser ran, on how others run its result, or on what the tensors show
anyway."""

NO_ACTIVATIONS = (16, 32)
"""Values of AutoRound's bits of activations that stand for not quantised."""


def integer_kind(
    bits: int, columns: int, group_size: int, dtype: torch.dtype, *, zeros: bool, ordered: bool
) -> Kind | None:
    """Return the kind that groups of this size are held in, repeating scales where its groups are
    smaller; None where there is none."""
    if group_size in (PER_CHANNEL, columns):
        held: int | None = group_size
    else:
        fits = columns % group_size == 0
        held = next((size for size in GROUP_SIZES if fits and group_size % size == 0), None)
    if held is None or (bits == 4 and columns % 2):
        return None
    ordered = ordered and held not in (PER_CHANNEL, columns)
    options = {"dtype": dtype, "zeros": zeros, "ordered": ordered}
    return Kind.integers(Int4 if bits == 4 else Int8, held, columns, **options)


def held_groups(kind: Kind, columns: int) -> int:
    """Return the number of groups for that many columns."""
    size: int = dict(kind.options)["group_size"]
    return 1 if size == PER_CHANNEL else columns // size


def repeated(values: Tensor, groups: int) -> Tensor:
    """Repeat values [N, G] or [1] to [N, groups], or one number to [1, 1]."""
    values = values.reshape(-1, values.shape[-1] if values.ndim else 1)
    return values.repeat_interleave(max(1, groups // values.shape[1]), 1)


def octets_of(words: Tensor) -> Tensor:
    """View int32 [.., C] as uint8 [.., 4 C], the lowest bits first."""
    # Flat, since a dimension of size 1 may have any stride, which a view as bytes does not take.
    return words.reshape(-1).view(torch.uint8).view(*words.shape[:-1], -1)


def words_of(octets: Tensor) -> Tensor:
    """View uint8 [.., 4 C] as int32 [.., C]: the inverse of `octets_of`."""
    return octets.reshape(-1).view(torch.int32).view(*octets.shape[:-1], -1)


def unpacked(words: Tensor, bits: int) -> Tensor:
    """Unpack int32 [.., C] into uint8 [.., C * 32 / bits], the lowest bits first; bits is 4 or
    8."""
    octets = octets_of(words)
    return octets if bits == 8 else unpack(octets)


def held(octets: Tensor, bits: int, order: Tensor | None) -> Tensor:
    """Convert bytes [N, K * bits / 8] of unsigned codes, even columns in the low halves, to the
    data of `Int4` or `Int8`, with columns in this order."""
    if bits == 8:
        codes = octets if order is None else octets.index_select(1, order)
        return (codes ^ 128).view(torch.int8)
    if order is None:
        return octets
    return pack(unpack(octets).index_select(1, order))


def order_extra(tensor: str, columns: int, group_size: int) -> Extra:
    """Describe the tensor that has each column's group, read as the order that sorts columns by
    group."""

    def wrong(groups: Tensor) -> Tensor:
        order = groups.argsort(stable=True)
        expected = torch.arange(columns, device=groups.device) // group_size
        mask = torch.empty_like(groups, dtype=torch.bool)
        mask[order] = groups[order] != expected
        return mask

    problem = f"column {{place}} is in group {{value}}; each has {group_size} of {columns} columns"
    return Extra(tensor, "order", _sorting, Check(wrong, problem))


def _sorting(groups: Tensor) -> Tensor:
    return groups.argsort(stable=True).to(torch.int32)


def in_order_extra(tensor: str, group_size: int) -> Extra:
    """Describe the tensor that has each column's group, where groups must be in order."""

    def wrong(groups: Tensor) -> Tensor:
        columns = torch.arange(len(groups), device=groups.device)
        return groups != columns // group_size

    problem = "column {place} is in group {value}, though the config says that columns are in order"
    return Extra(tensor, check=Check(wrong, problem))


def all_equal(word: int, problem: str) -> Check:
    return Check(partial(torch.ne, other=word), problem)
