"""The compiled product with bfloat16 weights against float64, and what holds where it cannot be compiled."""

import platform
import shutil
import stat

import pytest
import torch

from qwen_min.fast import product

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler here")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """No kernel yet, and an empty cache."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    product._kernel.cache_clear()
    yield tmp_path / "qwen_min"
    product._kernel.cache_clear()


@needs_compiler
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("outputs", [1, 3, 4, 9, 64, 75])
@pytest.mark.parametrize("inputs", [1, 5, 16, 31, 48, 100, 1024, 2077])  # the last in three panels
def test_every_shape_equals_float64(inputs, outputs, biased):
    weight = torch.randn(outputs, inputs).bfloat16()
    bias = torch.randn(outputs).bfloat16() if biased else None
    for tokens in [*range(1, 15), 19, 20, 21, 35, 36, 37]:  # one by one, and in panels
        x = torch.randn(tokens, inputs) / inputs**0.5
        expected = x.double() @ weight.double().T + (bias.double() if bias is not None else 0)
        close = dict(atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(product.by_kernel(x, weight, bias), expected.float(), **close)
        torch.testing.assert_close(product.by_kernel(x, weight.T.contiguous().T, bias), expected.float(), **close)


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86")
@pytest.mark.parametrize("flag", ["-mno-avx512f", "-mno-avx"])
def test_narrower_registers_give_the_same(flag, fresh, monkeypatch):
    weight, bias = torch.randn(75, 100).bfloat16(), torch.randn(75)
    products = [(torch.randn(tokens, 100) / 10, w) for tokens in (1, 7, 37) for w in (weight, weight.T.contiguous().T)]
    expected = [product.by_kernel(x, w, bias) for x, w in products]
    monkeypatch.setattr(product, "FLAGS", (*product.FLAGS, flag))
    product._kernel.cache_clear()
    for (x, w), y in zip(products, expected, strict=True):
        torch.testing.assert_close(product.by_kernel(x, w, bias), y, atol=1e-5, rtol=0)
    assert len(list(fresh.iterdir())) == 2


@needs_compiler
def test_leading_dimensions_and_strides_are_kept():
    weight, x = torch.randn(6, 20).bfloat16(), torch.randn(4, 3, 20).transpose(0, 1)
    y = product.by_kernel(x, weight, None)
    assert y.shape == (3, 4, 6)
    torch.testing.assert_close(y, x @ weight.float().T, atol=1e-5, rtol=0)


@needs_compiler
def test_bfloat16_numbers_at_the_ends_of_their_range_are_widened_exactly():
    numbers = torch.tensor([0.0, -0.0, 1.0, -3.0e38, 9.2e-41, float("inf"), -1.5, 2.0**-126]).bfloat16()
    y = product.by_kernel(torch.ones(1, 1), numbers[:, None].contiguous(), None)
    assert torch.equal(y[0].view(torch.int32) | (1 << 31), numbers.float().view(torch.int32) | (1 << 31))  # but -0 + 0


def test_it_serves_float32_tokens_by_whole_bfloat16_weights_alone():
    weight = torch.randn(6, 20).bfloat16()
    assert product.by_kernel(torch.randn(0, 20), weight, None) is None
    assert product.by_kernel(torch.randn(2, 20), weight.float(), None) is None
    assert product.by_kernel(torch.randn(2, 20).bfloat16(), weight, None) is None
    assert product.by_kernel(torch.randn(2, 10), weight[:, ::2], None) is None
    assert product.by_kernel(torch.randn(2, 20, device="meta"), weight, None) is None


@needs_compiler
def test_it_is_compiled_once_into_the_users_cache(fresh, monkeypatch):
    assert product.available()
    (library,) = fresh.iterdir()
    product._kernel.cache_clear()
    monkeypatch.setattr(product.subprocess, "run", None)  # a second compilation would fail
    assert product.available() and list(fresh.iterdir()) == [library]


@needs_compiler
def test_another_source_is_another_library(fresh, monkeypatch, tmp_path):
    assert product.available()
    source = tmp_path / "kernels.cpp"
    source.write_text(product.SOURCE.read_text() + "// changed\n")
    monkeypatch.setattr(product, "SOURCE", source)
    product._kernel.cache_clear()
    assert product.available() and len(list(fresh.iterdir())) == 2


@pytest.mark.parametrize("why", ["no compiler", "switched off", "a compiler that fails", "no place to write"])
def test_without_it_torch_gives_the_same_product(why, fresh, monkeypatch, tmp_path):
    if why == "no compiler":
        monkeypatch.setenv("PATH", "")
    elif why == "switched off":
        monkeypatch.setattr(product, "ENABLED", False)
    elif why == "a compiler that fails":
        broken = tmp_path / "c++"
        broken.write_text("#!/bin/sh\nexit 1\n")
        broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        fresh.write_text("a file where the folder would be")
    x, weight, bias = torch.randn(2, 20), torch.randn(6, 20).bfloat16(), torch.randn(6).bfloat16()
    assert not product.available() and product.by_kernel(x, weight, bias) is None
    torch.testing.assert_close(product.product(x, weight, bias), x @ weight.float().T + bias.float())
    assert not fresh.is_dir() or not list(fresh.iterdir())
