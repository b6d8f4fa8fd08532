"""What a model is made of: which modules are its output heads, and which a pattern names.

An output head is told from the structure. It is the module that a model names itself (transformers'
``get_output_embeddings``), or a linear layer that

- does not lie in a repeated block (one of several modules alike that stand in one list), and
- has an output that nothing registered after it takes in: no linear layer, convolution, recurrence or norm after it
  has as many input features.

So the last layer of an MLP is one, both heads of a two-headed model are, the projections of a two-tower model are;
a model whose only quantizable layer would be a head (a bare ``nn.Linear``) has none.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections import Counter
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from fewbits.errors import ConfigError
from fewbits.modules import is_conv1d, is_linear


def matches(name: str, pattern: str) -> bool:
    """Whether a dotted name is the pattern's module, lies below it, or fits the glob (or lies below one that does)."""
    if name == pattern or name.startswith(pattern + "."):
        return True
    if not any(c in pattern for c in "*?["):
        return False
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:i]), pattern) for i in range(1, len(parts) + 1))


def names_parameter(path: str, pattern: str) -> bool:
    """Whether a pattern is this parameter's own path, or a glob for it whose last part is its plain name."""
    return path == pattern or (
        fnmatch.fnmatchcase(path, pattern) and pattern.rsplit(".", 1)[-1] == path.rsplit(".", 1)[-1]
    )


def check_patterns(patterns: Iterable[str], names: Sequence[str], argument: str) -> None:
    """Raise for a pattern that names nothing in the model: it would be ignored in silence.

    Raises:
        ConfigError: with the nearest names there are.
    """
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
            near += [n for n in names if n.endswith("." + pattern)][:3]
            raise ConfigError(
                f"{argument}: nothing in the model is named {pattern!r}",
                expected="a whole dotted name of a module, or a glob",
                hint=f"nearest: {', '.join(dict.fromkeys(near))}" if near else None,
            )


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _in_features(module: nn.Module) -> set[int]:
    """The widths of input that a module of its own weights takes in."""
    if is_conv1d(module):
        return {int(_weight(module).shape[0])}  # [in, out]
    widths = {
        getattr(module, name, None)
        for name in ("in_features", "in_channels", "num_features", "embed_dim", "input_size", "num_channels")
    }
    if isinstance(module, nn.Bilinear):
        widths |= {module.in1_features, module.in2_features}
    weight = module._parameters.get("weight")
    if weight is not None and weight.dim() == 1:
        widths.add(weight.shape[0])  # a norm's gain, whatever its class
    return {w for w in widths if isinstance(w, int)}


def _out_features(module: nn.Module) -> int:
    return int(_weight(module).shape[1 if is_conv1d(module) else 0])


def _kind(module: nn.Module) -> tuple[object, ...]:
    """Equal for modules of one class and the same parameters."""
    return type(module), *((name, tuple(p.shape)) for name, p in module.named_parameters())


def _repeated(model: nn.Module) -> list[str]:
    """Names of the members of every list in which several composite modules alike stand."""
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        members = [(key, child) for key, child in module.named_children() if next(child.children(), None) is not None]
        kinds = [_kind(child) for _, child in members]
        counts = Counter(kinds)
        for (key, _), kind in zip(members, kinds, strict=True):
            if counts[kind] > 1:
                found.append(f"{name}.{key}" if name else key)
    return found


def blocks_of(model: nn.Module, no_split_module_classes: Iterable[str] | None = None) -> list[str]:
    """Names of the modules that stay whole on one device, outermost ones only, in the model's order.

    They are the composite modules that repeat in a list, which is where residual connections are, and those of the
    classes named: by the caller, or by a transformers model itself (``_no_split_modules``).

    Raises:
        ConfigError: a class that no module of the model is of.
    """
    given = list(no_split_module_classes or ())
    modules = dict(model.named_modules())
    classes = {kind: {cls.__name__ for cls in kind.__mro__} for kind in set(map(type, modules.values()))}
    if absent := [name for name in given if not any(name in names for names in classes.values())]:
        raise ConfigError(
            f"no_split_module_classes: no module of the model is a {', '.join(absent)}",
            expected="names of classes",
            hint=f"the model's own: {', '.join(sorted({kind.__name__ for kind in classes})[:20])}",
        )
    whole = {*given, *(getattr(model, "_no_split_modules", None) or ())}
    repeated = set(_repeated(model))
    found: list[str] = []
    for name, module in modules.items():
        if not name or (found and name.startswith(found[-1] + ".")):
            continue
        if name in repeated or not whole.isdisjoint(classes[type(module)]):
            found.append(name)
    return found


def output_heads(model: nn.Module) -> list[str]:
    """Names of the model's output heads and of every module tied to one (see the module's docstring)."""
    modules = dict(model.named_modules(remove_duplicate=False))
    linears = [name for name, module in modules.items() if is_linear(module)]
    named = set()
    for module in modules.values():
        getter = getattr(module, "get_output_embeddings", None)
        try:
            head = getter() if callable(getter) else None
        except (NotImplementedError, AttributeError):  # transformers' answer of models that have none
            head = None
        named |= {name for name, m in modules.items() if m is head and head is not None}
    blocks = _repeated(model)
    order = list(modules)
    for name in linears:
        if any(matches(name, block) for block in blocks):
            continue
        after = order[order.index(name) + 1 :]
        width = _out_features(modules[name])
        if not any(width in _in_features(modules[later]) for later in after if modules[later] is not modules[name]):
            named.add(name)
    if not set(linears) - named:
        return []
    weights = {id(p) for name in named for p in modules[name].parameters(recurse=False) if p.dim() > 1}
    tied = {name for name, module in modules.items() for p in module.parameters(recurse=False) if id(p) in weights}
    return [name for name in modules if name in named | tied]
