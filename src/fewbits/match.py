"""Which tensor of a checkpoint is which of a model: names, shapes and dtypes, all disagreements in one error."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fewbits.checkpoint import Checkpoint
from fewbits.errors import CheckpointError, FewbitsError, FewbitsWarning
from fewbits.formats import QuantSpec
from fewbits.modules import stores_transposed
from fewbits.statedict import Group, group_keys, stored_spec
from fewbits.storage import Owner, owners_of

_SHOWN = 20  # unexpected names listed before "and N more"
_COMPARED = 100_000  # pairs of names looked at for the nearest ones, which is about a second


@dataclass(frozen=True)
class Source:
    """Where a parameter or buffer of the model comes from.

    Attributes:
        file: where it lies (for a quantized one, its largest part).
        group: the checkpoint's keys for it.
        shape: in the orientation the checkpoint stores.
        dtype: stored, or for a quantized one logical (``None`` for int8, which does not say).
        spec: of a tensor that is stored quantized.
        identity: equal for two sources of the same bytes.
        known: by role: those of its tensors that had to be read to know this.
    """

    file: Path
    group: Group
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    spec: QuantSpec | None
    identity: tuple[object, ...]
    known: Mapping[str, Tensor]


@dataclass(frozen=True)
class Target:
    """A parameter or buffer of the model (at all the places that share it), and its source if it has one."""

    owners: Sequence[Owner]
    is_buffer: bool
    source: Source | None

    @property
    def path(self) -> str:
        return self.owners[0].path


def sources_of(checkpoint: Checkpoint) -> dict[str, Source]:
    """What the checkpoint holds, by parameter name.

    Raises:
        CheckpointError: quantized tensors with missing or unintelligible parts.
    """
    try:
        groups = group_keys(checkpoint.tensors)
    except FewbitsError as error:
        error.locate(checkpoint.path)
        raise
    keys = [group.keys["quant_state"] for group in groups.values() if "quant_state" in group.keys]
    states = dict(checkpoint.stream(dict.fromkeys(checkpoint.tensors[key].name for key in keys)))  # at one go
    found = {}
    for name, group in groups.items():
        parts = {role: checkpoint.tensors[key] for role, key in group.keys.items()}
        weight = parts["weight"]
        known: dict[str, Tensor] = {}
        spec: QuantSpec | None = None
        shape, dtype = weight.shape, weight.dtype if group.format is None else None
        if group.format == "int8":
            spec = QuantSpec("int8")
        elif group.format is not None:
            known["quant_state"] = states[parts["quant_state"].name]
            try:
                spec, stored, dtype = stored_spec(group, known["quant_state"])
            except FewbitsError as error:
                error.locate(parts["quant_state"].file)
                raise
            shape = tuple(stored)
        identity = tuple(part.identity for part in parts.values())
        found[name] = Source(weight.file, group, shape, dtype, spec, identity, known)
    return found


def common_prefix(wanted: Iterable[str], names: Iterable[str]) -> tuple[str, str] | None:
    """The one prefix that the checkpoint's names have and the model's lack, or the other way round.

    Returns:
        ``("strip", prefix)`` or ``("add", prefix)``, whichever makes most of the wanted names match; ``None`` where no
        prefix makes more of them match than they do as they are, or several do equally.
    """
    want, have = set(wanted), set(names)
    if want <= have:
        return None
    prefixes = {
        (how, ".".join(n.split(".")[:depth]) + ".")
        for how, side in (("strip", have), ("add", want))
        for n in side
        for depth in (1, 2)
        if n.count(".") >= depth
    }

    def matched(how: str, prefix: str) -> int:
        renamed = {n.removeprefix(prefix) for n in have} if how == "strip" else {prefix + n for n in have}
        return len(want & renamed) if len(renamed) == len(have) else -1  # two names would become one

    counts = {prefix: matched(*prefix) for prefix in prefixes}
    most = max(counts.values(), default=0)
    best = [prefix for prefix, count in counts.items() if count == most]
    # of several that fit as well, as each layer of a model fits a lone layer, none is meant
    return best[0] if len(best) == 1 and most > len(want & have) else None


def match(
    model: nn.Module,
    checkpoint: Checkpoint,
    *,
    strict: bool = True,
    ignore: Callable[[str], bool] = lambda name: False,
    rename: Callable[[str], str] = lambda name: name,
) -> list[Target]:
    """Find the source of every parameter and buffer.

    Args:
        model: with its parameters on the meta device.
        checkpoint: opened.
        strict: whether names that the model does not have are an error (else a warning).
        ignore: names of the checkpoint that may be passed over.
        rename: gives the model's name for a name of the checkpoint that the model does not have.

    Raises:
        CheckpointError: everything that is missing, unexpected, or of the wrong shape or kind, in one message.
    """
    sources = sources_of(checkpoint)
    targets = [(owners, False) for owners in owners_of(model)] + [(owners, True) for owners in _buffers(model)]
    wanted = {o.path: None for owners, _ in targets for o in owners}
    renamed = {name if name in wanted else rename(name): source for name, source in sources.items()}
    sources = renamed if len(renamed) == len(sources) else sources  # else two names would become one
    prefix = common_prefix(wanted, sources)
    if prefix is not None:
        how, text = prefix
        warnings.warn(
            f"{checkpoint.path}: the checkpoint's names are matched {'without' if how == 'strip' else 'with'} "
            f"the prefix {text!r}",
            FewbitsWarning,
            stacklevel=4,
        )
        sources = {n.removeprefix(text) if how == "strip" else text + n: s for n, s in sources.items()}
    matched, missing, wrong = [], [], []
    for owners, is_buffer in targets:
        source = next((sources[o.path] for o in owners if o.path in sources), None)
        has_value = is_buffer and not owners[0].module._buffers[owners[0].name].is_meta  # type: ignore[union-attr]
        if has_value and all(o.name in o.module._non_persistent_buffers_set for o in owners):
            source = None  # computed by the model; checkpoints of before it was made so may still hold one
        elif source is not None:
            wrong += _disagreement(owners[0], source, is_buffer)
        elif not has_value:
            missing.append(" = ".join(o.path for o in owners))
        matched.append(Target(owners, is_buffer, source))
    unexpected = [n for n in sources if n not in wanted and not ignore(n)]
    if unexpected and not strict:
        names = ", ".join(unexpected[:5]) + ("…" if len(unexpected) > 5 else "")
        warnings.warn(f"{checkpoint.path}: the model has no {names}: ignored", FewbitsWarning, stacklevel=4)
        unexpected = []
    if missing or unexpected or wrong:
        raise CheckpointError(_report(missing, unexpected, wrong, sources, wanted), file=checkpoint.path)
    return matched


def _buffers(model: nn.Module) -> list[list[Owner]]:
    groups: dict[int, list[Owner]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, b in module._buffers.items():
            if b is not None:
                groups.setdefault(id(b), []).append(Owner(module, name, f"{prefix}.{name}" if prefix else name))
    return list(groups.values())


def _disagreement(owner: Owner, source: Source, is_buffer: bool) -> list[str]:
    have = (owner.module._buffers if is_buffer else owner.module._parameters)[owner.name]
    assert have is not None
    if is_buffer and source.spec is not None:
        return [f"{owner.path}: {source.spec} in the checkpoint, a buffer in the model"]
    shape = have.shape
    if source.spec is not None and stores_transposed(owner.module, owner.name):
        shape = shape[::-1]
    if tuple(shape) != tuple(source.shape):
        return [f"{owner.path}: shape {list(source.shape)} in the checkpoint, {list(shape)} in the model"]
    stored_floating = source.dtype is None or source.dtype.is_floating_point
    if stored_floating != have.is_floating_point() or (not stored_floating and source.dtype != have.dtype):
        return [f"{owner.path}: {source.dtype} in the checkpoint, {have.dtype} in the model"]
    if source.dtype is not None and source.dtype.is_floating_point and source.dtype.itemsize < 2:
        return [f"{owner.path}: {source.dtype} in the checkpoint, of whose scales fewbits knows nothing"]
    return []


def _report(
    missing: list[str], unexpected: list[str], wrong: list[str], sources: Iterable[str], known: Iterable[str]
) -> str:
    def near(name: str, names: Iterable[str]) -> str:
        close = difflib.get_close_matches(name.split(" = ")[0], list(names), n=1, cutoff=0.75)
        return f"  (nearest: {close[0]})" if close else ""

    lines = ["the checkpoint and the model do not belong together"]
    # every missing name is listed; of the unexpected, which are often a whole other model, the first ones
    if missing:
        unused = set(sources) - set(known)
        lines += [f"  missing from the checkpoint ({len(missing)}):"]
        lines += [f"    {n}{near(n, unused) if i * len(unused) < _COMPARED else ''}" for i, n in enumerate(missing)]
    if unexpected:
        lines += [f"  not in the model ({len(unexpected)}):"]
        lines += [f"    {n}{near(n, known)}" for n in unexpected[:_SHOWN]]
        lines += [f"    … and {len(unexpected) - _SHOWN} more"] if len(unexpected) > _SHOWN else []
    if wrong:
        lines += [f"  that differ ({len(wrong)}):", *(f"    {line}" for line in wrong)]
    if unexpected and not missing and not wrong:
        lines += ["  strict=False ignores names that the model does not have"]
    return "\n".join(lines)


def ignored_by(model: nn.Module) -> Callable[[str], bool]:
    """What a transformers model itself declares it may find in a checkpoint and not use."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    return lambda name: any(re.search(pattern, name) for pattern in patterns)
