"""What save writes, to the byte, and that what is saved comes back the same."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import bitsandbytes as bnb
import pytest
import safetensors.torch
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

import fewbits
from fewbits import atomic
from fewbits.errors import CheckpointError, FewbitsWarning, SaveError
from fewbits.tensor import QuantTensor
from models import GPT, TiedGPT, random_transformers, same_tensors

FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {"config": "nf4"},
    "nf4-dq": {"config": "nf4", "double_quant": True},
    "nf4-b128-dq": {"config": "nf4", "block_size": 128, "double_quant": True},
    "fp4": {"config": "fp4"},
    "fp4-b32": {"config": "fp4", "block_size": 32},
    "int8": {"config": "int8"},
    "int8-bf16": {"config": "int8", "dtype": torch.bfloat16},
    "nf4-bf16": {"config": "nf4", "dtype": torch.bfloat16, "compute_dtype": torch.bfloat16},
    "mixed": {
        "config": "nf4",
        "overrides": {"transformer.wte": "int8", "lm_head": "fp4", "transformer.h.1.mlp": None},
    },
    "none": {"config": None},
}
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [0, 49, 7, 7, 8, 30, 31, 2]])


def gpt(seed: int = 0, kind: type[GPT] = GPT) -> GPT:
    torch.manual_seed(seed)
    return kind().eval()


def quantized(name: str, seed: int = 0, kind: type[GPT] = GPT) -> nn.Module:
    settings = dict(FORMATS[name])
    config = settings.pop("config")
    model = gpt(seed, kind)
    return model if config is None else fewbits.quantize(model, config, **settings)


def data_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder, read by the libraries that made these file formats."""
    found: dict[str, Tensor] = {}
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        read = (
            safetensors.torch.load_file(file)
            if file.suffix == ".safetensors"
            else torch.load(file, weights_only=True, map_location="cpu")
        )
        assert not found.keys() & read.keys()
        found |= read
    return found


