"""The Triton backend: against the reference bit for bit, against fp64, compiled for a GPU, and when it is chosen.

Where there is a GPU the kernels run on it. Elsewhere a process of its own runs ``TestKernels`` of this file under
Triton's interpreter, since that has to be chosen before Triton is imported.
"""

from __future__ import annotations

import functools
import os
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fewbits import kernels
from fewbits.errors import ConfigError, FewbitsWarning
from fewbits.kernels import pieces as pieces_module
from fewbits.kernels import reference
from fewbits.kernels.codebooks import decision_rule

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton has no build for this system")

ROOT = Path(__file__).resolve().parent.parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
STATES = (("nf4", 64, False), ("fp4", 32, True), ("nf4", 128, True))


@pytest.fixture
def gpu():
    """Where the kernels run: conftest leaves tests that ask for this their GPU."""
    return "cuda" if ON_GPU else "cpu"


@pytest.fixture(autouse=True)
def _fresh_numbers():
    seed = random.SystemRandom().randrange(2**31)
    print(f"torch.manual_seed({seed})")  # shown if the test fails
    torch.manual_seed(seed)


def _weights(shape, dtype, device):
    """Normal numbers whose scale differs by row, one row of zeros, one with a large element."""
    w = torch.randn(shape) * torch.rand(shape[0], *[1] * (len(shape) - 1))
    if shape[0] > 2:
        w[1] = 0
        w[2].view(-1)[-1] = 30
    return w.to(device, dtype)


