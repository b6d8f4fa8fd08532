"""What a wrapper tensor subclass costs per call, eager and compiled: the measurement behind ``fewbits.tensor``.

A quantized weight can reach the operator in four ways; each is timed on a chain of tiny layers, so that what is seen
is the cost of getting there and not of the arithmetic:

    plain       the module owns plain tensors and hands them to the operator (the floor)
    attribute   the module owns a wrapper subclass and hands the operator its inner tensors, by attribute
    subclass    the module calls ``F.linear(x, weight)``; ``__torch_dispatch__`` unwraps (the universal path)
    function    the same, caught earlier by ``__torch_function__``

Run ``python benchmarks/dispatch.py``; it prints microseconds per layer and the difference from ``plain``, and writes
``benchmarks/results/dispatch-<device>.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import facts
from torch import nn

K = 32  # features of a layer: small enough for the call, not the product, to be what is timed

_library = torch.library.Library("dispatch_bench", "DEF")
_library.define("linear(Tensor x, Tensor packed, Tensor scale) -> Tensor")
_library.impl(
    "linear",
    lambda x, packed, scale: x @ (packed * scale[:, None]).t().to(x.dtype),
    "CompositeExplicitAutograd",
)
torch.library.register_fake(
    "dispatch_bench::linear", lambda x, packed, scale: x.new_empty(x.shape[:-1] + packed.shape[:1])
)
linear_op = torch.ops.dispatch_bench.linear.default


class Wrapped(torch.Tensor):
    """A weight of int8 rows and a float scale for each, seen as a float tensor."""

    packed: torch.Tensor
    scale: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, packed: torch.Tensor, scale: torch.Tensor) -> Wrapped:
        return torch.Tensor._make_wrapper_subclass(cls, packed.shape, dtype=torch.float32, device=packed.device)

    def __init__(self, packed: torch.Tensor, scale: torch.Tensor) -> None:
        self.packed, self.scale = packed, scale

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"{type(self).__name__}({list(self.shape)})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["packed", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, torch.Tensor], meta: Any, size: Any, stride: Any) -> Wrapped:
        return cls(inner["packed"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func is aten.detach.default:
            return cls(args[0].packed, args[0].scale)
        if func is aten.linear.default:
            return linear_op(args[0], args[1].packed, args[1].scale)
        if func is aten.t.default:
            return Transposed(args[0])
        raise NotImplementedError(func)


class Transposed(Wrapped):
    """``Wrapped.t()``: what ``aten.linear`` multiplies by when autograd has already taken it apart."""

    @staticmethod
    def __new__(cls, base: Any, scale: Any = None) -> Transposed:
        packed = base if scale is not None else base.packed
        return torch.Tensor._make_wrapper_subclass(cls, packed.shape[::-1], dtype=torch.float32, device=packed.device)

    def __init__(self, base: Any, scale: Any = None) -> None:
        self.packed, self.scale = (base, scale) if scale is not None else (base.packed, base.scale)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default:
            return linear_op(args[0], args[1].packed, args[1].scale)
        raise NotImplementedError(func)


class Caught(Wrapped):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return linear_op(args[0], args[1].packed, args[1].scale)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class Layer(nn.Module):
    def __init__(self, kind: str, device: str) -> None:
        super().__init__()
        self.kind = kind
        packed = torch.randint(-9, 9, (K, K), dtype=torch.int8, device=device)
        scale = torch.rand(K, device=device) * 0.01
        if kind == "plain":
            self.register_buffer("packed", packed)
            self.register_buffer("scale", scale)
        else:
            cls = Caught if kind == "function" else Wrapped
            self.weight = nn.Parameter(cls(packed, scale), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "plain":
            return linear_op(x, self.packed, self.scale)
        if self.kind == "attribute":
            return linear_op(x, self.weight.packed, self.weight.scale)
        return F.linear(x, self.weight)


def microseconds(call: Any, device: str, repeats: int) -> float:
    def once() -> float:
        start = time.perf_counter()
        for _ in range(10):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e5

    once()
    return statistics.median(once() for _ in range(repeats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=50)
    args = parser.parse_args()
    torch.set_num_threads(1)
    x = torch.randn(1, K, device=args.device)
    rows: dict[str, dict[str, float]] = {}
    kinds = ("plain", "attribute", "subclass", "function")
    models = {kind: nn.Sequential(*(Layer(kind, args.device) for _ in range(args.layers))) for kind in kinds}
    with torch.no_grad():
        for mode in ("eager", "compiled"):
            calls = {
                kind: (m if mode == "eager" else torch.compile(m, fullgraph=True, backend="aot_eager"))
                for kind, m in models.items()
            }
            rows[mode] = {
                kind: microseconds(lambda call=call: call(x), args.device, args.repeats) / args.layers
                for kind, call in calls.items()
            }
    print(f"{'':10}" + "".join(f"{kind:>22}" for kind in kinds) + "   (µs a layer, difference from plain)")
    for mode, row in rows.items():
        print(f"{mode:10}" + "".join(f"{row[k]:12.2f} ({row[k] - row['plain']:+7.2f})" for k in kinds))
    target = Path(__file__).parent / "results" / f"dispatch-{args.device}.json"
    target.parent.mkdir(exist_ok=True)
    result = {**facts(args.device), "layers": args.layers, "microseconds_per_layer": rows}
    target.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
