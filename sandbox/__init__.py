"""sandbox: understand, change and measure exact attention on GPUs."""

from . import target  # first: it chooses GPU or simulator before numba is imported
from .autograd import attention
from .fp8 import attention_fp8, quantize_fp8, transpose_v
from .mask import Mask
from .problem import Problem
from .quantize import Quantized

__all__ = [
    "Mask", "Problem", "Quantized", "attention", "attention_fp8", "quantize_fp8", "target", "transpose_v", "variants",
]  # fmt: skip
__version__ = "0.1.0"


def variants(direction: str | None = None) -> list[str]:
    """The names of all kernels, or of those of one direction: 'fwd', 'bwd', 'softmax'."""
    from . import catalog

    return list(catalog.variants(direction))