def header_of(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file and where its data begins."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), 8 + length


# ------------------------------------------------------------------------------------------- bitsandbytes' bytes


def bitsandbytes_entries(w: Tensor, bias: Tensor, format: str, double_quant: bool, block: int) -> dict[str, Tensor]:
    """What bitsandbytes' own layer gives as its state dict for this weight."""
    n, k = w.shape
    layer: Any
    if format == "int8":
        layer = bnb.nn.Linear8bitLt(k, n, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(w.clone(), requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(k, n, compress_statistics=double_quant, quant_type=format)
        layer.weight = bnb.nn.Params4bit(
            w.clone(), requires_grad=False, compress_statistics=double_quant, quant_type=format, blocksize=block
        )
    layer.bias = nn.Parameter(bias.clone())
    return layer.to("cpu").state_dict()


@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (3, 5), (7, 64), (65, 33), (64, 256), (300, 257)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("format", "double_quant", "block"),
    [
        ("nf4", False, 64),
        ("nf4", True, 64),
        ("nf4", True, 4096),
        ("fp4", False, 64),
        ("fp4", True, 128),
        ("int8", False, 64),
    ],
)
def test_every_entry_is_that_of_bitsandbytes(
    tmp_path: Path, shape: tuple[int, int], dtype: torch.dtype, format: str, double_quant: bool, block: int
) -> None:
    torch.manual_seed(sum(shape))
    w, bias = torch.randn(shape).to(dtype), torch.randn(shape[0]).to(dtype)
    layer = nn.Linear(shape[1], shape[0], dtype=dtype)
    layer.weight.data, layer.bias.data = w.clone(), bias.clone()
    settings = {} if format == "int8" else {"double_quant": double_quant, "block_size": block}
    fewbits.save(fewbits.quantize(layer, format, **settings), tmp_path)
    ours, theirs = stored(tmp_path), bitsandbytes_entries(w, bias, format, double_quant, block)
    assert same_tensors(ours, {k: v.contiguous() for k, v in theirs.items()}), [
        (k, theirs.get(k), ours.get(k)) for k in {*ours, *theirs} if k not in ours or not theirs[k].equal(ours[k])
    ]


def test_the_json_has_bitsandbytes_order_and_no_more(tmp_path: Path) -> None:
    model = fewbits.quantize(nn.Linear(64, 2), "nf4", double_quant=True)
    blob = bytes(model.state_dict()["weight.quant_state.bitsandbytes__nf4"].tolist())
    order = ["quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset"]
    assert list(json.loads(blob)) == order
    plain = fewbits.quantize(nn.Linear(64, 2), "fp4").state_dict()["weight.quant_state.bitsandbytes__fp4"]
    assert bytes(plain.tolist()) == b'{"quant_type": "fp4", "blocksize": 64, "dtype": "float32", "shape": [2, 64]}'


# ------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", FORMATS)
def test_the_safetensors_library_reads_equal_values(tmp_path: Path, name: str) -> None:
    model = quantized(name)
    fewbits.save(model, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"model.safetensors"}
    assert same_tensors(stored(tmp_path), {k: v.contiguous() for k, v in model.state_dict().items()})
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("name", FORMATS)
def test_tensors_are_aligned(tmp_path: Path, name: str) -> None:
    """Some readers map the file and view the bytes where they lie; JSON blobs have odd lengths, so they come last."""
    fewbits.save(quantized(name), tmp_path)
    header, begin = header_of(tmp_path / "model.safetensors")
    assert begin % 8 == 0
    sizes = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1, "I8": 1}
    blobs = [v["data_offsets"][0] for k, v in header.items() if "quant_state" in k]
    for key, entry in header.items():
        if key != "__metadata__":
            assert (begin + entry["data_offsets"][0]) % sizes[entry["dtype"]] == 0, key
            if "quant_state" not in key:
                assert all(entry["data_offsets"][0] < blob for blob in blobs), key


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("limit", [700, 5_000, "20KB", "16KiB"])
def test_shards(tmp_path: Path, safe: bool, limit: int | str) -> None:
    model = quantized("nf4-dq")
    fewbits.save(model, tmp_path, max_shard_size=limit, safe_serialization=safe)
    most = {"20KB": 20_000, "16KiB": 16_384}.get(str(limit), limit)
    suffix = ".safetensors" if safe else ".bin"
    (index_file,) = tmp_path.glob("*.index.json")
    assert index_file.name == ("model.safetensors.index.json" if safe else "pytorch_model.bin.index.json")
    index = json.loads(index_file.read_text())
    shards = sorted(p.name for p in tmp_path.iterdir() if p != index_file)
    stem = "model" if safe else "pytorch_model"
    assert shards == [f"{stem}-{i + 1:05}-of-{len(shards):05}{suffix}" for i in range(len(shards))]
    assert len(shards) > 1
    everything = {k: v.contiguous() for k, v in model.state_dict().items()}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in everything.values())
    seen: dict[str, Tensor] = {}
    for shard in shards:
        path = tmp_path / shard
        held = safetensors.torch.load_file(path) if safe else torch.load(path, weights_only=True)
        assert all(index["weight_map"][k] == shard for k in held)
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= most
        seen |= held
    assert index["weight_map"].keys() == seen.keys()
    assert same_tensors(seen, everything)
    again = fewbits.load(GPT, tmp_path)
    assert same_tensors(again.state_dict(), model.state_dict())


def test_pickles_hold_the_tensor_and_not_the_storage_it_is_a_view_of(tmp_path: Path) -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            flat = torch.arange(1_000_000.0)
            self.a, self.b = nn.Parameter(flat[:10]), nn.Parameter(flat[10:20])

    fewbits.save(Views(), tmp_path, safe_serialization=False, max_shard_size=40)
    assert all(p.stat().st_size < 10_000 for p in tmp_path.glob("*.bin"))
    assert {k: v.tolist() for k, v in stored(tmp_path).items()} == {
        "a": list(range(10)),
        "b": list(range(10, 20)),
    }


@pytest.mark.parametrize("size", [-1, "10 parsecs", True, None, ""])
def test_a_shard_size_that_cannot_be_meant(tmp_path: Path, size: Any) -> None:
    with pytest.raises(ValueError, match="max_shard_size"):
        fewbits.save(gpt(), tmp_path / "new", max_shard_size=size)
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------------------------------- tied weights

