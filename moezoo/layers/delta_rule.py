"""The gated delta rule (Yang et al., 2024): each head has a matrix S that tokens read and rewrite.

    S = S * exp(g[t])
    S = S + k[t] (v[t] - S^T k[t])^T * beta[t]
    y[t] = S^T q[t]

with q and k normalised to length 1, and q divided by sqrt(Dk). g is one number, or one for each row
of S (Kimi Team, 2025). Many tokens are computed in chunks: within a chunk the corrections
v - S^T k of its tokens are the solution of a triangular system (the WY form), and only from chunk
to chunk is the computation sequential. All of it is in fp32.

Legend: B sequences, T tokens, H heads, Dk key width, Dv value width, G 1 or Dk, N chunks of C
tokens.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from moezoo.layers.kernels.sizes import next_power_of_2

CHUNK = 64


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, *, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Apply the rule to T tokens; return y fp32 [B, T, H, Dv] and the state after the last token.

    q and k are [B, T, Hk, Dk], v [B, T, H, Dv], g fp32 [B, T, H, G], beta fp32 [B, T, H], state
    fp32 [B, H, Dk, Dv]. Head h of v uses head h // (H / Hk) of q and k. g is 0 or less. A token
    whose g and beta are both 0 leaves the state as it is.
    """
    q = _unit_length(q) * q.shape[-1] ** -0.5
    k = _unit_length(k)
    groups = v.shape[2] // k.shape[2]
    if groups > 1:
        q, k = q.repeat_interleave(groups, 2), k.repeat_interleave(groups, 2)
    if v.shape[1] == 1:
        return _one_token(q, k, v.float(), g=g, beta=beta, state=state)
    return _chunks(q, k, v.float(), g=g, beta=beta, state=state)


def _unit_length(x: Tensor) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _one_token(
    q: Tensor, k: Tensor, v: Tensor, *, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    q, k, v, g = (x.transpose(1, 2) for x in (q, k, v, g))  # [B, H, 1, ..]
    state = state * g.exp().mT
    correction = (v - k @ state) * beta.transpose(1, 2)[..., None]
    state = state + k.mT * correction
    return (q @ state).transpose(1, 2), state


def _chunks(
    q: Tensor, k: Tensor, v: Tensor, *, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    length = v.shape[1]
    size = next_power_of_2(min(CHUNK, length))
    padding = -length % size

    def in_chunks(x: Tensor) -> Tensor:
        x = F.pad(x, (*(0,) * (2 * (x.dim() - 2)), 0, padding))
        return x.transpose(1, 2).unflatten(2, (-1, size))

    q, k, v, g, beta = (in_chunks(x) for x in (q, k, v, g, beta))
    beta = beta[..., None]
    decay = g.cumsum(-2).exp()  # [B, H, N, C, G]
    decayed_products = _products_per_head if g.shape[-1] == 1 else _products_per_row
    system, within = decayed_products(torch.stack((k * beta, q)), k, g)
    # The correction of each token if the state before the chunk were 0, and the matrix whose
    # product with that state is subtracted from it.
    scaled = torch.cat((v, k * decay), -1) * beta
    solved = torch.linalg.solve_triangular(system, scaled, upper=False, unitriangular=True)
    added, taken = solved.split_with_sizes((v.shape[-1], k.shape[-1]), -1)
    reads = q * decay
    writes = k * _sum_of_following(g).exp()
    kept = decay[..., -1:, :].mT
    outputs = []
    for n in range(v.shape[2]):
        new = added[:, :, n] - taken[:, :, n] @ state
        outputs.append(reads[:, :, n] @ state + within[:, :, n] @ new)
        state = state * kept[:, :, n] + writes[:, :, n].mT @ new
    y = torch.stack(outputs, 2).flatten(2, 3)[:, :, :length]
    return y.transpose(1, 2), state


def _sum_of_following(g: Tensor) -> Tensor:
    """Return for each token of g [.., C, G] the sum over the tokens that follow it.

    A difference of two cumulative sums would lose digits.
    """
    return F.pad(g[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def _products_per_head(a: Tensor, b: Tensor, g: Tensor) -> Tensor:
    """Return the decayed products a[i] b[j] exp(g[j + 1] + .. + g[i]) where j <= i, else 0.

    a and b are [.., C, Dk], g [.., C, 1], one decay for the head; the result is [.., C, C].
    """
    decay = g.cumsum(-2)
    later = torch.ones(g.shape[-2], g.shape[-2], dtype=torch.bool, device=g.device).triu(1)
    return a @ b.mT * (decay - decay.mT).masked_fill(later, -torch.inf).exp()


def _products_per_row(a: Tensor, b: Tensor, g: Tensor) -> Tensor:
    """Return the decayed products of `_products_per_head` for g [.., C, Dk], which has a decay for
    each summand of a product; C is a power of 2.

    For i and j in neighbouring blocks of 1, 2, 4, .. tokens the decay is split where the blocks
    meet: one factor goes to a, the other to b. So no exponential overflows, and all products are of
    matrices.
    """
    products = (a * b).sum(-1)[..., None, None]  # [.., blocks, size, size]
    while products.shape[-3] > 1:
        blocks = (-1, 2, products.shape[-1])
        early, late = g.unflatten(-2, blocks).unbind(-3)
        reads = a.unflatten(-2, blocks)[..., 1, :, :] * late.cumsum(-2).exp()
        writes = b.unflatten(-2, blocks)[..., 0, :, :] * _sum_of_following(early).exp()
        first, second = products.unflatten(-3, (-1, 2)).unbind(-3)
        upper = torch.cat((first, torch.zeros_like(first)), -1)
        lower = torch.cat((reads @ writes.mT, second), -1)
        products = torch.cat((upper, lower), -2)
    return products.squeeze(-3)
