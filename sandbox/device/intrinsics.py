"""What numba-cuda has no public way for: two-dimensional views of dynamic shared memory.  [GPU only]"""

from __future__ import annotations

from numba.cuda import types
from numba.cuda.extending import intrinsic
from numba.cuda.np import arrayobj


def tile_view(offset: int, shape: tuple[int, ...]):
    """A function smem -> C-ordered view of that shape, `offset` elements into the one-dimensional smem."""

    @intrinsic
    def view(typingctx, smem):
        tile = types.Array(smem.dtype, len(shape), "C")

        def codegen(context, builder, sig, args):
            def constant(n):
                return context.get_constant(types.intp, n)

            base = arrayobj.make_array(smem)(context, builder, args[0])
            out = arrayobj.make_array(tile)(context, builder)
            itemsize = context.get_abi_sizeof(context.get_data_type(tile.dtype))
            strides = [itemsize * (shape[1] if len(shape) == 2 and axis == 0 else 1) for axis in range(len(shape))]
            arrayobj.populate_array(
                out,
                data=builder.gep(base.data, [constant(offset)]),
                shape=[constant(n) for n in shape],
                strides=[constant(n) for n in strides],
                itemsize=constant(itemsize),
                meminfo=None,
            )
            return out._getvalue()

        return tile(smem), codegen

    view.fingerprint = ("tile_view", offset, shape)
    return view