TIED: dict[str, dict[str, Any]] = {
    "plain": {"config": "nf4"},
    "int8": {"config": "nf4", "overrides": {"transformer.wte": "int8", "lm_head": "int8"}},
    "nf4-dq": {
        "config": "int8",
        "double_quant": False,
        "overrides": {"transformer.wte": "nf4", "lm_head": "nf4"},
    },
}


@pytest.fixture(params=TIED)
def tied(request: pytest.FixtureRequest) -> nn.Module:
    settings = dict(TIED[request.param])
    model = fewbits.quantize(gpt(kind=TiedGPT), settings.pop("config"), **settings)
    assert isinstance(model.lm_head.weight, QuantTensor) == (request.param != "plain")
    return model


def save_with_accelerate(model: nn.Module, folder: Path, **settings: Any) -> None:
    accelerate.Accelerator(cpu=True).save_model(model, folder, **settings)


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("limit", ["10GB", "3KB"])
@pytest.mark.parametrize("writer", [fewbits.save, save_with_accelerate], ids=["fewbits", "accelerate"])
def test_tied_weights_are_written_once_and_tied_again(
    tmp_path: Path, tied: nn.Module, safe: bool, limit: str, writer: Any
) -> None:
    writer(tied, tmp_path, safe_serialization=safe, max_shard_size=limit)
    again = fewbits.load(TiedGPT, tmp_path)
    assert again.lm_head.weight is again.transformer["wte"].weight
    assert torch.equal(again(IDS), tied(IDS))
    assert same_tensors(again.state_dict(), tied.state_dict())


@pytest.mark.parametrize("safe", [True, False])
def test_tied_weights_are_tied_again_under_another_prefix(tmp_path: Path, tied: nn.Module, safe: bool) -> None:
    fewbits.save(nn.ModuleDict({"model": tied}), tmp_path, safe_serialization=safe)
    with pytest.warns(FewbitsWarning, match="prefix 'model.'"):
        again = fewbits.load(TiedGPT, tmp_path)
    assert again.lm_head.weight is again.transformer["wte"].weight
    assert torch.equal(again(IDS), tied(IDS))


def test_each_shared_tensor_lies_in_the_file_once(tmp_path: Path, tied: nn.Module) -> None:
    fewbits.save(tied, tmp_path)
    header, begin = header_of(tmp_path / "model.safetensors")
    metadata = header.pop("__metadata__")
    written = (tmp_path / "model.safetensors").stat().st_size - begin
    state = tied.state_dict()
    assert {"lm_head.weight", "transformer.wte.weight"} & metadata.keys()
    storages = {t.untyped_storage().data_ptr(): t.nbytes for k, t in state.items() if k not in metadata}
    assert written == sum(storages.values())
    assert header.keys() | (metadata.keys() - {"format"}) == state.keys()
    for alias, kept in metadata.items():
        if alias != "format":
            assert torch.equal(state[alias], state[kept]), alias


def test_pickles_share_what_is_tied(tmp_path: Path, tied: nn.Module) -> None:
    fewbits.save(tied, tmp_path, safe_serialization=False)
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert state.keys() == tied.state_dict().keys()
    assert state["lm_head.weight"].data_ptr() == state["transformer.wte.weight"].data_ptr()


def test_buffers_that_are_shared_are_written_once(tmp_path: Path) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.register_buffer("table", torch.arange(100_000.0))
            self.one.register_buffer("table", self.table)

    for safe in (True, False):
        fewbits.save(Shared(), tmp_path / str(safe), safe_serialization=safe)
        (file,) = (tmp_path / str(safe)).iterdir()
        assert 400_000 < file.stat().st_size < 410_000
        again = fewbits.load(Shared, tmp_path / str(safe))
        assert torch.equal(again.one.table, torch.arange(100_000.0))


