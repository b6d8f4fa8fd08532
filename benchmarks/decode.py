"""A model's speed on a GPU, end to end: 8 layers of Llama 3 8B's shape, fewbits beside torch's bf16 and bitsandbytes.

    PYTHONPATH=src:.peers python benchmarks/decode.py
    PYTHONPATH=src:.peers python benchmarks/decode.py --layers 2 --only bf16,fewbits-nf4
    PYTHONPATH=src:.peers python benchmarks/decode.py --eager
    PYTHONPATH=src:.peers python benchmarks/decode.py --small

``--small`` runs the same on the CPU with a tiny model and no graphs: a trial of the script, whose times mean nothing.
``--eager`` measures the step without a graph alone, and writes nothing.

Weights are random. What is timed, in one process:

* a step that decodes one token for a text, with a static key-value cache, by the host's clock until the GPU is done:
  first of all, and all contenders in turns, each time in a new order, since a host is slower after some work than after
  other;
* the same for each of B texts as one CUDA graph: GPU time, here and below one contender after the other;
* the same step of the model compiled (``torch.compile``), as a graph: what is not a linear layer then takes less;
* a prefill of 4096 tokens without a graph, with logits for the last one: GPU time.

Everybody leaves the head in bf16. bitsandbytes' int8 waits for the GPU in the middle of a call when its threshold is
not 0, which no graph can hold: its graph has threshold 0, all else the default of 6. ``read`` is the bytes of weights
that a step reads (all but the embeddings), as a share of bf16's.

``all-else`` is the model without its linear layers, but for the head. What it takes, and reading the weights of the
linear layers at the speed of a copy, is the least that a step can take (``floor``), however fast products are.

Writes ``benchmarks/results/decode-cuda.json``.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import logging
import math
import random
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from contenders_cuda import peer_4bit, peer_8bit
from llama import llama_config, synchronize
from machine import facts
from timing_cuda import after_failure, message
from torch import Tensor, nn

import fewbits
from fewbits.errors import FewbitsWarning

BATCHES = (1, 8, 32)
CACHE, POSITION = 256, 128  # tokens that the cache holds; those that are in it before the step
REPLAYS, PREFILLS = 20, 5
EAGER_TURNS = 7
STD = 0.01  # of weights. With 0.02 most columns that a prefill gives to down_proj hold outliers, as in no trained model
LEAST_COSINE = 0.98  # of the logits of the two tools' nf4
STEPS = {
    f"{kind}_{b}": bound for kind in ("step", "compiled") for b, bound in zip(BATCHES, (0.6, 0.7, 0.9), strict=True)
}
TARGETS: dict[str, dict[str, float]] = {  # times of bf16's, at most
    "fewbits-nf4": {**STEPS, "prefill": 1.08},
    "fewbits-int8": {**STEPS, "prefill": 1.0},
}


# ------------------------------------------------------------------------------------------------- the contenders


def replaced(model: nn.Module, make: Callable[[Tensor], nn.Module]) -> nn.Module:
    """The model with its linear layers, but for the head, made anew from their weights, one at a time."""
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, make(module.weight.data))
    return model


class Nothing(nn.Module):
    """In the place of a linear layer: zeros, which no kernel has to write."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("zeros", weight.new_zeros(len(weight)))

    def forward(self, x: Tensor) -> Tensor:
        return self.zeros.expand(*x.shape[:-1], -1)


CONTENDERS: dict[str, Callable[[nn.Module], nn.Module]] = {  # from a model of their own, which they may change
    "bf16": lambda model: model,
    "all-else": lambda model: replaced(model, Nothing),
    "bnb-nf4": lambda model: replaced(model, lambda w: peer_4bit(w, double_quant=True)),
    "fewbits-nf4": lambda model: fewbits.quantize(model, "nf4", double_quant=True, progress=False),
    "fewbits-int8": lambda model: fewbits.quantize(model, "int8", progress=False),
    "bnb-int8": lambda model: replaced(model, lambda w: peer_8bit(w, threshold=6.0)),
}


def set_threshold(model: nn.Module, threshold: float) -> None:
    """Of bitsandbytes' int8 layers, if there are any."""
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt":
            module.state.threshold = threshold


