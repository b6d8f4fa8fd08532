"""A model of one's own in 8 and 4 bits: no transformers, no checkpoint layout, any ``nn.Module``.

    python examples/bring_your_own.py

The model tells noisy waves apart: a convolution, a transformer encoder and an MLP, trained here for some seconds. Then:
load it quantized from its ``.pt`` file, choose formats by name, quantize a model that is in memory, save, load again.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fewbits

CLASSES, LENGTH = 8, 128

# nn.TransformerEncoder's fused inference path takes raw weights, and those would all be dequantized for it; its layers
# one by one use the quantized weights as they are
torch.backends.mha.set_fastpath_enabled(False)


class WaveClassifier(nn.Module):
    """wave [B, 1, LENGTH] to logits [B, CLASSES]."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.patches = nn.Conv1d(1, width, kernel_size=8, stride=8)
        self.positions = nn.Parameter(torch.randn(LENGTH // 8, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, nhead=4, dim_feedforward=4 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2)
        self.classifier = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, CLASSES))

    def forward(self, wave: Tensor) -> Tensor:
        x = self.patches(wave).transpose(1, 2) + self.positions
        return self.classifier(self.encoder(x).mean(1))


def waves(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sines of CLASSES frequencies with random phase, in noise: waves [count, 1, LENGTH] and classes [count]."""
    labels = torch.randint(CLASSES, (count,), generator=generator)
    phase = 6.2832 * torch.rand(count, 1, generator=generator)
    time = torch.linspace(0, 6.2832, LENGTH)
    clean = torch.sin(time * (2 + labels[:, None]) + phase)
    return (clean + 0.5 * torch.randn(count, LENGTH, generator=generator))[:, None], labels


def train(model: nn.Module, generator: torch.Generator, steps: int = 300) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        wave, labels = waves(64, generator)
        loss = F.cross_entropy(model(wave), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """The share of 1,000 new waves that the model tells right."""
    wave, labels = waves(1000, torch.Generator().manual_seed(1))
    device = next(model.parameters()).device
    return (model.eval()(wave.to(device)).argmax(-1).cpu() == labels).float().mean().item()


def report(name: str, model: nn.Module) -> None:
    total = fewbits.summary(model).total
    print(f"{name:34} {total.nbytes:9,} bytes  {total.bits:5.2f} bits a parameter  accuracy {accuracy(model):.3f}")


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the products here are too small to be shared out
    original = WaveClassifier()
    train(original, torch.Generator().manual_seed(0))
    report("fp32", original)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder, "classifier.pt")
        torch.save(original.state_dict(), weights)

        # a factory and a file: the model is built without memory and its weights are quantized as they are read
        report("int8", fewbits.load(WaveClassifier, weights, "int8"))
        report("nf4", fewbits.load(WaveClassifier, weights, "nf4"))

        # by name: modules, whole or as a glob, and single parameters. By default linear layers are quantized and the
        # output head is not; nn.MultiheadAttention's in_proj_weight belongs to no linear layer, so it is named here
        overrides = {"encoder.layers.*.linear2": "int8", "classifier": None}
        overrides |= {f"encoder.layers.{i}.self_attn.in_proj_weight": "nf4" for i in range(2)}
        mixed = fewbits.load(WaveClassifier, weights, "nf4", double_quant=True, overrides=overrides)
        report("nf4-dq and int8, by name", mixed)
        print(f"\n{fewbits.summary(mixed)}\n")

        # saved in bitsandbytes' format; it says itself what it is, so loading it needs no format
        fewbits.save(mixed, Path(folder, "saved"))
        again = fewbits.load(WaveClassifier, Path(folder, "saved"))
        report("saved and loaded again", again)
        wave = waves(16, torch.Generator().manual_seed(2))[0].to(next(mixed.parameters()).device)
        with torch.no_grad():
            same = torch.equal(mixed.eval()(wave), again.eval()(wave))
        print(f"same outputs, bit for bit: {'yes' if same else 'NO'}")
        if not same:
            raise SystemExit(1)

    # a model that is in memory: in place, one parameter at a time
    fewbits.quantize(original, "nf4", double_quant=True)
    report("quantized in place", original)


if __name__ == "__main__":
    main()