# ------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_outputs_are_the_same_to_the_bit_after_save_and_load(
    tmp_path: Path, name: str, safe: bool, device: str
) -> None:
    model = quantized(name).to(device)
    ids = IDS.to(device)
    fewbits.save(model, tmp_path, safe_serialization=safe, max_shard_size="9KB")
    compute = FORMATS[name].get("compute_dtype")
    again = fewbits.load(GPT, tmp_path, compute_dtype=compute, device_map=device)
    assert repr(again) == repr(model)
    assert same_tensors(again.state_dict(), model.state_dict())
    assert torch.equal(again.eval()(ids), model(ids))
    fewbits.save(again, tmp_path / "again", safe_serialization=safe, max_shard_size="9KB")
    first = {k: v for k, v in data_of(tmp_path).items() if "/" not in k}
    if safe:  # the same bytes of the whole files too
        assert data_of(tmp_path / "again") == first


@pytest.mark.parametrize("name", FORMATS)
def test_running_the_model_changes_nothing_that_is_saved(tmp_path: Path, name: str) -> None:
    model = quantized(name)
    fewbits.save(model, tmp_path / "before")
    with torch.no_grad():
        model(IDS)
    model(IDS).sum().backward()
    fewbits.save(model, tmp_path / "after")
    assert data_of(tmp_path / "before") == data_of(tmp_path / "after")


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_load_state_dict_takes_what_state_dict_gave(tmp_path: Path, name: str, assign: bool) -> None:
    model, other = quantized(name, seed=0), quantized(name, seed=1)
    assert not same_tensors(model.state_dict(), other.state_dict())
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert all(type(t) is Tensor for t in state.values())
    keys = set(state)
    result = other.load_state_dict(state, strict=True, assign=assign)
    assert result == ([], [])
    assert set(state) == keys  # the caller's dictionary is left alone
    assert same_tensors(other.state_dict(), model.state_dict())
    assert torch.equal(other(IDS), model(IDS))
    assert repr(other) == repr(model)


@pytest.mark.filterwarnings("ignore:the model mixes formats")  # transformers with bitsandbytes cannot load it: so be it
def test_a_quantized_embedding_and_a_conv1d_take_their_state_dict_back() -> None:
    def model(seed: int) -> nn.Module:
        return fewbits.quantize(
            random_transformers("gpt2", seed), "nf4", overrides={"transformer.wte": "int8", "lm_head": "int8"}
        )

    first, second = model(0), model(1)
    ids = IDS % 64
    assert not torch.equal(first(ids).logits, second(ids).logits)
    assert second.load_state_dict(first.state_dict()) == ([], [])
    assert torch.equal(first(ids).logits, second(ids).logits)
    assert second.lm_head.weight is second.transformer.wte.weight


@pytest.mark.parametrize("name", ["nf4", "nf4-dq", "fp4-b32", "int8"])
def test_a_state_dict_in_floating_point_is_quantized_on_the_way_in(name: str) -> None:
    model, source = quantized(name, seed=0), gpt(seed=1)
    assert model.load_state_dict(source.state_dict(), strict=True) == ([], [])
    weight = source.transformer["h"][0].attn.c_attn.weight.data
    bias = source.transformer["h"][0].attn.c_attn.bias.data
    settings = FORMATS[name]
    expected = bitsandbytes_entries(
        weight, bias, settings["config"], settings.get("double_quant", False), settings.get("block_size", 64)
    )
    prefix = "transformer.h.0.attn.c_attn."
    found = {k.removeprefix(prefix): v for k, v in model.state_dict().items() if k.startswith(prefix)}
    assert same_tensors(found, {k: v.contiguous() for k, v in expected.items()})


