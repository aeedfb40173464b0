from functools import partial

import pytest
import torch
from tolerances import assert_close
from torch import Tensor, nn

from moezoo.layers.linear import FusedLinear
from moezoo.layers.moe import FusedMoE, softmax_topk
from moezoo.layers.norm import RMSNorm, input_for, normed

H = 256


def inputs(
    shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32
) -> tuple[RMSNorm, Tensor, Tensor]:
    torch.manual_seed(0)
    norm = RMSNorm(H, 1e-5)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    x, update = torch.randn(*shape, H), torch.randn(*shape, H)
    return norm.to(device, dtype), x.to(device, dtype), update.to(device, dtype)


@pytest.mark.parametrize("with_update", [True, False])
@pytest.mark.parametrize("sum_first", [True, False])
def test_norm_of_a_sum(sum_first: bool, with_update: bool) -> None:
    norm, x, update = inputs((2, 3), "cpu")
    other = update if with_update else None
    expected, total = norm.add(x, other)
    due = norm.of_sum(x, other)
    if sum_first:
        assert torch.equal(due.sum, total)
    assert torch.equal(due.normed, expected)
    assert torch.equal(due.sum, total)
    assert normed(due) is due.normed
    assert normed(x) is x


def test_hooks_and_modules_of_others_get_tensors() -> None:
    norm, x, update = inputs((2, 3), "cpu")
    linear = FusedLinear(H, (96,))
    due = norm.of_sum(x, update)
    assert input_for(linear, due) is due
    assert input_for(nn.Linear(H, 96), due) is due.normed
    hook = linear.register_forward_pre_hook(lambda module, given: None)
    assert input_for(linear, due) is due.normed
    hook.remove()
    assert input_for(linear, due) is due


@pytest.mark.gpu
@pytest.mark.parametrize("with_update", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (3, 1), (1, 9), (1, 100)], ids=str)
@torch.inference_mode()
def test_first_products_on_cuda(shape: tuple[int, ...], with_update: bool) -> None:
    """The kernels of few tokens and the separate ones give the same."""
    norm, x, update = inputs(shape, "cuda", torch.bfloat16)
    other = update if with_update else None
    linear = FusedLinear(H, (96, 32, 32)).to("cuda", torch.bfloat16)
    moe = FusedMoE(H, 64, 16, partial(softmax_topk, k=2, renormalize=True))
    moe.reset_parameters()
    for layer in (linear, moe.to("cuda", torch.bfloat16)):
        expected, total = norm.add(x, other)
        due = norm.of_sum(x, other)
        assert_close(layer(due), layer(expected))
        assert torch.equal(due.sum, total)
        assert_close(due.normed, expected)


@pytest.mark.gpu
def test_gradient_on_cuda() -> None:
    norm, x, update = inputs((1, 1), "cuda")
    linear = FusedLinear(H, (96,)).cuda()
    linear(norm.of_sum(x, update)).sum().backward()
    assert norm.weight.grad is not None
    assert linear.weight.grad is not None


@pytest.mark.gpu
def test_gradient_of_what_is_added_on_cuda() -> None:
    """Adapters: the norms are frozen, and so is the stream until the first adapter adds to it."""
    norm, x, update = inputs((1, 1), "cuda")
    norm.requires_grad_(False)
    update.requires_grad_(True)
    due = norm.of_sum(x, update)
    (gradient,) = torch.autograd.grad(due.normed.sum() + due.sum.sum(), update)
    assert gradient.any()
    normed, total = norm.add(x, update)
    assert normed.requires_grad and total.requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("sum_is_due", [True, False])
def test_gradient_of_a_bias_alone_on_cuda(sum_is_due: bool) -> None:
    norm, x, update = inputs((1, 1), "cuda")
    linear = FusedLinear(H, (96,), bias=True).cuda()
    norm.requires_grad_(False)
    linear.weight.requires_grad_(False)
    linear(norm.of_sum(x, update) if sum_is_due else x).sum().backward()
    assert linear.bias.grad is not None