def make_model(small: bool, layers: int, device: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    config = llama_config("small" if small else "8b")
    config.num_hidden_layers, config.initializer_range = layers, STD
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    return model.eval()


# ------------------------------------------------------------------------------------------------- measuring


class Step:
    """One token for each text of a batch; every tensor is made once, so that a graph can hold a call."""

    def __init__(self, model: nn.Module, batch: int, device: str) -> None:
        from transformers import StaticCache

        config: Any = model.config
        heads, head_dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        self.cache = StaticCache(config=config, max_cache_len=CACHE)
        self.cache.early_initialization(batch, heads, head_dim, torch.bfloat16, torch.device(device))
        self.rewind()
        # a mask of four dimensions is taken as it is: made from fewer, it might wait for the GPU
        mask = torch.arange(CACHE, device=device) <= POSITION
        position = torch.tensor([POSITION], device=device)
        self._model = model
        self._inputs: dict[str, Any] = {
            "input_ids": torch.arange(batch, device=device)[:, None],
            "attention_mask": mask.expand(batch, 1, 1, CACHE),
            "position_ids": position.expand(batch, 1),
            "cache_position": position,  # for those releases of transformers whose cache does not count by itself
            "past_key_values": self.cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }

    def __call__(self) -> Tensor:
        return self._model(**self._inputs).logits

    def rewind(self) -> None:
        """Every call appends to the cache."""
        for layer in self.cache.layers:
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length.fill_(POSITION)


def check_finite(logits: Tensor) -> None:
    if not logits.isfinite().all():
        raise ArithmeticError("logits are not finite")


def host_ms(call: Callable[[], Tensor], before: Callable[[], None], rounds: int, device: str) -> float:
    """Median by the host's clock, until the GPU is done."""
    times = []
    for _ in range(rounds + 3):
        before()
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[3:])


def gpu_ms(call: Callable[[], object], before: Callable[[], None], rounds: int) -> float:
    """Median between events. Nothing waits in between, so that the host is ahead of the GPU if it can be."""
    marks = []
    for _ in range(rounds + 2):
        before()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        marks.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in marks[2:])


def compiled(model: nn.Module) -> Any:
    """For one batch size at a time: code for any would be slower."""
    torch.compiler.reset()
    return torch.compile(model, dynamic=False)


def graph_ms(step: Step) -> float:
    """Median of a graph's replays; its last logits are checked."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(graph, stream=stream):
            logits = step()
        found = gpu_ms(graph.replay, step.rewind, REPLAYS)
        check_finite(logits)
        return found
    finally:
        graph.reset()


def measure(model: nn.Module, tokens: Tensor, row: dict[str, Any], compiling: bool) -> Tensor | None:
    """Fill a row, and return the last token's logits of the prefill. What fails is noted, and the rest goes on."""
    device, cuda = str(tokens.device), tokens.is_cuda
    last: list[Tensor] = []

    def prefill() -> Tensor:
        return model(input_ids=tokens, use_cache=True, logits_to_keep=1).logits

    def step_in_a_graph(batch: int, make: Callable[[nn.Module], Any] = lambda model: model) -> float:
        step = Step(make(model), batch, device)
        if cuda:
            return graph_ms(step)
        check_finite(step())
        return host_ms(step, step.rewind, 3, device)

    def prefills() -> float:
        logits = prefill()
        check_finite(logits)
        last.append(logits.flatten().float())
        if cuda:
            return gpu_ms(prefill, lambda: None, PREFILLS)
        return host_ms(prefill, lambda: None, 1, device)

    parts: dict[str, Callable[[], float]] = {f"step_{b}": lambda b=b: step_in_a_graph(b) for b in BATCHES}
    parts["prefill"] = prefills
    if compiling:
        parts |= {f"compiled_{b}": lambda b=b: step_in_a_graph(b, compiled) for b in BATCHES}
    for name, part in parts.items():
        set_threshold(model, 0.0 if name.startswith(("step", "compiled")) else 6.0)
        try:
            row["ms"][name] = part()
        except Exception as error:  # a failure is a result
            row["errors"][name] = message(error)
            if cuda:
                after_failure()
    return last[0] if last else None