def _padded_reference(w, format, block_size):
    """The reference's result with whole blocks only, which its CPU and its GPU arithmetic treat alike."""
    n = w.numel()
    packed, absmax = reference.quantize_4bit(F.pad(w.reshape(-1), (0, -n % (2 * block_size))), format, block_size)
    return packed[: (n + 1) // 2], absmax[: -(-n // block_size)]


def _state_4bit(shape, format, block_size, nested, device):
    """Inner tensors of a random weight, and the weight they stand for, in fp64."""
    packed, absmax = _padded_reference(_weights(shape, torch.float32, device), format, block_size)
    state = (packed, *reference.quantize_absmax(absmax)) if nested else (packed, absmax, None, None)
    w = reference.dequantize_4bit(*state, format, block_size, list(shape), torch.float32)
    return state, w.double()


def _bound(x, w, dtype, rounded_weight=False):
    """fp32 sums in any order, one rounding to ``dtype``, and W's own where a product with many rows rounds it."""
    magnitude = x.double().abs() @ w.abs().t()
    subnormal = 2.0**-25 if dtype == torch.float16 else 0.0  # half of fp16's smallest step
    inner = (x.shape[1] + 8) * 2.0**-24 * magnitude  # and the roundings of scale, product and bias
    if rounded_weight and ON_GPU:
        inner = inner + UNIT[dtype] * magnitude + subnormal * x.double().abs().sum(1, keepdim=True)
    return inner * (1 + UNIT[dtype]) + UNIT[dtype] * (x.double() @ w.t()).abs() + subnormal


def _with_bias(product, bias, bound):
    """What a product is with its bias, and what it may be off: the bias is rounded with the product, or after it."""
    if bias is None:
        return product, bound
    unit = UNIT[bias.dtype]
    return product + bias.double(), bound + unit * (2 * bias.double().abs() + product.abs())


def _close(out, exact, bound, case):
    assert bool(((out.double() - exact).abs() <= bound).all()), case


class TestKernels:
    __test__ = ON_GPU or INTERPRETED

    @pytest.fixture(autouse=True)
    def _triton(self):
        with kernels.use_backend("triton"):
            yield

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("format", ["nf4", "fp4"])
    def test_quantizing_to_4_bits(self, format, dtype, gpu):
        for block_size in (32, 64, 128, 256, 512, 1024, 2048, 4096):
            sizes = ((1, 1), (1, block_size + 1), (5, 1021), (4, 33, 32)) if block_size <= 64 else ((3, 2731),)
            for shape in sizes:
                w = _weights(shape, dtype, gpu)
                before = w.clone()
                packed, absmax = kernels.ops.quantize_4bit(w, format, block_size)
                for expected in [_padded_reference] + [reference.quantize_4bit] * ON_GPU:
                    codes, scales = expected(w, format, block_size)
                    assert torch.equal(packed, codes), (shape, block_size)
                    assert torch.equal(absmax, scales), (shape, block_size)
                assert torch.equal(w, before)

    @pytest.mark.parametrize("format", ["nf4", "fp4"])
    def test_quantizing_ties_and_extremes(self, format, gpu):
        """Values on a bound and next to it; scales that only subnormal numbers reach, or almost none."""
        bounds = decision_rule(format, torch.device("cpu"))[0]
        near = torch.cat([torch.nextafter(bounds, torch.full_like(bounds, side)) for side in (-2.0, 2.0)])
        values = F.pad(torch.cat([torch.tensor([1.0, -1.0, 0.0, -0.0]), bounds, near]), (0, 15))
        assert values.numel() == 64
        magnitudes = torch.tensor([1.0, 2.0**100, 2.0**-100, 2.0**127, 2.0**-126, 1e-38, 2.0**-140, 0.0])
        w = (values * magnitudes[:, None]).to(gpu)
        packed, absmax = kernels.ops.quantize_4bit(w, format, 64)
        codes, scales = reference.quantize_4bit(w, format, 64)
        assert torch.equal(packed, codes)
        assert torch.equal(absmax, scales)

    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, in the interpreter
    def test_a_nan_reaches_the_scales(self, gpu):
        w = torch.randn(5, 64, device=gpu)
        w[1, 3], w[2, 5] = torch.nan, torch.inf
        _, absmax = kernels.ops.quantize_4bit(w, "nf4", 64)
        assert absmax.isnan().tolist() == [False, True, False, False, False]
        assert absmax.isinf().tolist() == [False, False, True, False, False]

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_dequantizing_4_bits(self, dtype, gpu):
        for format, block_size, nested in (*STATES, ("fp4", 256, False), ("nf4", 4096, True)):
            for shape in ((1, 1), (7, 129), (3, 5000), (300, 64)):
                state, _ = _state_4bit(shape, format, block_size, nested, gpu)
                args = (*state, format, block_size, list(shape), dtype)
                out = kernels.ops.dequantize_4bit(*args)
                assert out.shape == shape
                assert torch.equal(out, reference.dequantize_4bit(*args)), (format, block_size, nested, shape)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_int8_there_and_back(self, dtype, gpu):
        for shape in ((1, 1), (5, 70), (4, 5000), (3, 2, 33), (70,), (3, 4096)):
            w = _weights(shape, dtype, gpu)
            q, absmax = kernels.ops.quantize_int8(w)
            codes, scales = reference.quantize_int8(w)
            assert torch.equal(q, codes), shape
            assert torch.equal(absmax, scales), shape
            for out_dtype in DTYPES:
                out = kernels.ops.dequantize_int8(q, absmax, out_dtype)
                assert torch.equal(out, reference.dequantize_int8(q, absmax, out_dtype)), (shape, out_dtype)

    def test_int8_of_what_lies_across_memory(self, gpu):
        w = _weights((64, 33), torch.float32, gpu).t()
        for ours, expected in zip(kernels.ops.quantize_int8(w), reference.quantize_int8(w), strict=True):
            assert torch.equal(ours, expected)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("format", "block_size", "nested"), STATES)
    def test_linear_4bit(self, format, block_size, nested, dtype, gpu):
        # rows that begin a block, long rows in two steps of the kernel, and rows that share blocks
        for shape in ((33, 2 * block_size), (5, 4096 + block_size), (9, block_size + 6)):
            state, w = _state_4bit(shape, format, block_size, nested, gpu)
            args = (format, block_size, list(shape))
            for rows in (1, 2, 5, 9):
                x = torch.randn(rows, shape[1], device=gpu).to(dtype)
                bias = None if rows == 2 else torch.randn(shape[0], device=gpu).to(dtype)
                exact, bound = _with_bias(x.double() @ w.t(), bias, _bound(x, w, dtype, rows > 8 or shape[1] % 32 > 0))
                out = kernels.ops.linear_4bit(x, *state, bias, *args)
                assert out.dtype == dtype
                _close(out, exact, bound, (shape, rows))
                if rows == 5:  # the same bits every time
                    assert torch.equal(out, kernels.ops.linear_4bit(x, *state, bias, *args))
            g = torch.randn(3, shape[0], device=gpu).to(dtype)
            out = kernels.ops.linear_4bit_t(g, *state, *args)
            _close(out, g.double() @ w, _bound(g, w.t(), dtype, True), shape)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_linear_int8(self, dtype, gpu):
        for shape in ((33, 64), (5, 2051), (13, 7), (1, 1)):
            q, absmax = reference.quantize_int8(_weights(shape, torch.float32, gpu))
            w = q.double() * absmax.double()[:, None] / 127
            for rows in (1, 2, 5, 9):
                x = torch.randn(rows, shape[1], device=gpu).to(dtype)
                bias = None if rows == 2 else torch.randn(shape[0], device=gpu).to(dtype)
                exact, bound = _with_bias(x.double() @ w.t(), bias, _bound(x, w, dtype, rows > 8))
                out = kernels.ops.linear_int8(x, q, absmax, bias, 0.0)
                assert out.dtype == dtype
                _close(out, exact, bound, (shape, rows))
            assert torch.equal(out, kernels.ops.linear_int8(x, q, absmax, bias, 2.0))  # no outliers to treat
            g = torch.randn(3, shape[0], device=gpu).to(dtype)
            out = kernels.ops.linear_int8_t(g, q, absmax)
            _close(out, g.double() @ w, _bound(g, w.t(), dtype, True), shape)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_int8_whose_unscaled_sums_would_be_infinite(self, dtype, gpu, monkeypatch):
        """In fp16: 400 × 127 × 100."""
        monkeypatch.setattr(pieces_module, "_accumulation_dtype", lambda x: x.dtype)
        q = torch.full((5, 400), 127, dtype=torch.int8, device=gpu)
        absmax = torch.rand(5, device=gpu)
        x = torch.full((20, 400), 100.0, device=gpu, dtype=dtype)
        w = q.double() * absmax.double()[:, None] / 127
        out = kernels.ops.linear_int8(x, q, absmax, None, 0.0)
        # W is rounded too, and a CPU's 16-bit product may add in 16 bits
        _close(out, x.double() @ w.t(), UNIT[dtype] * 4 * x.double() @ w.t() + _bound(x, w, dtype), dtype)

    def test_weights_in_several_pieces(self, gpu, monkeypatch):
        pieces = pieces_module.pieces
        monkeypatch.setattr(  # four rows at a time
            pieces_module, "pieces", lambda n, *rest: [slice(i, min(i + 4, n)) for i in range(0, n, 4)]
        )
        cpu = torch.device("cpu")
        assert [p.stop - p.start for p in pieces(28672, 4096, 9, torch.bfloat16, cpu)] == [14336] * 2
        assert pieces(300, 64, 9, torch.float32, cpu) == [slice(0, 300)]
        assert pieces(28672, 4096, 9, torch.bfloat16, cpu, False) == [slice(0, 28672)]
        state, w = _state_4bit((18, 128), "nf4", 64, True, gpu)
        q, absmax = reference.quantize_int8(w.float())
        w_int8 = q.double() * absmax.double()[:, None] / 127
        bias, x, g = torch.randn(18, device=gpu), torch.randn(11, 128, device=gpu), torch.randn(11, 18, device=gpu)
        kind = ("nf4", 64, [18, 128])
        for weight, out, back in (
            (w, kernels.ops.linear_4bit(x, *state, bias, *kind), kernels.ops.linear_4bit_t(g, *state, *kind)),
            (
                w_int8,
                kernels.ops.linear_int8(x, q, absmax, bias, 6.0),
                kernels.ops.linear_int8_t(g, q, absmax),
            ),
        ):
            exact, bound = _with_bias(x.double() @ weight.t(), bias, _bound(x, weight, torch.float32))
            _close(out, exact, bound, "x")
            _close(back, g.double() @ weight, _bound(g, weight.t(), torch.float32, True), "g")

    def test_x_and_codes_as_they_lie_in_memory(self, gpu):
        """Rows apart, columns across, leading dimensions, and packed bytes that begin at an odd address."""
        state, w = _state_4bit((33, 128), "nf4", 64, False, gpu)
        q, absmax = reference.quantize_int8(w.float())
        buffer = torch.empty(1 + state[0].numel(), dtype=torch.uint8, device=gpu)
        buffer[1:] = state[0]
        args = ("nf4", 64, [33, 128])
        base = torch.randn(2, 6, 128, device=gpu)
        for x in (base[:, 1:4], base[:, -1], base[0, :3].t().contiguous().t(), base[0, 0], base[:, :0], base[:0]):
            before = x.clone()
            out = kernels.ops.linear_4bit(x, *state, None, *args)
            assert out.shape == (*x.shape[:-1], 33)
            rows = kernels.ops.linear_4bit(x.contiguous().view(-1, 128), *state, None, *args)
            assert torch.equal(out.view(-1, 33), rows)
            assert torch.equal(out, kernels.ops.linear_4bit(x, buffer[1:], *state[1:], None, *args))
            out = kernels.ops.linear_int8(x, q, absmax, None, 6.0)
            rows = kernels.ops.linear_int8(x.contiguous().view(-1, 128), q, absmax, None, 6.0)
            assert torch.equal(out.view(-1, 33), rows)
            assert torch.equal(x, before)

    def test_what_the_kernels_do_not_serve_is_the_references(self, gpu):
        w = torch.randn(6, 48, device=gpu, dtype=torch.float64)
        for ours, expected in zip(
            (*kernels.ops.quantize_4bit(w, "nf4", 64), *kernels.ops.quantize_int8(w)),
            (*reference.quantize_4bit(w, "nf4", 64), *reference.quantize_int8(w)),
            strict=True,
        ):
            assert torch.equal(ours, expected)
        packed, absmax = kernels.ops.quantize_4bit(w, "nf4", 16)
        args = (packed, absmax, None, None, "nf4", 16, [6, 48], torch.float64)
        assert torch.equal(kernels.ops.dequantize_4bit(*args), reference.dequantize_4bit(*args))
        x = torch.randn(2, 48, device=gpu)
        args = (x, packed, absmax, None, None, None, "nf4", 16, [6, 48])
        assert torch.equal(kernels.ops.linear_4bit(*args), reference.linear_4bit(*args))
        ids = torch.tensor([5, 0], device=gpu)
        q, absmax = kernels.ops.quantize_int8(w)
        assert torch.equal(
            kernels.ops.embedding_int8(ids, q, absmax, torch.float16),
            reference.embedding_int8(ids, q, absmax, torch.float16),
        )


