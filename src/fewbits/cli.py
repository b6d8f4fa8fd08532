"""The command line: ``plan``, ``quantize``, ``inspect``, ``generate``, ``bench``. The library does it all."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import fewbits
from fewbits.errors import ConfigError

app = typer.Typer(help="Load, quantize and save PyTorch models in 8 or 4 bits.", no_args_is_help=True)
console = Console()
Source = Annotated[str, typer.Argument(help="A folder with config.json and weights, or a Hugging Face hub id.")]
Device = Annotated[str, typer.Option(help='"auto", "cpu", "cuda:0", …')]
Budgets = Annotated[
    list[str] | None, typer.Option(help='A budget, such as "0=24GiB", "cpu=64GiB", "disk=1TB"; may be repeated.')
]
Revision = Annotated[str | None, typer.Option(help="A branch, tag or commit of a hub id.")]


class FormatName(str, Enum):
    """The formats, for the command line's own check."""

    nf4 = "nf4"
    fp4 = "fp4"
    int8 = "int8"


@contextlib.contextmanager
def _said_plainly() -> Iterator[None]:
    """Bad input ends with its message and exit status 1, not with a traceback."""
    try:
        yield
    except fewbits.FewbitsError as error:
        Console(stderr=True).print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(1) from error


@app.command()
def quantize(
    source: Source,
    target: Annotated[Path, typer.Argument(help="The folder to save to.")],
    format: Annotated[FormatName, typer.Option(help="What to quantize to.")] = FormatName.nf4,
    double_quant: Annotated[bool, typer.Option(help="Quantize the scales as well (4-bit).")] = False,
    block_size: Annotated[int, typer.Option(help="Elements that share a scale (4-bit).")] = 64,
    skip: Annotated[list[str] | None, typer.Option(help="A module not to quantize; may be repeated.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Bytes of a file.")] = "10GB",
    device: Device = "auto",
    max_memory: Budgets = None,
    revision: Revision = None,
) -> None:
    """Quantize a transformers model and save it, so that fewbits and transformers with bitsandbytes load it."""
    with _said_plainly():
        settings: dict[str, Any] = {
            "block_size": block_size,
            "double_quant": double_quant,
            "skip_modules": skip or None,
        }
        model = fewbits.from_pretrained(
            source, format.value, device_map=device, max_memory=_budgets(max_memory), revision=revision, **settings
        )
        fewbits.save(model, target, max_shard_size=max_shard_size)
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model"):
            if (Path(source) / name).is_file() and not (target / name).exists():
                shutil.copy2(Path(source) / name, target / name)
        total = fewbits.summary(model).total
        console.print(
            f"{target}: {total.parameters:,} parameters in {total.nbytes:,} bytes, {total.bits:.2f} bits each"
        )


@app.command()
def plan(
    source: Annotated[str, typer.Argument(help="A folder or file that holds the config.json.")],
    format: Annotated[FormatName | None, typer.Option(help="What to quantize to; what it is by default.")] = None,
    double_quant: Annotated[bool, typer.Option(help="Quantize the scales as well (4-bit).")] = False,
    device_map: Annotated[
        str, typer.Option(help='"auto", "balanced", "balanced_low_0", "sequential", "cpu", …')
    ] = "auto",
    max_memory: Budgets = None,
    save: Annotated[Path | None, typer.Option(help="Write the plan as JSON.")] = None,
) -> None:
    """Show whether a transformers model will fit, where its parts will lie, and how many bytes they take."""
    with _said_plainly():
        settings: dict[str, Any] = {"double_quant": True} if double_quant else {}
        found = fewbits.plan(
            source, format.value if format else None, device_map=device_map, max_memory=_budgets(max_memory), **settings
        )
        console.print(str(found), markup=False, highlight=False, soft_wrap=True)
        if save is not None:
            found.save(save)