def eager_in_turns(models: dict[str, nn.Module], rows: dict[str, dict[str, Any]], device: str) -> None:
    """Fill in median milliseconds of a step as it is called, by model. What fails is noted, and the rest goes on."""
    steps: dict[str, Step] = {}
    times: dict[str, list[float]] = {name: [] for name in models}
    for name, model in models.items():
        set_threshold(model, 6.0)
        try:
            step = Step(model, 1, device)
            step()
            steps[name] = step
        except Exception as error:  # a failure is a result
            rows[name]["errors"]["eager_1"] = message(error)
            if device == "cuda":
                after_failure()
    order, shuffled = list(steps), random.Random(0)
    for _ in range(EAGER_TURNS):
        shuffled.shuffle(order)
        for name in order:
            times[name].append(host_ms(steps[name], steps[name].rewind, 5, device))
    for name in steps:
        rows[name]["ms"]["eager_1"] = statistics.median(times[name])


def copy_speed() -> float:
    """Bytes a second that a copy on the GPU reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / gpu_ms(lambda: target.copy_(source), lambda: None, 10) * 1e3


# ------------------------------------------------------------------------------------------------- the run


def compare(row: dict[str, Any], bf16: dict[str, Any] | None, rest: dict[str, Any] | None, speed: float) -> None:
    """Add what a row is beside bf16's, the least that its steps could be, and whether it meets its targets."""
    if bf16 is not None:
        if rest is not None and row is not rest and row["read_bytes"] is not None:
            reading = (row["read_bytes"] - rest["read_bytes"]) / speed * 1e3
            steps = [name for name in rest["ms"] if name.startswith("step") and name in bf16["ms"]]
            row["floor_of_bf16"] = {name: (rest["ms"][name] + reading) / bf16["ms"][name] for name in steps}
        row["of_bf16"] = {name: ms / bf16["ms"][name] for name, ms in row["ms"].items() if name in bf16["ms"]}
        if row["read_bytes"] is not None and bf16["read_bytes"]:
            row["read_of_bf16"] = row["read_bytes"] / bf16["read_bytes"]
    row["targets"] = {
        name: {"at_most": bound, "met": row["of_bf16"][name] <= bound if name in row["of_bf16"] else None}
        for name, bound in TARGETS.get(row["name"], {}).items()
        if name in row["ms"] or name in row["errors"]
    }


COLUMNS = {
    **{f"step_{b}": f"step B={b}" for b in BATCHES}, "eager_1": "eager B=1", "prefill": "prefill",
    **{f"compiled_{b}": f"compiled B={b}" for b in BATCHES},
}  # fmt: skip


def show(row: dict[str, Any]) -> None:
    cells = []
    for name in COLUMNS:
        ms, ratio = row["ms"].get(name), row["of_bf16"].get(name)
        text = "-" if ms is None else f"{ms:.3f}" + (f" {ratio:.2f}x" if ratio is not None else "")
        if (target := row["targets"].get(name)) and target["met"] is not None:
            text += f" {'ok' if target['met'] else 'MISSED'} {target['at_most']:g}"
        if (floor := row.get("floor_of_bf16", {}).get(name)) is not None:
            text += f" floor {floor:.2f}"
        cells.append(f"{text:>30}")
    memory, read = row["weight_bytes"], row.get("read_of_bf16")
    tail = ("-" if memory is None else f"{memory / 2**30:.2f}"), ("-" if read is None else f"{read:.2f}x")
    print(f"{row['name']:<13}{''.join(cells)}{tail[0]:>8}{tail[1]:>8}", flush=True)
    for name, error in row["errors"].items():
        print(f"    {name}: {error}")


def cosine(a: Tensor | None, b: Tensor | None) -> float | None:
    return None if a is None or b is None else torch.cosine_similarity(a.double(), b.double(), dim=0).item()