# ------------------------------------------------------------------------------------------------- compiled


class TestCompiled:
    """What the interpreter does not see: whether the kernels are Triton that compiles, for GPUs of several kinds."""

    __test__ = not INTERPRETED

    @pytest.fixture
    def compiled_for(self, monkeypatch, tmp_path):
        """A function that compiles what a call would launch on such a GPU, and gives the assembly."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        from fewbits.kernels import triton_backend

        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        types = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.int8: "i8", torch.uint8: "u8"}
        texts, target, assembly = [], None, ""

        def launch(kernel, grid, on, *args, **options):
            names = [parameter.name for parameter in kernel.params]
            values = dict(zip(names, args, strict=False)) | {k: v for k, v in options.items() if k in names}
            signature, constants, attributes = {}, {}, {}
            for i, parameter in enumerate(kernel.params):
                value, name = values[parameter.name], parameter.name
                if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
                    signature[name], constants[(i,)] = "constexpr", value
                elif isinstance(value, torch.Tensor):
                    signature[name], attributes[(i,)] = "*" + types.get(value.dtype, "fp32"), [["tt.divisibility", 16]]
                else:
                    signature[name] = "i32" if value < 2**31 else "i64"
                    if value % 16 == 0:
                        attributes[(i,)] = [["tt.divisibility", 16]]
            texts.append(
                triton.compile(
                    ASTSource(kernel, signature, constants, attributes),
                    target=target,
                    options={k: v for k, v in options.items() if k not in names},
                ).asm[assembly]
            )

        monkeypatch.setattr(triton_backend, "_launch", launch)

        def run(architecture, op, *args):
            nonlocal target, assembly
            nvidia = isinstance(architecture, int)
            target = GPUTarget("cuda", architecture, 32) if nvidia else GPUTarget("hip", architecture, 64)
            assembly = "ptx" if nvidia else "amdgcn"
            monkeypatch.setattr(triton_backend, "_NVIDIA", nvidia)
            texts.clear()
            getattr(triton_backend, op)(*args)
            return texts

        return run

    @pytest.fixture(params=[75, 90, 120], ids="sm_{}".format)
    def compiled(self, request, compiled_for):
        """The same for an NVIDIA GPU: the oldest that is served, an H100 or H200, and a new one."""
        return functools.partial(compiled_for, request.param)

    def test_quantizing(self, compiled):
        w = torch.empty(64, 4096, dtype=torch.bfloat16)
        for format in ("nf4", "fp4"):
            (text,) = compiled("quantize_4bit", w, format, 64)
            assert "ld.global.v4.b32" in text  # whole 16 bytes, masked or not
            assert "div.rn.f32" in text
            assert "fma.rn" not in text
        for value in (w, torch.empty(3, 1)):
            (text,) = compiled("quantize_int8", value)
            assert "div.approx.f32" in text
            assert "fma.rn" not in text
        compiled("quantize_4bit", torch.empty(1, dtype=torch.float16), "nf4", 4096)
        compiled("quantize_4bit", torch.empty(2**32 + 2, device="meta"), "nf4", 64)

    def test_dequantizing(self, compiled):
        nested = (torch.empty(4096, dtype=torch.uint8), torch.empty(16), torch.empty(()))
        packed = torch.empty(64, 2048, dtype=torch.uint8)
        (text,) = compiled("dequantize_4bit", packed, *nested, "nf4", 64, [64, 4096], torch.bfloat16)
        assert "fma.rn" not in text
        assert "st.global.v4.b32" in text
        compiled("dequantize_4bit", packed[:1, :1], torch.empty(1), None, None, "fp4", 32, [1, 1], torch.float16)
        for shape in ((64, 4096), (3, 1)):
            q, absmax = torch.empty(shape, dtype=torch.int8), torch.empty(shape[0])
            (text,) = compiled("dequantize_int8", q, absmax, torch.float16)
            assert "fma.rn" not in text

    def test_products(self, compiled):
        absmax, bias = torch.empty(64 * 64), torch.empty(64, dtype=torch.bfloat16)
        nested = (torch.empty(4096, dtype=torch.uint8), torch.empty(16), torch.empty(()))
        packed, q = torch.empty(64, 2048, dtype=torch.uint8), torch.empty(64, 4096, dtype=torch.int8)
        for rows in (1, 2, 8):
            x = torch.empty(rows, 4096, dtype=torch.bfloat16)
            states = [nested] if rows > 1 else [nested, (absmax, None, None)]
            for state in states:
                (text,) = compiled("linear_4bit", x, packed, *state, bias, "nf4", 64, [64, 4096])
                assert ("ld.global.v4.b32" if rows == 1 else "ld.global.v2.b32") in text  # a thread's group at once
            (text,) = compiled("linear_int8", x, q, torch.empty(64), bias, 6.0)
            assert "ld.global.v4.b32" in text
        compiled("linear_4bit", torch.empty(1, 32), packed, absmax, None, None, None, "nf4", 32, [1, 32])
        compiled("linear_int8", torch.empty(1, 1), q[:1, :1], absmax[:1], None, 6.0)
        compiled("linear_int8", torch.empty(9, 4096), q, torch.empty(64), None, 6.0)

    def test_for_an_amd_gpu(self, compiled_for):
        compiled = functools.partial(compiled_for, "gfx942")
        w, state = torch.empty(64, 4096, dtype=torch.bfloat16), (torch.empty(64 * 64), None, None)
        packed, q = torch.empty(64, 2048, dtype=torch.uint8), torch.empty(64, 4096, dtype=torch.int8)
        for call in (
            ("quantize_4bit", w, "nf4", 64),
            ("quantize_int8", w),
            ("dequantize_4bit", packed, *state, "nf4", 64, [64, 4096], torch.bfloat16),
            ("dequantize_int8", q, torch.empty(64), torch.float16),
            ("linear_4bit", w[:1], packed, *state, None, "nf4", 64, [64, 4096]),
            ("linear_4bit", w[:8], packed, *state, None, "nf4", 64, [64, 4096]),
            ("linear_int8", w[:8], q, torch.empty(64), None, 6.0),
        ):
            texts = compiled(*call)
            assert texts, call
            assert all("amdgcn" in text for text in texts), call


# ------------------------------------------------------------------------------------------------- processes


class TestInProcesses:
    __test__ = not INTERPRETED

    def _pytest(self, *args):
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "FEWBITS"))}
        if not ON_GPU:
            environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        code = "import sys, pytest; from fewbits import kernels; kernels._load('triton'); sys.exit(pytest.main())"
        done = subprocess.run(
            [sys.executable, "-c", code, "-q", "-p", "no:cacheprovider", *args],
            cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]

    def test_the_kernels_in_the_interpreter(self):
        if not ON_GPU:  # there they have run as they are
            self._pytest("tests/test_triton.py")

    def test_the_operators_with_this_backend(self):
        """Autograd, fakes, compiling, autocast: the operators' own tests, all on a GPU and some in the interpreter."""
        some = "triton and (double or sound or compiled or autocast or outlier)"
        self._pytest("tests/test_kernels.py", "-k", "triton and cuda" if ON_GPU else some)


