"""The examples run, as a reader runs them, and what they print agrees with closed forms and other implementations."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fewbits

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


def run(folder: Path, script: str | Path, *arguments: object) -> str:
    """What a script prints, run in ``folder`` by a fresh interpreter."""
    paths = os.pathsep.join([str(ROOT / "src"), str(EXAMPLES)])
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


# ------------------------------------------------------------------------------------------------- closed forms


def plain16(*shape: int) -> int:
    return 2 * math.prod(shape)


def int8(*shape: int) -> int:
    """A byte for each, an fp32 scale for each row."""
    return math.prod(shape) + 4 * shape[0]


def nf4_dq(*shape: int) -> int:
    """Four bits for each, a byte for each 64, an fp32 for each 256 of those, and one fp32 offset."""
    n = math.prod(shape)
    return n // 2 + n // 64 + 4 * math.ceil(n / 64 / 256) + 4


def gpt_bytes(layers: int, embd: int, vocab: int, block: int, linear, ends=plain16) -> int:
    """Bytes of a GPT's parameters: ``linear`` for the blocks' matrices, ``ends`` for embeddings and head."""
    c = embd
    matrices = sum(linear(*shape) for shape in [(3 * c, c), (c, c), (4 * c, c), (c, 4 * c)])
    vectors = plain16(3 * c + c + 4 * c + c) + plain16(4 * c)  # biases, two norms
    return layers * (matrices + vectors) + plain16(2 * c) + ends(vocab, c) + ends(block, c) + ends(vocab, c)


# ------------------------------------------------------------------------------------------------- the examples


def test_the_gpt_computes_what_gpt2_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against transformers' GPT-2, whose Conv1D holds each matrix transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    monkeypatch.syspath_prepend(EXAMPLES)
    from gpt import GPT, GPTConfig

    torch.manual_seed(0)
    ours = GPT(GPTConfig(n_layer=2, n_head=4, n_embd=32, vocab_size=50, block_size=16)).eval()
    config = GPT2Config(
        n_layer=2, n_head=4, n_embd=32, vocab_size=50, n_positions=16, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    theirs = GPT2LMHeadModel(config).eval()
    state = {name: p for name, p in ours.state_dict().items() if not name.endswith(".attn.bias")}
    matrices = re.compile(r"transformer\.h\.\d+\.(attn|mlp)\.c_\w+\.weight")
    state = {name: p.t() if matrices.fullmatch(name) else p for name, p in state.items()}
    assert set(state) == set(theirs.state_dict())
    theirs.load_state_dict(state)
    ids = torch.randint(50, (3, 12))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits)
    generated = ours.generate(ids, 8)  # past the block size, so that the window moves
    assert generated.shape == (3, 20)
    assert torch.equal(generated[:, :12], ids)


def test_the_sizes_are_gpt2s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    from gpt import GPT, SIZES, GPTConfig

    # GPT-2's published counts are of a head tied to the embedding; here it is a parameter more
    published = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}
    assert set(SIZES) == set(published)
    for name, count in published.items():
        config = GPTConfig.named(name)
        with fewbits.init_empty_weights(include_buffers=True):
            model = GPT(config)
        assert sum(p.numel() for p in model.parameters()) == count + config.vocab_size * config.n_embd
    assert GPTConfig.named("gpt2-xl", n_layer=2).n_layer == 2


def test_recipe(tmp_path: Path) -> None:
    text = run(tmp_path, "recipe.py")
    sizes = [int(number.replace(",", "")) for number in re.findall(r"-> ([\d,]+)", text)]
    assert sizes == [gpt_bytes(4, 256, 1024, 128, int8), gpt_bytes(4, 256, 1024, 128, nf4_dq)]
    assert text.count("  yes  ") == 6
    assert "NO" not in text


def test_bring_your_own(tmp_path: Path) -> None:
    text = run(tmp_path, "bring_your_own.py")
    rows = dict(re.findall(r"^(\S[^\n]*?) +([\d,]+) bytes +[\d.]+ bits a parameter", text, re.MULTILINE))
    size = {name: int(number.replace(",", "")) for name, number in rows.items()}
    w, c = 64, 8  # width and classes
    # [shape, format under "int8" and "nf4", format by name]
    layer = [((3 * w, w), None, nf4_dq), ((w, w), True, nf4_dq), ((4 * w, w), True, nf4_dq), ((w, 4 * w), True, int8)]
    vectors = 3 * w + w + 4 * w + w + 4 * w
    rest = (w * 8 + w) + 16 * w + 2 * w + (c * 2 * w + c)  # convolution, positions, the MLP's bias, the head

    def nf4(*shape: int) -> int:
        return math.prod(shape) // 2 + 4 * math.prod(shape) // 64

    for name, format in (("int8", int8), ("nf4", nf4), ("quantized in place", nf4_dq)):
        quantized = sum(format(*s) if by_default else 4 * math.prod(s) for s, by_default, _ in layer)
        assert size[name] == 2 * (quantized + 4 * vectors) + format(2 * w, w) + 4 * rest, name
    named = 2 * (sum(format(*s) for s, _, format in layer) + 4 * vectors) + 4 * 2 * w * w + 4 * rest
    assert size["nf4-dq and int8, by name"] == size["saved and loaded again"] == named
    assert "same outputs, bit for bit: yes" in text
    accuracy = [float(number) for number in re.findall(r"accuracy ([\d.]+)", text)]
    assert accuracy[0] > 0.5  # it has learned: chance is 1/8
    assert max(accuracy) - min(accuracy) < 3 * math.sqrt(0.25 / 1000)  # three standard errors, of 1,000 waves


def test_train(tmp_path: Path) -> None:
    text = ROOT / "text" / "wikitext2-test-400k.txt"
    out = tmp_path / "model"
    small = ("--hidden", 64, "--layers", 2, "--steps", 20, "--batch", 8, "--window", 64, "--shard", "100KB")
    printed = run(tmp_path, "train.py", text, "--out", out, *small)
    losses = [float(loss) for loss in re.findall(r"([\d.]+) bits per byte  ", printed)]
    assert len(losses) == 20
    assert 8 < losses[0] < 9.5  # a new model knows nothing: log2(384) = 8.58
    assert losses[-1] < losses[0] - 1.5
    assert float(re.search(r"held-out text: ([\d.]+)", printed)[1]) < losses[0] - 1.5
    assert len(list(out.glob("model-*.safetensors"))) > 1
    plain = fewbits.from_pretrained(out, device_map="cpu")
    quantized = fewbits.from_pretrained(out, "int8", device_map="cpu")
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    ids = torch.frombuffer(bytearray(text.read_bytes()[-64:]), dtype=torch.uint8).long()[None] + 3
    with torch.no_grad():
        losses = [model(input_ids=ids, labels=ids).loss.item() for model in (plain, quantized)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_gpt2_xl(tmp_path: Path) -> None:
    sizes = {"layers": 2, "embd": 128, "vocab": 300, "block": 32}
    flags = [part for name, value in sizes.items() for part in (f"--{name}", value)]
    common = ("--heads", 2, "--device", "cpu", "--tokens", 2, "--cache", tmp_path / "weights")
    text = run(tmp_path, "gpt2_xl.py", *flags, *common, "--json", "out.json")
    result = json.loads((tmp_path / "out.json").read_text())
    runs = result["runs"]
    expected = {
        "int8": gpt_bytes(*sizes.values(), int8),
        "nf4-dq": gpt_bytes(*sizes.values(), nf4_dq),
        "nf4-dq+int8-ends": gpt_bytes(*sizes.values(), nf4_dq, int8),
    }
    assert {name: run["parameter_bytes"] for name, run in runs.items()} == expected
    for run_ in runs.values():
        assert run_["buffer_bytes"] == 2 * 32 * 32 * 4
        assert run_["parameters"] == gpt_bytes(*sizes.values(), plain16) // 2
        assert 0 < run_["host_peak_bytes_loading"] <= run_["host_peak_bytes"] <= run_["parameter_bytes"] + 1_500_000_000
        assert len(run_["tokens"]) == 2
        assert run_["missed"] == []
    assert result["torch"] == torch.__version__
    assert "MISSED" not in text
    written = sorted((tmp_path / "weights").iterdir())
    assert sum(f.stat().st_size for f in written if f.suffix == ".safetensors") > 4 * runs["int8"]["parameters"]


def test_gpt2_xl_targets_follow_from_the_shapes() -> None:
    """The sizes that the full run is held to, which take too long to measure here."""
    xl = (48, 1600, 50257, 1024)
    gib = [gpt_bytes(*xl, int8) / 2**30, gpt_bytes(*xl, nf4_dq) / 2**30, gpt_bytes(*xl, nf4_dq, int8) / 2**30]
    assert gib[0] <= 1.70
    assert gib[1] <= 1.03
    assert gib[2] <= 0.88


def test_notebook(tmp_path: Path) -> None:
    """Its code cells, one after the other, at a small size."""
    import nbformat

    notebook = nbformat.read(EXAMPLES / "gpt2_xl.ipynb", as_version=4)
    nbformat.validate(notebook)
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert "N_LAYER = 48" in cells[0]
    cells[0] = "N_LAYER, N_HEAD, N_EMBD, VOCAB_SIZE, BLOCK_SIZE = 2, 2, 128, 300, 32"
    (tmp_path / "notebook.py").write_text("\n\n".join(cells))
    text = run(tmp_path, tmp_path / "notebook.py")
    totals = [int(n.replace(",", "")) for n in re.findall(r"^total +[\d,]+ +([\d,]+)", text, re.MULTILINE)]
    sizes = (2, 128, 300, 32)
    assert totals == [gpt_bytes(*sizes, int8), gpt_bytes(*sizes, nf4_dq), gpt_bytes(*sizes, nf4_dq, int8)]
    assert "the same outputs, bit for bit: True" in text


# ------------------------------------------------------------------------------------------------- fine-tuning


@pytest.mark.parametrize("way", [[], ["--trainer"]], ids=["loop", "trainer"])
def test_finetuning(way, tmp_path):
    """By a plain loop and by transformers' Trainer; the adapter and the merged model are there to be used."""
    from peft import PeftModel

    text = EXAMPLES.parent / "docs" / "guide.md"
    printed = run(
        tmp_path, "finetune.py", text, "--steps", 4, "--batch", 2, "--out", "adapter", "--merge", "merged", *way
    )
    before, after = map(float, re.search(r"([\d.]+) before, ([\d.]+) after", printed).groups())
    assert after < 0.98 * before
    merged = float(re.search(r"merged in 16 bits: ([\d.]+)", printed)[1])
    assert abs(merged - after) < 0.01 * after
    assert float(re.search(r"quantized again: ([\d.]+)", printed)[1]) < before
    base = fewbits.from_pretrained(EXAMPLES.parent / "models" / "bytellama", "nf4", device_map="cpu")
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    whole = fewbits.from_pretrained(tmp_path / "merged", device_map="cpu")
    ids = torch.arange(40, 72)[None]
    with torch.no_grad():
        one, two = adapted(input_ids=ids).logits.float(), whole(input_ids=ids).logits.float()
    assert (one - two).norm() < 0.05 * two.norm()  # the merged weights are rounded to bf16


def test_qlora_learns_what_lora_learns(monkeypatch):
    """On text of another kind than the model was trained on: within 1 % of LoRA on the unquantized model."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import finetune

    training, kept = finetune.read_windows(sorted((ROOT / "src" / "fewbits").rglob("*.py")))
    kept = kept[:24]
    found = {}
    for format in (None, "nf4", "int8"):
        model = finetune.with_adapter(format, "cpu")
        before = finetune.bits_per_byte(model, kept)
        finetune.train(model, training, 16, 4, 3e-3)
        found[format] = finetune.bits_per_byte(model, kept)
        assert found[format] < 0.8 * before
    for format in ("nf4", "int8"):
        assert abs(found[format] - found[None]) <= 0.01 * found[None], found
