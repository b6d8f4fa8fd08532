"""The command line, through its own entry point."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import fewbits
from fewbits.cli import app

MODEL = Path(__file__).parent.parent / "models" / "bytellama"


def _run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "nf4"
    code, said = _run("quantize", MODEL, folder, "--double-quant", "--device", "cpu", "--max-shard-size", "2MB")
    assert code == 0, said
    assert "10,409,280 parameters" in said
    return folder


def test_quantize_is_what_the_library_does(quantized):
    ours = fewbits.from_pretrained(MODEL, "nf4", double_quant=True, device_map="cpu").state_dict()
    saved = fewbits.from_pretrained(quantized, device_map="cpu").state_dict()
    assert set(ours) == set(saved)
    assert all(torch.equal(ours[key], saved[key]) for key in ours)
    assert (quantized / "tokenizer_config.json").read_bytes() == (MODEL / "tokenizer_config.json").read_bytes()
    assert len(list(quantized.glob("*.safetensors"))) > 1


def test_inspect_counts_from_headers(quantized):
    code, said = _run("inspect", quantized)
    assert code == 0
    linears = 8 * (4 * 320 * 320 + 3 * 320 * 896)
    assert f"{linears:,}" in said
    assert "nf4-dq" in said
    assert f"{10_409_280 - linears:,}" in said
    code, said = _run("inspect", quantized, "--names")
    assert "model.layers.7.mlp.down_proj.weight" in said
    assert "320×896" in said


def test_generate_goes_on_from_the_prompt(quantized):
    code, said = _run("generate", quantized, "The film was ", "--max-new-tokens", 8, "--device", "cpu")
    assert code == 0, said
    assert said.startswith("The film was ")
    assert len(said.strip()) > len("The film was")


def test_bad_input_is_one_message(tmp_path):
    for arguments in (
        ("inspect", tmp_path / "nothing.safetensors"),
        ("quantize", tmp_path, tmp_path / "out"),
        ("quantize", MODEL, tmp_path / "out", "--skip", "lm_haed"),
        ("quantize", MODEL, tmp_path / "out", "--block-size", 65),
        ("generate", tmp_path, "x"),
    ):
        code, said = _run(*arguments)
        assert code == 1, arguments
        assert said.startswith("error: ")
        assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_plan_says_what_fits_where(quantized, tmp_path):
    code, said = _run("plan", MODEL, "--format", "nf4", "--max-memory", "0=6MB", "--max-memory", "cpu=8MB",
                      "--save", tmp_path / "plan.json")  # fmt: skip
    assert code == 0, said
    plan = fewbits.plan(MODEL, "nf4", max_memory={0: "6MB", "cpu": "8MB"})
    assert fewbits.Plan.load(tmp_path / "plan.json").devices == plan.devices
    assert {"cuda:0", "cpu"} <= set(plan.devices.values())
    assert f"{plan.total:,}" in said
    code, said = _run("plan", quantized)  # which says itself what it is
    assert code == 0
    assert f"{fewbits.plan(MODEL, 'nf4', double_quant=True).total:,}" in said


def test_generating_from_disk(quantized):
    from_memory = _run("generate", quantized, "The film was ", "--max-new-tokens", 4, "--device", "cpu")
    assert from_memory[0] == 0
    assert _run("generate", quantized, "The film was ", "--max-new-tokens", 4, "--device", "disk") == from_memory