def run(args: argparse.Namespace, result: dict[str, Any], device: str, write: Callable[[], None]) -> None:
    """Measure, print, fill ``result`` and write it as it goes."""

    def allocated() -> int:
        gc.collect()
        if device == "cpu":
            return 0
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()

    start = allocated()
    base = make_model(args.small, args.layers, device)
    embeddings = base.get_input_embeddings().weight.nbytes
    vocabulary, length = base.config.vocab_size, 64 if args.small else 4096
    tokens = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(1)).to(device)
    result |= {"layers": args.layers, "tokens": length, "cache": CACHE, "position": POSITION}
    models: dict[str, nn.Module] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name in args.only:
        row: dict[str, Any] = {"name": name, "weight_bytes": None, "read_bytes": None}
        rows[name] = row | {"ms": {}, "of_bf16": {}, "errors": {}}
        before = start if name == "bf16" else allocated()
        try:
            models[name] = CONTENDERS[name](base if name == "bf16" else copy.deepcopy(base))
            if device == "cuda":
                rows[name]["weight_bytes"] = allocated() - before
                rows[name]["read_bytes"] = rows[name]["weight_bytes"] - embeddings
        except Exception as error:  # a failure is a result
            rows[name]["errors"]["all"] = message(error)
            if device == "cuda":
                after_failure()
    del base
    eager_in_turns(models, rows, device)
    if args.eager:
        for name, row in rows.items():
            print(f"{name:<13} eager B=1 {row['ms'].get('eager_1', math.nan):.2f} ms", *row["errors"].values())
        return
    print(f"{result['device']}, {args.layers} layers; ms, x of bf16's, and the target; weights in GiB")
    print(f"{'':<13}{''.join(f'{title:>30}' for title in COLUMNS.values())}{'GiB':>8}{'read':>8}")
    logits: dict[str, Tensor | None] = {}
    bf16: dict[str, Any] | None = None
    rest: dict[str, Any] | None = None
    result["copy_bytes_per_second"] = speed = copy_speed() if device == "cuda" else 1e10
    for name, row in rows.items():
        model = models.pop(name, None)
        if model is not None:
            compiling = args.compile and name != "all-else"  # whose layers a compiler drops: no result needs them
            logits[name] = measure(model, tokens, row, compiling)
        del model
        bf16, rest = row if name == "bf16" else bf16, row if name == "all-else" else rest
        row["cosine_to_bf16"] = None if row is rest else cosine(logits.get(name), logits.get("bf16"))
        compare(row, bf16, rest, speed)
        result["rows"].append(row)
        write()
        show(row)
    result["nf4_cosine"] = found = cosine(logits.get("fewbits-nf4"), logits.get("bnb-nf4"))
    if found is not None:
        verdict = "ok" if found > LEAST_COSINE else "MISSED"
        print(f"\nlogits of fewbits-nf4 and bnb-nf4: cosine {found:.5f}, {verdict} {LEAST_COSINE}")
    beside = {row["name"]: row["cosine_to_bf16"] for row in result["rows"] if row["cosine_to_bf16"] is not None}
    print("cosine to bf16's: " + ", ".join(f"{name} {value:.5f}" for name, value in beside.items()))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--only", default=",".join(CONTENDERS), help="contenders: %(default)s")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="compiled steps as well")
    parser.add_argument("--eager", action="store_true", help="the step as it is called alone; writes nothing")
    parser.add_argument("--small", action="store_true", help="a trial on the CPU; writes nothing")
    args = parser.parse_args(argv)
    chosen = args.only.split(",")
    if unknown := sorted(set(chosen) - set(CONTENDERS)):
        parser.error(f"no such contender: {', '.join(unknown)}")
    args.only = [name for name in CONTENDERS if name in chosen]  # bf16 first, since the others are put beside it
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    warnings.simplefilter("ignore")
    warnings.simplefilter("default", FewbitsWarning)  # a slower kernel than ours for the GPU at hand
    logging.disable(logging.WARNING)
    device = "cpu" if args.small else "cuda"
    began = time.perf_counter()
    result: dict[str, Any] = {**facts(device), "complete": False, "rows": []}

    def write() -> None:
        result["seconds"] = time.perf_counter() - began
        if not args.small:
            (Path(__file__).parent / "results" / "decode-cuda.json").write_text(json.dumps(result, indent=1) + "\n")

    with torch.no_grad():
        run(args, result, device, write)
    if not args.eager:
        result["complete"] = True
        write()
    print(f"{time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
