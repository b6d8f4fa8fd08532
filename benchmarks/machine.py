"""What a result was measured with: the versions, the machine, and the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import fewbits


def facts(device: str) -> dict[str, Any]:
    """For the head of a result. Where there is no git repository, ``FEWBITS_COMMIT`` names the commit."""
    commit = os.environ.get("FEWBITS_COMMIT")
    if commit is None:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        commit = done.stdout.strip() or None
    cuda = torch.device(device).type == "cuda"
    return {
        "fewbits": fewbits.__version__,
        "commit": commit,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "threads": torch.get_num_threads(),
    }
