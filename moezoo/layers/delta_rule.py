"""The gated delta rule (Yang et al., 2024): a matrix S of each head that tokens read and rewrite.

    S = S * exp(g[t])
    S = S + k[t] (v[t] - S^T k[t])^T * beta[t]
    y[t] = S^T q[t]

with q and k of length 1, and q divided by sqrt(Dk). Many tokens are computed in chunks: within one
the corrections v - S^T k of its tokens are the solution of a triangular system (the WY form), and
only whole chunks follow each other. All in fp32.

Legend: B sequences, T tokens, H heads, Dk key width, Dv value width, N chunks of C tokens.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 64


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, *, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """q and k [B, T, Hk, Dk], v [B, T, H, Dv], g and beta fp32 [B, T, H], state fp32 [B, H, Dk, Dv]
    -> y fp32 [B, T, H, Dv] and the state after the last token.

    Head h of v has head h // (H / Hk) of q and k. g is 0 or less. Where g and beta are both 0 a
    token leaves the state as it is.
    """
    q = _unit(q) * q.shape[-1] ** -0.5
    k = _unit(k)
    groups = v.shape[2] // k.shape[2]
    if groups > 1:
        q, k = q.repeat_interleave(groups, 2), k.repeat_interleave(groups, 2)
    if v.shape[1] == 1:
        return _one_token(q, k, v.float(), g=g, beta=beta, state=state)
    return _chunks(q, k, v.float(), g=g, beta=beta, state=state)


def _unit(x: Tensor) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _one_token(
    q: Tensor, k: Tensor, v: Tensor, *, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, 1, ..]
    state = state * g.exp().transpose(1, 2)[..., None]
    correction = (v - k @ state) * beta.transpose(1, 2)[..., None]
    state = state + k.mT * correction
    return (q @ state).transpose(1, 2), state


def _chunks(
    q: Tensor, k: Tensor, v: Tensor, *, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    length = v.shape[1]
    size = min(CHUNK, length)
    rest = -length % size

    def in_chunks(x: Tensor) -> Tensor:
        x = F.pad(x, (*(0,) * (2 * (x.dim() - 2)), 0, rest))
        return x.transpose(1, 2).unflatten(2, (-1, size))

    q, k, v, g, beta = (in_chunks(x) for x in (q, k, v, g, beta))
    decay = g.cumsum(-1)  # [B, H, N, C]
    later = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    between = (decay[..., :, None] - decay[..., None, :]).masked_fill(later, -torch.inf).exp()
    system = (k * beta[..., None]) @ k.mT * between
    # What each token adds, had there been nothing before the chunk, and what the state takes off.
    scaled = torch.cat((v, k * decay.exp()[..., None]), -1) * beta[..., None]
    solved = torch.linalg.solve_triangular(system, scaled, upper=False, unitriangular=True)
    added, taken = solved.split_with_sizes((v.shape[-1], k.shape[-1]), -1)
    within = q @ k.mT * between
    reads = q * decay.exp()[..., None]
    writes = k * (decay[..., -1:] - decay).exp()[..., None]
    kept = decay[..., -1].exp()[..., None, None]
    outputs = []
    for n in range(v.shape[2]):
        new = added[:, :, n] - taken[:, :, n] @ state
        outputs.append(reads[:, :, n] @ state + within[:, :, n] @ new)
        state = state * kept[:, :, n] + writes[:, :, n].mT @ new
    y = torch.stack(outputs, 2).flatten(2, 3)[:, :, :length]
    return y.transpose(1, 2), state
