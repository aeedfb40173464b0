"""Checks of operands that both attention kernels over a cache share.

Legend: N query rows, Hq query heads, Hk key heads, S slots of the cache, D key width, Dv value
width, P pages of a sequence.
"""

from torch import Tensor


def require_operands(
    q: Tensor,
    keys: Tensor,
    values: Tensor | None,
    page_table: Tensor | None,
    *,
    rows: str,
    page_size: int | None,
    window: int | None,
    sinks: Tensor | None,
    softcap: float | None,
    shared_keys: Tensor | None = None,
) -> None:
    """Check q [N, Hq, D], keys [S, Hk, D], values [S, Hk, Dv], page_table [.., P] and sinks [Hq].

    With shared_keys [S, R] keys are [S, Hk, D - R]. `rows` is the caller's name of N. Raises
    ValueError for shapes, dtypes, strides or settings that do not fit.
    """
    if shared_keys is not None and (shared_keys.ndim != 2 or len(shared_keys) != len(keys)):
        raise ValueError(f"shared_keys must be [{len(keys)}, R], got {list(shared_keys.shape)}")
    shared_dim = 0 if shared_keys is None else shared_keys.shape[1]
    if q.ndim != 3 or keys.ndim != 3 or q.shape[2] != keys.shape[2] + shared_dim:
        raise ValueError(
            f"q must be [{rows}, Hq, D] and keys [S, Hk, {'D - R' if shared_dim else 'D'}], "
            f"got {list(q.shape)} and {list(keys.shape)}"
            + (f" with shared_keys {list(shared_keys.shape)}" if shared_keys is not None else "")
        )
    num_heads, num_key_heads = q.shape[1], keys.shape[1]
    if num_key_heads == 0 or num_heads % num_key_heads:
        raise ValueError(f"{num_heads} query heads cannot share {num_key_heads} key heads evenly")
    if values is not None and (values.ndim != 3 or values.shape[:2] != keys.shape[:2]):
        raise ValueError(
            f"values must be [{keys.shape[0]}, {num_key_heads}, Dv], got {list(values.shape)}"
        )
    cached = {"keys": keys, "shared_keys": shared_keys, "values": values}
    tensors = {"q": q, **cached, "page_table": page_table}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"the last stride of {name} must be 1, got {tensor.stride()}")
    for name, tensor in cached.items():
        if tensor is not None and tensor.dtype != q.dtype:
            raise ValueError(f"{name} must be {q.dtype} as q is, got {tensor.dtype}")
    if page_size is not None and (page_size < 16 or page_size & (page_size - 1)):
        raise ValueError(f"page_size must be a power of two from 16 up, got {page_size}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0, got {softcap}")
    if sinks is not None and sinks.shape != (num_heads,):
        raise ValueError(f"sinks must be [{num_heads}], got {list(sinks.shape)}")
