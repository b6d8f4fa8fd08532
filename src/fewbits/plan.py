"""The plan: which part of a model lies on which device, as plain data.

A model is a sequence of *units* in the order of registration: its blocks (modules alike that repeat in a list, and the
classes that a transformers model or the caller says not to split) and, outside them, every module with parameters of
its own. A unit lies on a GPU, on the "cpu" or on "disk". One that lies on no GPU runs on the GPU of the unit before it:
its bytes stream there when it is called (:mod:`fewbits.offload`), for which that GPU keeps room for two of the largest.
:mod:`fewbits.decide` makes plans.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fewbits.errors import ConfigError, FewbitsError

OFFLOAD = ("auto", "stream", "compute")
_FORMAT = "fewbits-plan"
_JSON_TYPES = {"devices": str, "nbytes": int, "parameters": int, "stored": str, "slots": int, "budgets": int}


@dataclass
class Plan:
    """Where each unit of a model lies: plain data, to be printed, edited, saved, and given back as ``device_map``.

    Attributes:
        devices: by unit (a module's dotted name, in the model's order): ``"cuda:0"``, ``"cpu"`` or ``"disk"``. Edit it
            freely; what lies on "cpu" or "disk" runs on the GPU of the unit before it, where there is one.
        nbytes: by unit: bytes as stored, scales and buffers included.
        parameters: by unit: their number.
        stored: by unit: the formats and dtypes.
        slots: by unit: bytes of the buffer that it needs where it runs, if its weights have to be brought there.
        budgets: by device: bytes that may be used.
        offload: how units run that lie on no GPU: see :func:`fewbits.load`.
        runs_on: where a model runs of which no unit lies on a GPU.
    """

    devices: dict[str, str]
    nbytes: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    stored: dict[str, str] = field(default_factory=dict)
    slots: dict[str, int] = field(default_factory=dict)
    budgets: dict[str, int] = field(default_factory=dict)
    offload: str = "auto"
    runs_on: str = "cpu"

    @property
    def execution(self) -> dict[str, str]:
        """By unit: the device that it runs on when its weights stream there."""
        gpus = [d for d in self.devices.values() if d not in ("cpu", "disk")]
        current = gpus[0] if gpus else self.runs_on
        found = {}
        for name, device in self.devices.items():
            current = device if device not in ("cpu", "disk") else current
            found[name] = current
        return found

    @property
    def device_bytes(self) -> dict[str, int]:
        """By device: the bytes that the plan puts there, and on those that units stream to two of the largest."""
        totals = dict.fromkeys([*self.budgets, *self.devices.values()], 0)
        slots: dict[str, int] = {}
        execution = self.execution
        for name, device in self.devices.items():
            totals[device] += self.nbytes.get(name, 0)
            runs = "cpu" if self.offload == "compute" else execution[name]
            if device == "disk" or (device == "cpu" and runs != "cpu"):
                for place in {runs, "cpu"} if device == "disk" else {runs}:
                    slots[place] = max(slots.get(place, 0), self.slots.get(name, 0))
        for place, nbytes in slots.items():
            totals[place] = totals.get(place, 0) + 2 * nbytes
        return totals

    @property
    def total(self) -> int:
        """Bytes of the whole model."""
        return sum(self.nbytes.values())

    def to_json(self) -> str:
        """The plan as JSON."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return json.dumps({"format": _FORMAT, "version": 1, **fields}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """A plan from its JSON.

        Raises:
            ConfigError: it is no plan.
        """
        try:
            data = json.loads(text)
            if data.pop("format", None) != _FORMAT or data.pop("version", None) != 1:
                raise ValueError(f"no {_FORMAT} of version 1")
            plan = cls(**data)
            for name, kind in _JSON_TYPES.items():
                if not all(type(value) is kind for value in getattr(plan, name).values()):
                    raise ValueError(f"{name} is to give each a {kind.__name__}")
            if plan.offload not in OFFLOAD or type(plan.runs_on) is not str:
                raise ValueError(f"offload is {plan.offload!r}, runs_on {plan.runs_on!r}")
            return plan
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"not a plan ({error})", expected="the JSON that Plan.save wrote") from error

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the plan as JSON."""
        Path(file).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Plan:
        """Read a plan that was saved.

        Raises:
            ConfigError: the file is not there or no plan.
        """
        try:
            return cls.from_json(Path(file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the plan cannot be read: {error}", file=file) from error
        except FewbitsError as error:
            error.locate(file)
            raise

    def __str__(self) -> str:
        rows = [("units", "device", "runs on", "stored as", "parameters", "bytes")]
        execution = self.execution
        for names in self._runs(execution):
            first, last = names[0] or "(model)", names[-1]
            runs = execution[names[0]] if self.offload != "compute" else self.devices[names[0]].replace("disk", "cpu")
            rows.append((
                first if len(names) == 1 else f"{first} … {last} ({len(names)})", self.devices[names[0]], runs,
                self.stored.get(names[0], ""), f"{sum(self.parameters.get(n, 0) for n in names):,}",
                f"{sum(self.nbytes.get(n, 0) for n in names):,}",
            ))  # fmt: skip
        rows.append(("total", "", "", "", f"{sum(self.parameters.values()):,}", f"{self.total:,}"))
        text = _table(rows, left=4)
        budgets = [("device", "used", "of")]
        for device, used in self.device_bytes.items():
            of = self.budgets.get(device)
            budgets.append((device, f"{used:,}", "" if of is None else f"{of:,}"))
        return "\n".join([*text, "", *_table(budgets, left=1)])

    def _runs(self, execution: Mapping[str, str]) -> list[list[str]]:
        """Units in a row that differ in a number only, those alike together: a line of the table each."""
        rows: list[dict[tuple[str | None, ...], list[str]]] = []
        before = ""
        for name in self.devices:
            pattern = re.sub(r"\d+", "0", name)
            if not rows or pattern != before:
                rows.append({})
            kind = self.devices[name], execution[name], self.stored.get(name)
            rows[-1].setdefault(kind, []).append(name)
            before = pattern
        return [names for row in rows for names in row.values()]


def _table(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return [line.rstrip() for line in lines]


DeviceMap = str | int | torch.device | Mapping[str, str | int | torch.device] | Plan | None
