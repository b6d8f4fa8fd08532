"""The package as such: its names, what importing it costs, and that the README's tables are those of the results."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import fewbits

ROOT = Path(__file__).resolve().parent.parent
NAMES = [
    "FewbitsError",
    "FewbitsWarning",
    "Plan",
    "QuantTensor",
    "QuantizationConfig",
    "from_pretrained",
    "init_empty_weights",
    "load",
    "plan",
    "quantize",
    "save",
    "summary",
]


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.strip()


def test_public_names():
    assert sorted(fewbits.__all__) == NAMES
    assert all(callable(getattr(fewbits, name)) for name in NAMES)
    assert re.fullmatch(r"\d+\.\d+\.\d+", fewbits.__version__)


def test_importing_costs_little_and_touches_no_gpu():
    code = (
        "import time, sys, torch; t = time.perf_counter(); import fewbits; s = time.perf_counter() - t; "
        "assert not torch.cuda.is_initialized(); "
        "heavy = [m for m in ('transformers', 'accelerate', 'bitsandbytes', 'huggingface_hub', 'triton', 'typer', "
        "'torch._dynamo') if m in sys.modules]; assert not heavy, heavy; print(s)"
    )
    assert min(float(_python(code)) for _ in range(3)) < 0.3


def test_layers_import_only_what_stands_below_them():
    """A module's place in this list is its layer; it imports nothing that stands after it."""
    layers = [
        "errors", "partition", "memory", "kernels.nvrtc", "kernels.constants", "kernels.codebooks",
        "kernels.reference", "kernels.pieces", "kernels.cpu_backend", "kernels.triton_backend", "kernels.ways",
        "kernels.cuda_shapes", "kernels.cuda_plans", "kernels.cuda_backend", "kernels", "formats", "tensor", "bench",
        "dispatch",
        "statedict", "accelerate_hooks", "modules", "config", "structure", "storage", "devices", "plan", "decide",
        "meta", "files", "reader", "hub", "checkpoint", "match", "hf", "homes", "offload", "place", "stored", "spread",
        "load", "inplace", "pretrained", "preview", "atomic", "save", "summary", "accelerate.accelerator",
        "accelerate.utils", "accelerate",
        "integrations", "integrations.transformers", "integrations.fused_lora", "integrations.peft",
    ]  # fmt: skip
    source = ROOT / "src" / "fewbits"
    found = {
        str(p.relative_to(source).with_suffix("")).replace("/", ".").removesuffix(".__init__")
        for p in source.rglob("*.py")
    }
    assert found - {"__init__", "cli"} == set(layers)
    late = {("tensor", "dispatch")}  # the class knows, when it is used, that there are rules for it
    for place, name in enumerate(layers):
        path = source / (name.replace(".", "/") + ".py")
        path = path if path.exists() else source / name.replace(".", "/") / "__init__.py"
        for used in re.findall(r"(?:from|import) fewbits\.([\w.]+)", path.read_text()):
            assert layers.index(used) <= place or (name, used) in late, f"{name} imports {used}"


def test_tables_of_the_readme_are_those_of_the_results():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "tables.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
