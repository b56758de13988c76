"""What numba-cuda has no public way for: tiles in dynamic shared memory, 16-byte accesses, copies, ex2.  [GPU only]"""

from __future__ import annotations

from llvmlite import ir

from .internals import arrayobj, intrinsic, types


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


def _element(context, builder, kind, array, indices, index_types):
    """Pointer to tile[r, k] of a C-ordered tile."""
    array = arrayobj.make_array(kind)(context, builder, array)
    row, column = (context.cast(builder, x, t, types.intp) for x, t in zip(indices, index_types))
    ld = builder.extract_value(array.shape, 1)
    return builder.gep(array.data, [builder.add(builder.mul(row, ld), column)])


def row_pointer(context, builder, kind, array, n, index_type):
    """Pointer to the first byte of row n of a strided array, in global memory."""
    array = arrayobj.make_array(kind)(context, builder, array)
    n = context.cast(builder, n, index_type, types.intp)
    data = builder.addrspacecast(array.data, ir.PointerType(ir.IntType(8), 1))
    return builder.gep(data, [builder.mul(n, builder.extract_value(array.strides, 0))])


FOUR = ir.VectorType(ir.FloatType(), 4)


@intrinsic
def quad(typingctx, tile, r, k):
    """(tile[r, k], …, tile[r, k + 3]) in one 16-byte load; k and tile's leading dimension are multiples of 4."""

    def codegen(context, builder, sig, args):
        pointer = _element(context, builder, sig.args[0], args[0], args[1:], sig.args[1:])
        loaded = builder.load(builder.bitcast(pointer, FOUR.as_pointer()), align=16)
        lanes = [builder.extract_element(loaded, ir.Constant(ir.IntType(32), u)) for u in range(4)]
        return context.make_tuple(builder, sig.return_type, lanes)

    return types.UniTuple(types.float32, 4)(tile, r, k), codegen


quad.fingerprint = "quad"


@intrinsic
def put_quad(typingctx, tile, r, k, x0, x1, x2, x3):
    """tile[r, k], …, tile[r, k + 3] = x0, …, x3 in one 16-byte store; as aligned as `quad`."""

    def codegen(context, builder, sig, args):
        pointer = _element(context, builder, sig.args[0], args[0], args[1:3], sig.args[1:3])
        vector = ir.Constant(FOUR, ir.Undefined)
        for u, x in enumerate(args[3:]):
            vector = builder.insert_element(vector, x, ir.Constant(ir.IntType(32), u))
        builder.store(vector, builder.bitcast(pointer, FOUR.as_pointer()), align=16)
        return context.get_dummy_value()

    return types.void(tile, r, k, *[types.float32] * 4), codegen


put_quad.fingerprint = "put_quad"


@intrinsic
def in_quads(typingctx, X):
    """Whether every row of X starts at a multiple of 16 bytes and its columns lie side by side."""

    def codegen(context, builder, sig, args):
        array = arrayobj.make_array(sig.args[0])(context, builder, args[0])
        stride, step = (builder.extract_value(array.strides, axis) for axis in (0, 1))
        address = builder.ptrtoint(array.data, stride.type)
        rest = builder.and_(builder.or_(address, stride), ir.Constant(stride.type, 15))
        aligned = builder.icmp_signed("==", rest, ir.Constant(stride.type, 0))
        return builder.and_(aligned, builder.icmp_signed("==", step, array.itemsize))

    return types.boolean(X), codegen


in_quads.fingerprint = "in_quads"


@intrinsic
def copy_quad(typingctx, tile, r, k, X, n, seen):
    """tile[r, k : k + 4] = X[n, k : k + 4], or zeros where not seen, by cp.async: there after `copies_arrive`."""

    def codegen(context, builder, sig, args):
        to = _element(context, builder, sig.args[0], args[0], args[1:3], sig.args[1:3])
        to = builder.ptrtoint(builder.addrspacecast(to, ir.PointerType(to.type.pointee, 3)), ir.IntType(32))
        row = row_pointer(context, builder, sig.args[3], args[3], args[4], sig.args[4])
        column = context.cast(builder, args[2], sig.args[2], types.intp)
        start = builder.gep(builder.bitcast(row, ir.PointerType(ir.FloatType(), 1)), [column])
        start = builder.ptrtoint(start, ir.IntType(64))
        count = builder.select(args[5], ir.Constant(ir.IntType(32), 16), ir.Constant(ir.IntType(32), 0))
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(32), ir.IntType(64), ir.IntType(32)])
        code = "cp.async.cg.shared.global [$0], [$1], 16, $2;"
        builder.call(ir.InlineAsm(kind, code, "r,l,r,~{memory}", side_effect=True), [to, start, count])
        return context.get_dummy_value()

    return types.void(tile, r, k, X, n, types.boolean), codegen


copy_quad.fingerprint = "copy_quad"


@intrinsic
def copies_arrive(typingctx):
    """Waits for the copies that this thread has under way."""

    def codegen(context, builder, sig, args):
        kind = ir.FunctionType(ir.VoidType(), [])
        builder.call(ir.InlineAsm(kind, "cp.async.wait_all;", "~{memory}", side_effect=True), [])
        return context.get_dummy_value()

    return types.void(), codegen


copies_arrive.fingerprint = "copies_arrive"


@intrinsic
def adjacent(typingctx, X, n, c):
    """X[n, c] of a global array whose columns lie side by side: a row's addresses then differ by constants."""

    def codegen(context, builder, sig, args):
        kind = context.get_data_type(sig.args[0].dtype)
        start = row_pointer(context, builder, sig.args[0], args[0], args[1], sig.args[1])
        column = context.cast(builder, args[2], sig.args[2], types.intp)
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