def _budgets(texts: list[str] | None) -> dict[int | str, int | str] | None:
    """``max_memory`` from options like "0=24GiB"; ``None`` for none."""
    found: dict[int | str, int | str] = {}
    for text in texts or ():
        device, equals, size = text.partition("=")
        if not equals:
            raise ConfigError(f"max_memory is {text!r}", expected='a device and bytes, such as "0=24GiB"')
        found[device] = size
    return found or None


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(help="A checkpoint: a file, an index, a folder or a hub id.")],
    names: Annotated[bool, typer.Option(help="List every parameter instead of totals.")] = False,
    revision: Revision = None,
) -> None:
    """Show what a checkpoint holds, from its headers alone."""
    from fewbits.checkpoint import open_checkpoint
    from fewbits.match import sources_of

    with _said_plainly():
        checkpoint = open_checkpoint(source, revision=revision)
        rows: dict[str, tuple[int, int, int]] = {}
        table = Table("stored as", "tensors", "parameters", "bytes")
        listing = Table("name", "stored as", "shape", "bytes")
        for name, found in sources_of(checkpoint).items():
            stored = str(found.spec) if found.spec is not None else str(found.dtype).removeprefix("torch.")
            nbytes = sum(checkpoint.tensors[key].nbytes for key in found.group.keys.values())
            count = 1
            for size in found.shape:
                count *= size
            tensors, parameters, total = rows.get(stored, (0, 0, 0))
            rows[stored] = (tensors + 1, parameters + count, total + nbytes)
            listing.add_row(name, stored, "×".join(map(str, found.shape)), f"{nbytes:,}")
        for stored, row in rows.items():
            table.add_row(stored, *(f"{value:,}" for value in row))
        console.print(listing if names else table)


@app.command()
def generate(
    source: Source,
    prompt: Annotated[str, typer.Argument(help="The text to go on from.")],
    format: Annotated[FormatName | None, typer.Option(help="What to quantize to; what it is by default.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write.")] = 50,
    device: Device = "auto",
    max_memory: Budgets = None,
    revision: Revision = None,
) -> None:
    """Load a transformers model, quantized if asked, and let it write."""
    with _said_plainly():
        from fewbits.checkpoint import local_path

        path = local_path(source, revision=revision)
        model = fewbits.from_pretrained(
            path, format.value if format else None, device_map=device, max_memory=_budgets(max_memory)
        )
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(path if path.is_dir() else path.parent)
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
        written = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        console.print(tokenizer.decode(written[0], skip_special_tokens=True), markup=False, highlight=False)


@app.command()
def bench(
    source: Annotated[str | None, typer.Argument(help="A folder or file with the config.json of a model.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="Of a weight, such as 4096x14336; may be repeated.")] = None,
    format: Annotated[FormatName, typer.Option(help="How weights are stored.")] = FormatName.nf4,
    double_quant: Annotated[bool, typer.Option(help="Quantize the scales as well (4-bit).")] = False,
    rows: Annotated[str, typer.Option(help="Of the input, with commas.")] = "1,4,16,64,256,1024,4096",
    device: Annotated[
        str, typer.Option(help='"cpu", "cuda:0", …; by default the first GPU, if there is one.')
    ] = "auto",
    tune: Annotated[bool, typer.Option(help="Keep the fastest way for each shape, on a GPU.")] = False,
) -> None:
    """Time linear layers, the model's or of given shapes, beside torch's own in bf16."""
    import torch

    from fewbits import bench as benching
    from fewbits.formats import QuantSpec

    with _said_plainly():
        given = [_sizes(text, "x", "shape") for text in shape or ()]
        shapes = [(sizes[0], sizes[-1]) for sizes in given if len(sizes) == 2]
        if source is not None:
            from fewbits.hf import build_empty, read_config

            shapes += benching.linear_shapes(build_empty(read_config(Path(source)), Path(source)))
        if not shapes or any(len(sizes) != 2 for sizes in given):
            raise ConfigError("there is no shape to time", expected="a model's folder, or --shape 4096x14336")
        counts = _sizes(rows, ",", "rows")
        where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        spec = QuantSpec(format.value, double_quant=double_quant)
        timings = benching.bench(shapes, spec, counts, device=where)
        ways = list(dict.fromkeys(way for timing in timings for way in timing.by_way))
        table = Table(title="µs a call; *: the way that is taken" if ways else "µs a call")
        for name in ("weight", "rows", "bf16", "fewbits", "× faster", *ways):
            table.add_column(name, no_wrap=True, justify="left" if name == "weight" else "right")
        for timing in timings:
            by_way = (
                f"{timing.by_way[way]:.1f}{'*' if way == timing.way else ''}" if way in timing.by_way else ""
                for way in ways
            )
            table.add_row(
                "×".join(map(str, timing.shape)), str(timing.rows), f"{timing.plain:.1f}", f"{timing.ours:.1f}",
                f"{timing.plain / timing.ours:.2f}", *by_way,
            )  # fmt: skip
        console.print(table)
        if tune:
            path = benching.tune(timings, spec, where)
            console.print("there is but one way here: nothing to tune" if path is None else f"kept in {path}")


def _sizes(text: str, separator: str, name: str) -> list[int]:
    try:
        sizes = [int(size) for size in text.split(separator)]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise ConfigError(f"{name} is {text!r}", expected=f"positive numbers with {separator!r} between them")
    return sizes


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
