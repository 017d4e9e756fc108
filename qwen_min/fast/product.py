"""x Wᵀ + b: by a kernel of our own for bfloat16 weights on the CPU, else by the faster of torch's two libraries there.

The kernel is C++ that is compiled on first use. Where there is no compiler, or `ENABLED` is False, torch widens the
weight and multiplies: the same to rounding.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen_min.fast.memory import empty

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp")

ENABLED = True

# torch multiplies float32 matrices on the CPU by MKL, which leaves the wide registers of AMD's processors unused: 165
# to 185 GFLOP/s on two cores where oneDNN, which torch carries too, reaches 360 to 400 (Zen 5, torch 2.13, measured).
# torch offers it for float32 under this name alone. Small products are faster without it.
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
ONEDNN_FROM = 2**20  # multiplications

INSTEAD: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {}
"""What answers for `product` on a kind of device, by its name: nothing, unless a prediction of memory puts it here."""


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b for x (..., I), W (O, I), b (O), in the type of x; no gradient.

    W and b may be kept in another type: they are widened inside the product, or before it where no kernel serves.
    """
    ours = not torch.compiler.is_compiling()  # the compiler knows torch's own product alone
    if ours and (answer := INSTEAD.get(x.device.type)):
        return answer(x, weight, bias)
    if ours and weight.dtype != x.dtype and (y := by_kernel(x, weight, bias)) is not None:
        return y
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if ours and ONEDNN and x.dtype == torch.float32 and x.is_cpu and x.numel() * len(weight) >= ONEDNN_FROM:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def by_kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """x Wᵀ + b for float32 x (..., I) and bfloat16 W (O, I); None where the kernel does not serve.

    W, or its transpose (as in a backward), is contiguous.
    """
    outputs, inputs = weight.shape
    transposed = not weight.is_contiguous()
    if not (
        all(tensor.is_cpu for tensor in (x, weight, bias) if tensor is not None)
        and x.numel()
        and x.shape[-1:] == (inputs,)  # torch says what is wrong; the kernel would write beyond its memory
        and (bias is None or bias.shape == (outputs,))
        and x.dtype == torch.float32
        and weight.dtype == torch.bfloat16
        and (weight.T if transposed else weight).is_contiguous()
    ):
        return None
    kernel = _kernel() if ENABLED else None
    if kernel is None:
        return None
    x, out = x.contiguous(), empty((*x.shape[:-1], outputs), x)
    bias = None if bias is None else bias.float().contiguous()
    pointers = x.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr()
    kernel(*pointers, x.numel() // inputs, inputs, outputs, transposed)
    return out


def available() -> bool:
    """Whether the kernel serves here; asking compiles it, two seconds once."""
    return ENABLED and _kernel() is not None


@cache
def _kernel():
    """The compiled function, or None."""
    compiler = shutil.which("c++")
    if compiler is None:
        return None
    try:
        function = ctypes.CDLL(str(_compiled(compiler))).linear_bfloat16
    except (OSError, subprocess.SubprocessError, AttributeError):  # not compiled, not loaded, or another library
        return None
    function.argtypes, function.restype = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 3 + [ctypes.c_int], None
    return function


def _compiled(compiler: str) -> Path:
    """The library of this source, compiler and processor, from torch's cache of the user's home.

    Compiled without torch's extension loader: that imports setuptools, wants ninja, and takes longer to find a
    finished library than all else that loading a model does. Its digest stands at its end, which no loader reads.

    Raises:
        OSError, SubprocessError: it cannot be compiled, or there is no folder in which nobody else may write.
    """
    processor = platform.machine() + _processor()
    key = hashlib.sha256("\0".join((SOURCE.read_text(), *FLAGS, compiler, processor)).encode()).hexdigest()[:16]
    folder = Path(torch.hub.get_dir()).parent / "qwen_min"
    library = folder / f"kernels-{key}.so"
    if not folder.is_absolute():  # without a home: it would be made wherever the user stands
        raise OSError(f"{folder}: expected a cache in a home folder")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _private(folder):
        raise PermissionError(f"{folder}: expected a folder of this user, in which nobody else may write")
    if not (library.is_file() and _private(library) and _whole(library.read_bytes())):
        with tempfile.TemporaryDirectory(dir=folder) as beside:  # renamed when whole: another process may do the same
            new, silent = Path(beside) / library.name, subprocess.DEVNULL  # a compiler may read what is piped to us
            command = [compiler, *FLAGS, str(SOURCE), "-o", str(new)]
            subprocess.run(command, check=True, stdin=silent, stdout=silent, stderr=silent, timeout=120)
            data = new.read_bytes()
            new.write_bytes(data + hashlib.sha256(data).digest())
            new.chmod(0o700)
            new.replace(library)
    return library


def _private(path: Path) -> bool:
    """Whether nobody but this user, and root, can write there: what is in a library runs as the user who loads it."""
    held = path.stat()
    return held.st_uid in (0, os.getuid()) and not held.st_mode & 0o022


def _whole(data: bytes) -> bool:
    """Whether a library ends in its digest: to load a part of one, as a power cut leaves it, is the end by SIGBUS."""
    return data[-32:] == hashlib.sha256(data[:-32]).digest()


def _processor() -> str:
    """What `-march=native` depends on: a home folder may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
