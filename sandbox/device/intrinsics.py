"""What numba-cuda has no public way for: tiles in dynamic shared memory, 16-byte loads from them, ex2.  [GPU only]"""

from __future__ import annotations

from llvmlite import ir
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


@intrinsic
def quad(typingctx, tile, r, k):
    """(tile[r, k], …, tile[r, k + 3]) in one 16-byte load; k and tile's leading dimension are multiples of 4."""

    def codegen(context, builder, sig, args):
        array = arrayobj.make_array(sig.args[0])(context, builder, args[0])
        row, column = (context.cast(builder, x, t, types.intp) for x, t in zip(args[1:], sig.args[1:]))
        ld = builder.extract_value(array.shape, 1)
        pointer = builder.gep(array.data, [builder.add(builder.mul(row, ld), column)])
        vector = ir.VectorType(ir.FloatType(), 4)
        loaded = builder.load(builder.bitcast(pointer, vector.as_pointer()), align=16)
        lanes = [builder.extract_element(loaded, ir.Constant(ir.IntType(32), u)) for u in range(4)]
        return context.make_tuple(builder, sig.return_type, lanes)

    return types.UniTuple(types.float32, 4)(tile, r, k), codegen


quad.fingerprint = "quad"


@intrinsic
def adjacent(typingctx, X, n, c):
    """X[n, c] of a global array whose columns lie side by side: a row's addresses then differ by constants."""

    def codegen(context, builder, sig, args):
        array = arrayobj.make_array(sig.args[0])(context, builder, args[0])
        row, column = (context.cast(builder, x, t, types.intp) for x, t in zip(args[1:], sig.args[1:]))
        kind = array.data.type.pointee
        data = builder.addrspacecast(array.data, ir.PointerType(ir.IntType(8), 1))
        start = builder.gep(data, [builder.mul(row, builder.extract_value(array.strides, 0))])
        element = builder.gep(builder.bitcast(start, ir.PointerType(kind, 1)), [column])
        return context.data_model_manager[sig.return_type].from_data(builder, builder.load(element))

    return X.dtype(X, n, c), codegen


adjacent.fingerprint = "adjacent"


@intrinsic
def ex2(typingctx, x):
    """2 to the x, ex2.approx.ftz: one instruction, 2 ulp; results below 2⁻¹²⁶ are 0."""

    def codegen(context, builder, sig, args):
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType()])
        return builder.call(ir.InlineAsm(kind, "ex2.approx.ftz.f32 $0, $1;", "=f,f"), args)

    return types.float32(types.float32), codegen


ex2.fingerprint = "ex2"
