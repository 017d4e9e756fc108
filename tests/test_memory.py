"""Memory for large results: what its users rely on. That it is used again is measured (`bench`), not tested."""

import pytest
import torch

from qwen_min.fast.memory import LARGE, empty


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(0,), (3, 5), (2, 300, 512), (LARGE + 1,)], ids=str)
def test_it_is_a_contiguous_aligned_tensor_of_its_own(shape, dtype):
    like = torch.empty(1, dtype=dtype)
    got = empty(shape, like)
    assert (got.shape, got.dtype, got.device) == (torch.Size(shape), dtype, like.device)
    assert got.is_contiguous() and got.data_ptr() % 64 == 0
    assert not got._is_view()  # in-place operations of autograd depend on it
    other = empty(shape, like)
    got.fill_(1)
    other.fill_(2)
    assert (got == 1).all() and (other == 2).all()


def test_a_gradient_flows_through_what_is_written_into_it():
    x = torch.randn(300, 512, requires_grad=True)
    y = (2 * x).add_(empty(x.shape, x).fill_(3))
    y.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2)) and torch.equal(y, 2 * x + 3)


def test_on_another_device_torch_gives_it():
    got = empty((2, 300, 512), torch.empty(1, device="meta"))
    assert got.is_meta and got.shape == (2, 300, 512)
