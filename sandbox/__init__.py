"""sandbox: understand, change and measure exact attention on GPUs."""

from . import target  # first: it chooses GPU or simulator before numba is imported
from .autograd import attention
from .mask import Mask
from .problem import Problem

__all__ = ["Mask", "Problem", "attention", "target", "variants"]
__version__ = "0.1.0"


def variants(direction: str | None = None) -> list[str]:
    """The names of all kernels, or of those of one direction: 'fwd', 'bwd', 'softmax'."""
    from . import catalog

    return list(catalog.variants(direction))
