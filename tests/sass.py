"""What a binary is made of: its instructions, disassembled."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
from pathlib import Path


def nvdisasm() -> str | None:
    """The disassembler of the package nvidia-cuda-nvdisasm, else of a toolkit."""
    for folder in site.getsitepackages():
        for tool in Path(folder, "nvidia").glob("cu*/bin/nvdisasm"):
            if os.access(tool, os.X_OK):
                return str(tool)
    return shutil.which("nvdisasm")


def disassembled(cubin: bytes, folder: Path) -> str:
    (file := folder / "kernel.cubin").write_bytes(cubin)
    return subprocess.run([nvdisasm(), "-c", str(file)], capture_output=True, text=True, check=True).stdout
