"""The compiled product with bfloat16 weights against float64, and what holds where it cannot be compiled."""

import ctypes
import os
import platform
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qwen_min.fast import product

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler here")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
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
    assert product.by_kernel(torch.randn(2, 20), weight.to("meta"), None) is None


@needs_compiler
@pytest.mark.parametrize(("inputs", "biases"), [(10, (6,)), (30, (6,)), (20, (5,)), (20, (1, 6)), (20, ())])
def test_shapes_that_do_not_fit_are_left_to_torch(inputs, biases):
    """Bug: the kernel read and wrote beyond its memory, and the process was aborted."""
    x, weight, bias = torch.randn(12, inputs), torch.randn(6, 20).bfloat16(), torch.randn(biases)
    assert product.by_kernel(x, weight, bias) is None
    if len(biases) == 1:
        with pytest.raises(RuntimeError):
            product.product(x, weight, bias)


@needs_compiler
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tokens", [5, 37])
def test_a_number_that_is_not_finite_stays_in_its_token_and_its_output(tokens, value):
    x, weight = torch.randn(tokens, 21), torch.randn(35, 21).bfloat16()
    x[2, 20] = weight[3, 20] = value
    expected = x @ weight.float().T
    for w in (weight, weight.T.contiguous().T):
        torch.testing.assert_close(product.by_kernel(x, w, None), expected, atol=1e-5, rtol=0, equal_nan=True)
    assert expected.isfinite().sum() == (tokens - 1) * 34


SANITISED = """
import ctypes, itertools, sys
product, memory = ctypes.CDLL(sys.argv[1]).linear_bfloat16, ctypes.CDLL(None)
memory.calloc.restype = ctypes.c_void_p
for tokens, inputs, outputs, transposed in itertools.product((1, 3, 19, 33), (1, 17, 31, 1025), (0, 1, 17, 65), (0, 1)):
    sizes = 4 * tokens * inputs, 2 * inputs * outputs, 4 * outputs, 4 * tokens * outputs
    blocks = [ctypes.c_void_p(memory.calloc(size, 1)) for size in sizes]
    product(*blocks, *map(ctypes.c_int64, (tokens, inputs, outputs)), transposed)
    for block in blocks:
        memory.free(block)
"""


@needs_compiler
def test_no_byte_beyond_its_tensors_is_read_or_written(tmp_path):
    """As the sanitisers of addresses and of undefined behaviour see it, in a process of its own."""
    library, flags = tmp_path / "kernels.so", ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    built = subprocess.run(["c++", *product.FLAGS, *flags, product.SOURCE, "-o", library], capture_output=True)
    names = ("libasan.so", "libubsan.so")
    runtimes = [subprocess.run(["c++", f"-print-file-name={n}"], capture_output=True, text=True).stdout for n in names]
    if built.returncode or not all(os.path.isabs(path) for path in runtimes):
        pytest.skip("no address and undefined sanitiser for this compiler")
    environment = os.environ | {"LD_PRELOAD": " ".join(runtimes).replace("\n", ""), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-c", SANITISED, str(library)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


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


@pytest.fixture
def copied(monkeypatch, tmp_path, request):
    """A compiler that takes no time: it copies what the real one made."""
    built = product._compiled(shutil.which("c++"))
    request.getfixturevalue("fresh")
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\nfor out; do :; done; cp {built} "$out"; cat > {tmp_path / "read"}\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)


def put(path: Path, data: bytes) -> None:
    path.unlink()  # this process may have mapped the old one
    path.write_bytes(data)
    path.chmod(0o700)


def of_another_user(path: Path) -> None:
    os.chown(path, 12345, -1) if os.getuid() == 0 else pytest.skip("only root can give a file away")


@needs_compiler
@pytest.mark.parametrize(
    ("damage", "served"),
    [
        (lambda path: put(path, b""), True),
        (lambda path: put(path, path.read_bytes()[:20_000]), True),  # loading it was the end, by SIGBUS
        (lambda path: put(path, b"\x7fELF" + path.read_bytes()[4:-1]), True),
        (lambda path: path.chmod(0o777), True),
        (of_another_user, True),
        (lambda path: path.parent.chmod(0o777), False),
        (lambda path: of_another_user(path.parent), False),
    ],
    ids=["empty", "a part", "a byte less", "others may write", "another's", "in an open folder", "in another's"],
)
def test_what_others_can_write_or_is_not_whole_is_never_loaded(damage, served, copied, fresh, monkeypatch):
    """It is compiled anew, or where others could put something in its place, torch's product serves."""
    loaded, true, umask = [], ctypes.CDLL, os.umask(0)
    monkeypatch.setattr(product.ctypes, "CDLL", lambda path: (loaded.append(os.stat(path)), true(path))[1])
    try:
        assert product.available()
        (library,) = fresh.iterdir()
        assert [stat.S_IMODE(path.stat().st_mode) for path in (fresh, library)] == [0o700, 0o700]
        product._kernel.cache_clear()
        damage(library)
        assert product.available() == served
    finally:
        os.umask(umask)
    assert len(loaded) == 1 + served
    assert not served or (loaded[0].st_ino != loaded[1].st_ino and loaded[0].st_size == loaded[1].st_size)


@needs_compiler
@pytest.mark.parametrize("home", ["~/.cache/torch/hub", "hub"])
def test_without_a_home_nothing_is_made_where_the_user_stands(home, copied, fresh, monkeypatch, tmp_path):
    """Bug: a folder named ~ in the working folder, or the one of an empty TORCH_HOME, and what lay there was loaded."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: home)
    assert not product.available() and not list(Path().iterdir())


@needs_compiler
def test_a_compiler_reads_nothing_of_what_is_piped_in(copied, tmp_path):
    """Bug: a wrapper that reads took the prompt of `generate`, or waited for the terminal."""
    code = "from qwen_min.fast import product; import sys; print(product.available(), sys.stdin.read())"
    environment = os.environ | {"TORCH_HOME": str(tmp_path)}
    piped = {"input": "piped", "cwd": Path(__file__).parents[1], "env": environment}
    done = subprocess.run([sys.executable, "-c", code], **piped, capture_output=True, text=True)
    assert done.stdout == "True piped\n" and (tmp_path / "read").read_bytes() == b""
