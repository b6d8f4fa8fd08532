"""Small tensors that stay on a device for the life of the process: tables of values, counters that return to zero.

On a GPU they lie in memory from the driver, not from torch's allocator. One that is first wanted while a CUDA graph is
warmed up or captured would else lie in that graph's pool, in which ``torch.compile(mode="reduce-overhead")`` allows
nothing that outlives the graph, and would be written when the graph first runs, which is too late for others.
"""

from __future__ import annotations

import torch
from torch import Tensor


def constant(values: Tensor, device: torch.device) -> Tensor:
    """``values``, on the CPU, as a tensor on ``device`` that no stream need wait for. It is never freed."""
    if device.type != "cuda" or torch.version.cuda is None or not values.numel():
        return values.to(device)
    from fewbits.kernels.nvrtc import resident  # not before a GPU is used

    index = torch.cuda.current_device() if device.index is None else device.index
    values = values.contiguous()
    at = resident(values.data_ptr(), values.nbytes, index)
    storage = torch._C._construct_storage_from_data_pointer(at, torch.device("cuda", index), values.nbytes)
    with torch.inference_mode(False):
        return torch.empty(0, dtype=values.dtype, device=torch.device("cuda", index)).set_(
            storage, 0, values.shape, values.stride()
        )
