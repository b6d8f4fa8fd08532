"""``summary``: what a model takes, by module."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fewbits.offload import devices_of
from fewbits.storage import owners_of
from fewbits.tensor import QuantTensor


@dataclass(frozen=True)
class Row:
    """One line of a summary: parameters that lie under one module and are stored alike.

    Attributes:
        module: dotted name, down to the depth asked for; empty for the model itself.
        stored: the format or dtype.
        parameters: their number.
        nbytes: the memory they take, scales included.
        device: where it lies; "disk" is one.
    """

    module: str
    stored: str
    parameters: int
    nbytes: int
    device: str

    @property
    def bits(self) -> float:
        """Bits per parameter, scales included."""
        return 8 * self.nbytes / max(self.parameters, 1)


class Summary:
    """A table of :class:`Row`; printing it gives it aligned, with the totals last.

    Attributes:
        rows: by module, in the model's order; shared parameters count once, where they are first met.
        buffer_bytes: of all buffers, which are not parameters.
    """

    def __init__(self, rows: list[Row], buffer_bytes: int) -> None:
        self.rows, self.buffer_bytes = rows, buffer_bytes

    @property
    def total(self) -> Row:
        """All rows together."""
        devices = {row.device for row in self.rows}
        return Row(
            "total",
            "",
            sum(row.parameters for row in self.rows),
            sum(row.nbytes for row in self.rows),
            devices.pop() if len(devices) == 1 else "several",
        )

    def __str__(self) -> str:
        header = ("module", "stored as", "parameters", "bytes", "bits/parameter", "device")
        lines = [
            (r.module or "(model)", r.stored, f"{r.parameters:,}", f"{r.nbytes:,}", f"{r.bits:.3f}", r.device)
            for r in [*self.rows, self.total]
        ]
        widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
        text = [
            "  ".join(
                c.ljust(w) if i in (0, 1, 5) else c.rjust(w) for i, (c, w) in enumerate(zip(x, widths, strict=True))
            )
            for x in [header, *lines]
        ]
        text.insert(1, "-" * len(text[0]))
        text.insert(-1, "-" * len(text[1]))
        return "\n".join(line.rstrip() for line in [*text, f"(and {self.buffer_bytes:,} bytes of buffers)"])

    __repr__ = __str__


def summary(model: nn.Module, depth: int = 3) -> Summary:
    """What a model's parameters are stored as, and the memory they take.

    Args:
        model: any.
        depth: how many parts of a dotted name make a row.
    """
    rows: dict[tuple[str, str, str], tuple[int, int]] = {}
    devices = devices_of(model)
    for owners in owners_of(model):
        owner = owners[0]
        p: Tensor = owner.module._parameters[owner.name]  # type: ignore[assignment]  # owners_of gives no None
        module = ".".join(owner.path.split(".")[:-1][:depth])
        stored = str(p.spec) if isinstance(p, QuantTensor) else str(p.dtype).removeprefix("torch.")
        nbytes = sum(t.nbytes for t in p.inner_tensors.values()) if isinstance(p, QuantTensor) else p.nbytes
        key = (module, stored, devices.get(owner.path, str(p.device)))
        count, total = rows.get(key, (0, 0))
        rows[key] = (count + p.numel(), total + nbytes)
    table = [Row(m, s, n, b, d) for (m, s, d), (n, b) in rows.items()]
    return Summary(table, sum(b.nbytes for b in model.buffers()))
