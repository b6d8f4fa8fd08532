"""Fixtures that every test may use. Tests run on the CPU, and on a GPU as well where there is one."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

collect_ignore = [] if torch.cuda.is_available() else ["gpu"]
if torch.cuda.device_count() < 2:
    collect_ignore.append("gpu/test_several.py")


@pytest.fixture
def gpu() -> str:
    """The GPU, for what only one can show."""
    return "cuda"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])


@pytest.fixture(autouse=True)
def _cpu_unless_asked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that does not take ``device`` is about the CPU: a machine with a GPU runs it as if there were none."""
    if not {"device", "gpu"} & set(request.fixturenames):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def without_the_integration(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers as if ``fewbits.integrations.transformers`` had not been imported, as other test files do."""
    from transformers.quantizers.auto import AutoHfQuantizer

    merge = AutoHfQuantizer.merge_quantization_configs
    monkeypatch.setattr(AutoHfQuantizer, "merge_quantization_configs", staticmethod(inspect.unwrap(merge)))


@pytest.fixture
def model_state():
    """A function that gives a model's parameters and buffers as comparable facts, to show that nothing changed."""

    def facts(model: torch.nn.Module) -> dict[str, tuple]:
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        return {
            name: (type(t), str(t.device), t.dtype, tuple(t.shape), id(t), None if t.is_meta else t.detach().clone())
            for name, t in named
        } | {f"{name}()": (type(m),) for name, m in model.named_modules()}

    return facts


@pytest.fixture
def unchanged(model_state):
    """A context manager that fails if what happens in it changed a model's tensors and modules, or any file."""

    def files(folder: Path) -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    @contextlib.contextmanager
    def watch(model: torch.nn.Module, folder: Path | None = None) -> Iterator[None]:
        before, on_disk = model_state(model), files(folder) if folder else None
        yield
        after = model_state(model)
        assert after.keys() == before.keys()
        for name, facts in after.items():
            assert facts[:-1] == before[name][:-1], name
            was, now = before[name][-1], facts[-1]
            assert torch.equal(now, was) if isinstance(now, torch.Tensor) else now is was, name
        assert on_disk is None or files(folder) == on_disk

    return watch
