"""fewbits loads any PyTorch model in 8 or 4 bits with a few lines, on a GPU or without one.

>>> model = fewbits.from_pretrained("path/or/hub-id", "nf4")          # a transformers model
>>> model = fewbits.load(build_my_model, "weights.safetensors", "int8")  # any nn.Module
>>> fewbits.save(model, "folder")
"""

from fewbits.config import QuantizationConfig
from fewbits.errors import FewbitsError, FewbitsWarning
from fewbits.inplace import quantize
from fewbits.load import load
from fewbits.meta import init_empty_weights
from fewbits.plan import Plan
from fewbits.pretrained import from_pretrained
from fewbits.preview import plan
from fewbits.save import save
from fewbits.summary import summary
from fewbits.tensor import QuantTensor

__version__ = "0.1.0"

__all__ = [
    "FewbitsError",
    "FewbitsWarning",
    "Plan",
    "QuantTensor",
    "QuantizationConfig",
    "from_pretrained",
    "init_empty_weights",
    "load",
    "plan",
    "quantize",
    "save",
    "summary",
]
