"""Tools of a kernel: tiles in shared memory and registers, their products, masks, the online softmax, the launch.

Everything a kernel file needs comes from here; the same kernel source runs on a GPU and on the simulator.
"""

from .launch import Launch, scratch, zeros
from .scalar import conversions, device_function
from .softmax import Softmax
from .tiles import Blocks, Shared, Threads
from .visit import Visit

__all__ = [
    "Blocks", "Launch", "Shared", "Softmax", "Threads", "Visit", "conversions", "device_function", "scratch",
    "zeros",
]  # fmt: skip