def test_load_state_dict_reports_what_is_missing_and_unexpected() -> None:
    model = quantized("nf4")
    state = model.state_dict()
    for key in [k for k in state if k.startswith("transformer.h.0.attn.c_proj.weight")]:
        del state[key]
    state["nonsense"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*c_proj\.weight.*Unexpected.*nonsense"):
        model.load_state_dict(state)
    found = model.load_state_dict(state, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == (["transformer.h.0.attn.c_proj.weight"], ["nonsense"])


@pytest.mark.parametrize(("into", "of"), [("nf4", "int8"), ("int8", "nf4"), ("nf4", "fp4")])
def test_a_state_dict_of_another_format_is_refused_rather_than_quantized_twice(into: str, of: str) -> None:
    model = quantized(into)
    before = {k: v.clone() for k, v in model.state_dict().items() if "attn" in k}
    with pytest.raises(CheckpointError, match="quantized twice"):
        model.load_state_dict(quantized(of, seed=1).state_dict())
    assert same_tensors({k: v for k, v in model.state_dict().items() if "attn" in k}, before)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # from within torch.compile
@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_wrappers_are_looked_through(tmp_path: Path, name: str) -> None:
    model = quantized(name)
    fewbits.save(model, tmp_path / "bare")
    fewbits.save(torch.compile(model), tmp_path / "compiled")
    fewbits.save(nn.DataParallel(model), tmp_path / "parallel")
    assert data_of(tmp_path / "bare") == data_of(tmp_path / "compiled") == data_of(tmp_path / "parallel")


# ------------------------------------------------------------------------------------------- what else is there


def test_other_files_in_the_folder_survive(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "nested" / "deeper").mkdir(parents=True)
    kept = {
        "tokenizer.json": "{}",
        "nested/deeper/notes.txt": "notes",
        ".hidden": "h",
        "nested/model.safetensors": "of another model",
        "model.pt": "perhaps the only full-precision copy",
        "model-best.safetensors": "another",
        "model.safetensors.bak": "backup",
        "config.json": '{"of": "the caller"}',
        "diffusion_pytorch_model.onnx": "x",
        "adapter_model.safetensors": "x",
    }
    for name, text in kept.items():
        (folder / name).write_text(text)
    (folder / "link").symlink_to("nested/deeper/notes.txt")
    (folder / "dangling").symlink_to("/nowhere/at/all")
    (folder / "nested" / "script.sh").write_text("#!/bin/sh")
    (folder / "nested" / "script.sh").chmod(0o750)
    folder.chmod(0o751)
    for round, limit in enumerate(["4KB", "10GB", "9KB"]):
        fewbits.save(gpt(seed=round), folder, max_shard_size=limit)
        assert {name: (folder / name).read_text() for name in kept} == kept
        assert (folder / "link").readlink() == Path("nested/deeper/notes.txt")
        assert (folder / "dangling").readlink() == Path("/nowhere/at/all")
        assert (folder / "nested" / "script.sh").stat().st_mode & 0o777 == 0o750
        assert folder.stat().st_mode & 0o777 == 0o751
        assert list(tmp_path.iterdir()) == [folder]
        again = fewbits.load(GPT, folder)
        assert same_tensors(again.state_dict(), gpt(seed=round).state_dict())


def test_shards_of_an_earlier_save_are_gone(tmp_path: Path) -> None:
    model = quantized("int8")
    for safe, size in [(True, "5KB"), (True, "10GB"), (False, "10GB"), (False, "9KB"), (True, "30KB")]:
        fewbits.save(model, tmp_path / "reused", max_shard_size=size, safe_serialization=safe)
        fewbits.save(model, tmp_path / "fresh" / f"{safe}{size}", max_shard_size=size, safe_serialization=safe)
        fresh = {p.name for p in (tmp_path / "fresh" / f"{safe}{size}").iterdir()}
        assert {p.name for p in (tmp_path / "reused").iterdir()} == fresh


def test_files_that_transformers_wrote_are_replaced(tmp_path: Path) -> None:
    model = random_transformers("llama")
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    fewbits.save(fewbits.quantize(model, "nf4"), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"model.safetensors", "config.json", "generation_config.json"}


def test_a_symlink_to_the_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    fewbits.save(gpt(), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "model.safetensors").is_file()


def test_parents_are_made_and_the_umask_holds(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        fewbits.save(gpt(), tmp_path / "a" / "b" / "c")
    finally:
        os.umask(before)
    assert (tmp_path / "a" / "b" / "c").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "a" / "b" / "c" / "model.safetensors").stat().st_mode & 0o777 == 0o640


# ------------------------------------------------------------------------------------------- transformers


@pytest.mark.parametrize(
    ("settings", "recorded"),
    [
        ({"config": "nf4", "double_quant": True}, ("nf4", True)),
        ({"config": "fp4"}, ("fp4", False)),
        ({"config": "int8", "llm_int8_threshold": 4.0}, None),
    ],
    ids=str,
)
def test_config_json_records_the_quantization(tmp_path: Path, settings: dict[str, Any], recorded: Any) -> None:
    settings = dict(settings)
    model = fewbits.quantize(random_transformers("llama"), settings.pop("config"), dtype=torch.bfloat16, **settings)
    before = copy.deepcopy(model.config.to_dict())
    fewbits.save(model, tmp_path)
    assert model.config.to_dict() == before
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert written["dtype"] == "bfloat16"
    # the arbiter of what the dictionary means is transformers' own class
    config = transformers.BitsAndBytesConfig.from_dict(
        {k: v for k, v in written["quantization_config"].items() if k != "quant_method"}
    )
    assert config.llm_int8_skip_modules == ["lm_head"]
    if recorded is None:
        assert config.load_in_8bit
        assert not config.load_in_4bit
        assert config.llm_int8_threshold == 4.0
    else:
        assert config.load_in_4bit
        assert not config.load_in_8bit
        assert (config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == recorded


def test_a_config_without_quantization_replaces_one_with(tmp_path: Path) -> None:
    fewbits.save(fewbits.quantize(random_transformers("llama"), "nf4"), tmp_path)
    assert "quantization_config" in json.loads((tmp_path / "config.json").read_text())
    fewbits.save(random_transformers("llama"), tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "opt"])
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_transformers_save_pretrained_gives_a_folder_fewbits_loads(tmp_path: Path, name: str, format: str) -> None:
    model = fewbits.quantize(random_transformers(name), format)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="6KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    fewbits.save(model, tmp_path / "ours", max_shard_size="6KB")
    ids = IDS % 64
    for folder in ("theirs", "ours"):
        again = fewbits.from_pretrained(tmp_path / folder)
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert same_tensors(again.state_dict(), model.state_dict())


# what is said of such a mixture, when it is made and when it is loaded, is not what this test is about
@pytest.mark.filterwarnings("ignore:the model mixes formats", "ignore:.*is already quantized to")
def test_save_pretrained_of_a_tied_and_quantized_head(tmp_path: Path) -> None:
    overrides = {"model.embed_tokens": "int8", "lm_head": "int8"}
    model = fewbits.quantize(random_transformers("llama-tied"), "nf4", overrides=overrides)
    fewbits.save(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    ids = IDS % 64
    for folder in ("ours", "theirs"):
        again = fewbits.from_pretrained(tmp_path / folder)
        assert again.lm_head.weight is again.model.embed_tokens.weight
        assert torch.equal(again(ids).logits, model(ids).logits)


# bitsandbytes compiles a helper with torch.jit on its CPU path, and says what it casts
@pytest.mark.usefixtures("without_the_integration")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:MatMul8bitLt:UserWarning")
@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize(
    ("format", "settings"),
    [("nf4", {"double_quant": True}), ("fp4", {}), ("int8", {})],
    ids=["nf4-dq", "fp4", "int8"],
)
def test_transformers_with_bitsandbytes_loads_shards(
    tmp_path: Path, name: str, format: str, settings: dict[str, Any]
) -> None:
    model = fewbits.quantize(random_transformers(name, width=128), format, **settings)
    fewbits.save(model, tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    kinds = {type(m).__name__ for m in theirs.modules()}
    assert ("Linear8bitLt" if format == "int8" else "Linear4bit") in kinds
    state = theirs.state_dict()
    for key, tensor in model.state_dict().items():  # the same bytes, wherever they lie
        assert state[key].flatten().equal(tensor.flatten()), key
    ids = IDS % 64
    with torch.no_grad():
        expected, found = model(ids).logits, theirs(ids).logits
    # theirs rounds scales and activations to bf16 (4-bit, on some CPUs) or fp16 (int8): at most 2 × 2^-9 of a layer's
    # output each time, and eight layers follow each other
    assert (found - expected).abs().max() <= 8 * 2**-8 * expected.abs().max()


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_the_real_accelerator_saves_a_fewbits_model(tmp_path: Path, name: str, safe: bool) -> None:
    model = quantized(name)
    save_with_accelerate(model, tmp_path, safe_serialization=safe, max_shard_size="15KB")
    assert len(list(tmp_path.glob("*-of-*"))) > 1
    again = fewbits.load(GPT, tmp_path, compute_dtype=FORMATS[name].get("compute_dtype"))
    assert same_tensors(again.state_dict(), model.state_dict())
    assert torch.equal(again.eval()(IDS), model(IDS))


# ------------------------------------------------------------------------------------------- refusals


def test_a_model_without_values_is_refused(tmp_path: Path) -> None:
    fewbits.save(gpt(), tmp_path / "model")
    before = data_of(tmp_path)
    with fewbits.init_empty_weights():
        empty = GPT()
    with pytest.raises(SaveError, match="no values") as caught:
        fewbits.save(empty, tmp_path / "model")
    assert caught.value.parameter == "transformer.wte.weight"
    partly = gpt()
    partly.transformer["h"][1].attn.register_buffer("bias", torch.empty(1, device="meta"))
    with pytest.raises(SaveError, match="no values") as caught:
        fewbits.save(partly, tmp_path / "model")
    assert caught.value.parameter == "transformer.h.1.attn.bias"
    assert data_of(tmp_path) == before


def test_a_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for path in (file, file / "below"):
        with pytest.raises(SaveError) as caught:
            fewbits.save(gpt(), path)
        assert isinstance(caught.value, OSError)
        assert str(file) in str(caught.value)
    assert data_of(tmp_path) == {"file": b"mine"}


def test_what_a_file_cannot_hold_is_refused_and_the_old_one_stays(tmp_path: Path) -> None:
    class Extra(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def get_extra_state(self) -> Any:
            return {"step": 3}

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch calls this dtype experimental
                self.register_buffer("odd", torch.zeros(2, dtype=torch.complex32))

    fewbits.save(gpt(), tmp_path / "model")
    before = data_of(tmp_path)
    for model, name in ((Extra(), "_extra_state"), (Odd(), "odd")):
        with pytest.raises(SaveError) as caught:
            fewbits.save(model, tmp_path / "model")
        assert caught.value.parameter == name
    assert data_of(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


# ------------------------------------------------------------------------------------------- without an exchange


def check_fallback(folder: Path) -> None:
    (folder / "notes.txt").write_text("kept")
    for round, (limit, safe) in enumerate([("10GB", True), ("9KB", True), ("10GB", True), ("9KB", False)]):
        model = quantized("nf4-dq", seed=round)
        fewbits.save(model, folder, max_shard_size=limit, safe_serialization=safe)
        again = fewbits.load(GPT, folder)
        assert same_tensors(again.state_dict(), model.state_dict())
        assert (folder / "notes.txt").read_text() == "kept"
        assert not [p for p in folder.iterdir() if p.name.startswith(".")]
        files = {p.name for p in folder.iterdir()} - {"notes.txt"}
        if round == 0:
            assert files == {"model.safetensors"}
        else:  # nothing of the earlier ones is left
            (index,) = folder.glob("*.index.json")
            content = json.loads(index.read_text())
            assert files == {index.name, *content["weight_map"].values()}
            assert "replaces" not in content["metadata"]


def test_saving_into_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    inode = tmp_path.stat().st_ino
    check_fallback(Path())
    assert tmp_path.stat().st_ino == inode  # a shell that stands in it still does


def test_saving_into_a_parent_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    inode = tmp_path.stat().st_ino
    fewbits.save(gpt(), "..")
    assert tmp_path.stat().st_ino == inode
    assert (tmp_path / "model.safetensors").is_file()


def test_saving_where_folders_cannot_be_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "exchange", lambda first, second: False)
    check_fallback(tmp_path)


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Path]:
    point = tmp_path / "mount"
    point.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", point], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting a file system needs rights that are not given here: {done.stderr.decode().strip()}")
    yield point
    subprocess.run(["umount", point], check=True)


def test_saving_into_a_mount_point(mount: Path) -> None:
    check_fallback(mount)
