"""What multiplies: an experiment takes the kernels of one unit, 'fma', one number at a time, or 'tensor'."""

from __future__ import annotations

import click

from sandbox import catalog

FMA, TENSOR = "fma", "tensor"
UNIT = click.option("--unit", type=click.Choice([FMA, TENSOR]), help="What multiplies; fma in fp32, else tensor.")
DTYPE = click.option("--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), help="fp32; bf16 on the tensor cores.")


def settle(unit: str | None, dtype: str | None, variants=()) -> tuple[str, str]:
    """(unit, dtype): each as it is given, or else as the other one, or the variants, ask for."""
    kernels = [catalog.find(name) for name in variants or ()]
    if kernels and unit is None:
        unit = TENSOR if all(kernel.unit == TENSOR for kernel in kernels) else FMA
        dtype = dtype or ("fp32" if all("fp32" in kernel.dtypes for kernel in kernels) else "bf16")
    unit = unit or (FMA if dtype in (None, "fp32") else TENSOR)
    dtype = dtype or ("fp32" if unit == FMA else "bf16")
    if unit == TENSOR and dtype == "fp32":
        raise ValueError("--dtype fp32: the kernels of --unit tensor take fp16 and bf16")
    return unit, dtype