# ------------------------------------------------------------------------------------------------- choosing


class TestChoosing:
    __test__ = not INTERPRETED

    @pytest.fixture(autouse=True)
    def _as_at_the_start(self, monkeypatch):
        monkeypatch.setattr(kernels, "BACKENDS", {"reference": reference})
        caches = kernels._chain, kernels._failure, kernels._implementations
        for cache in caches:
            cache.cache_clear()
        yield
        for cache in caches:
            cache.cache_clear()

    def test_each_device_gets_its_own(self):
        first = "cuda" if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0) else "triton"
        found = [kernels.backend_for(d) for d in ("cuda", "xpu", "cpu", "mps")]
        assert found == [first, "triton", "cpu", "reference"]
        assert kernels._chain("cuda", None)[-2:] == ("triton", "reference")
        with kernels.use_backend("reference"):
            assert kernels.backend_for("cuda") == "reference"

    def test_without_triton(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
        assert kernels.backend_for("xpu") == "reference"
        with pytest.raises(ConfigError, match="pip install triton"):
            kernels.force_backend("triton")
        environment = {**os.environ, "FEWBITS_BACKEND": "triton", "PYTHONPATH": os.pathsep.join(sys.path)}
        code = "import sys; sys.modules['triton'] = None; import fewbits"
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert "ConfigError: the backend 'triton' was asked for" in done.stderr

    def test_a_triton_that_does_not_work(self, monkeypatch):
        def broken(name):
            raise RuntimeError("Failed to find C compiler")

        monkeypatch.setattr(kernels, "_load", broken)
        with pytest.warns(FewbitsWarning, match="C compiler"):
            assert kernels.backend_for("xpu") == "reference"

    def test_a_cpu_tensor_is_refused_when_triton_is_forced(self):
        w = torch.randn(4, 64)
        with kernels.use_backend("triton"), pytest.raises(ConfigError, match=r"(?s)triton.*cpu.*TRITON_INTERPRET=1"):
            kernels.ops.quantize_4bit(w, "nf4", 64)
        with kernels.use_backend("triton"), pytest.raises(ConfigError, match="tensors on cuda or xpu"):
            kernels.ops.quantize_absmax(w)  # the same for what the reference would do
