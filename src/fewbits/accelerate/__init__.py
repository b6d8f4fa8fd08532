"""The names of Hugging Face Accelerate that its "bitsandbytes integration" recipe uses, over fewbits.

Change ``accelerate`` to ``fewbits.accelerate`` in the import lines and the recipe runs: also where Accelerate's own
stops, in using the empty model again, saving 4-bit models, and running without a GPU.
"""

from fewbits.accelerate.accelerator import Accelerator
from fewbits.meta import init_empty_weights, init_on_device

__all__ = ["Accelerator", "init_empty_weights", "init_on_device"]
