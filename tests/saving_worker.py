"""A process that saves models when told to, and can be killed while it does; run by test_atomic.py.

Importing torch takes seconds, so one process imports it and forks another for each save. Commands come in as lines of
JSON, and for each a line goes out that says how it ended.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fewbits
from fewbits import atomic

FORMATS = {1: "nf4", 2: "int8", 3: "fp4"}  # by the seed of the model
_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod"}


class Config:
    """As much of a transformers configuration as saving asks for."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def to_diff_dict(self) -> dict[str, Any]:
        return vars(self)

    def save_pretrained(self, folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(vars(self)))


def empty(seed: int) -> nn.Module:
    """A model of its own for every seed, down to its width."""
    width = 32 + 32 * seed
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(3)), nn.Linear(width, 5))


@functools.cache
def model(seed: int) -> nn.Module:
    """That model with values; its configuration says which it is."""
    torch.manual_seed(seed)
    made = fewbits.quantize(empty(seed), FORMATS[seed])
    made.config = Config(seed)  # type: ignore[assignment]
    return made


def save(command: dict[str, Any]) -> dict[str, Any]:
    """Save a model as the command says, which may be: until just before the n-th change to the disk."""
    if command.get("fallback"):
        atomic.exchange = lambda first, second: False
    if "file_size" in command:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that the write fails instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (command["file_size"],) * 2)
    changes: list[str] = []

    def count(event: str, args: tuple[Any, ...]) -> None:
        if event in _CHANGES or (event == "open" and "w" in str(args[1])):
            if len(changes) == command.get("kill_before"):
                os.kill(os.getpid(), signal.SIGKILL)
            changes.append(event)

    sys.addaudithook(count)
    try:
        fewbits.save(
            model(command["seed"]),
            command["folder"],
            max_shard_size=command["limit"],
            safe_serialization=command["safe"],
            progress=False,
        )
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {"changes": changes}


def main() -> None:
    torch.set_num_threads(1)  # threads do not survive a fork
    for seed in FORMATS:
        model(seed)
    for line in sys.stdin:
        command = json.loads(line)
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(writing, json.dumps(save(command)).encode())
            os._exit(0)
        os.close(writing)
        if "kill_after" in command:
            time.sleep(command["kill_after"])
            os.kill(pid, signal.SIGKILL)
        with open(reading) as pipe:
            answer = pipe.read()
        _, status = os.waitpid(pid, 0)
        print(answer or json.dumps({"signal": os.WTERMSIG(status)}), flush=True)


if __name__ == "__main__":
    main()
