"""The instructions of ptx.py as inline PTX.  [GPU only; ptx.py says what each does]

All addresses are 32-bit and of the form  (tile + the lane's part) + (row, column)'s part: in an unrolled loop the
second is a constant, which ptxas writes into the instruction, and the first is computed once.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from llvmlite import ir
from numba import cuda

from .internals import arrayobj, cgutils, intrinsic, types
from .intrinsics import row_pointer
from .scalar import device_function
from .softmax import ALL_LANES

I32, I64, F32, VOID = ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.VoidType()
FOUR = ir.VectorType(I32, 4)
SOURCE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
WORD, FLOAT = types.uint32, types.float32
WORDS, FLOATS = types.UniTuple(WORD, 4), types.UniTuple(FLOAT, 4)


def _int(n: int):
    return ir.Constant(I32, n)


def _asm(builder, code, constraints, result, args, effect=True):
    """effect: it is not moved across others that have one, and reads or writes memory."""
    constraints += ",~{memory}" * effect
    asm = ir.InlineAsm(ir.FunctionType(result, [a.type for a in args]), code, constraints.lstrip(","), effect)
    return builder.call(asm, args, attrs=("convergent",))


def _tuple(builder, struct, n):
    return cgutils.pack_array(builder, [builder.extract_value(struct, e) for e in range(n)])


def _lane(builder):
    thread = builder.call(cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(I32, []), "llvm.nvvm.read.ptx.sreg.tid.x"
    ), [])  # fmt: skip
    return builder.and_(thread, _int(31))


class _Tile:
    """A tile [rows, columns] of 16-bit elements in shared memory: where they lie."""

    def __init__(self, context, builder, kind, value):
        self.builder = builder
        array = arrayobj.make_array(kind)(context, builder, value)
        shared = builder.addrspacecast(array.data, ir.PointerType(array.data.type.pointee, 3))
        self.start = builder.ptrtoint(shared, I32)
        self.bytes = builder.trunc(builder.extract_value(array.strides, 0), I32)  # of a row
        chunks = builder.or_(builder.lshr(self.bytes, _int(4)), _int(8))
        self.span = builder.and_(chunks, builder.sub(_int(0), chunks))  # chunks that change places: gcd(8, a row's)

    def swizzle(self, row):
        """By what the chunks' byte offsets in this row are XORed; rows that differ by a multiple of 8 have the same."""
        b = self.builder
        turn = b.and_(b.lshr(b.mul(b.and_(row, _int(7)), self.span), _int(3)), b.sub(self.span, _int(1)))
        return b.shl(turn, _int(4))

    def split(self, column):
        """(high, low) of the column's byte offset: the swizzle changes the low part."""
        b = self.builder
        offset = b.shl(column, _int(1))
        low = b.and_(offset, b.sub(b.shl(self.span, _int(4)), _int(1)))
        return b.sub(offset, low), low

    def block(self, row, column, right=False):
        """Of the 16 x 16 block at (row, column) the chunk that this lane points at: bit 3 of the lane is the lower
        half, bit 4 the right one, or the other way round."""
        b, lane = self.builder, _lane(self.builder)
        r, half = b.and_(lane, _int(15)), b.and_(lane, _int(16))
        if right:
            r = b.or_(b.and_(lane, _int(7)), b.lshr(half, _int(1)))
            half = b.shl(b.and_(lane, _int(8)), _int(1))
        turn = b.xor(self.swizzle(r), half)
        high, low = self.split(column)
        mine = b.add(b.add(self.start, b.mul(r, self.bytes)), b.xor(turn, low))
        return b.add(mine, b.add(b.mul(row, self.bytes), high))

    def chunk(self, row, column):
        """The 8 elements at (row, column); column is a multiple of 8."""
        b = self.builder
        high, low = self.split(column)
        return b.add(b.add(self.start, b.mul(row, self.bytes)), b.add(b.xor(self.swizzle(row), low), high))


def _place(context, builder, sig, args, at):
    """The tile and (row, column), arguments at, at + 1, at + 2."""
    row, column = (context.cast(builder, args[n], sig.args[n], types.int32) for n in (at + 1, at + 2))
    return _Tile(context, builder, sig.args[at], args[at]), row, column


def _global(context, builder, sig, args, at, column):
    """Address of X[n, column], X and n being arguments at, at + 1."""
    start = row_pointer(context, builder, sig.args[at], args[at], args[at + 1], sig.args[at + 1])
    return builder.gep(start, [builder.zext(builder.shl(column, _int(1)), I64)])


def _adjacent(context, builder, sig, args, at, space):
    """Address of x[n] in an address space, of float32 that lie side by side; x and n are arguments at, at + 1."""
    array = arrayobj.make_array(sig.args[at])(context, builder, args[at])
    data = builder.addrspacecast(array.data, ir.PointerType(F32, space))
    return builder.gep(data, [context.cast(builder, args[at + 1], sig.args[at + 1], types.intp)])


def _load(name: str, how: str, right: bool = False):
    def load(typingctx, tile, row, column):
        def codegen(context, builder, sig, args):
            tile, row, column = _place(context, builder, sig, args, 0)
            code = f"ldmatrix.sync.aligned.m8n8.x4{how}.shared.b16 {{$0, $1, $2, $3}}, [$4];"
            struct = ir.LiteralStructType([I32] * 4)
            return _tuple(builder, _asm(builder, code, "=r,=r,=r,=r,r", struct, [tile.block(row, column, right)]), 4)

        return WORDS(tile, row, column), codegen

    return _named(load, name)


def _store(name: str, how: str):
    def store(typingctx, tile, row, column, words):
        def codegen(context, builder, sig, args):
            tile, row, column = _place(context, builder, sig, args, 0)
            words = [builder.extract_value(args[3], e) for e in range(4)]
            code = f"stmatrix.sync.aligned.m8n8.x4{how}.shared.b16 [$0], {{$1, $2, $3, $4}};"
            _asm(builder, code, "r,r,r,r,r", VOID, [tile.block(row, column), *words])
            return context.get_dummy_value()

        return types.void(tile, row, column, WORDS), codegen

    return _named(store, name)


def _multiply(name: str, kind: str):
    def mma(typingctx, A, B, C):
        def codegen(context, builder, sig, args):
            operands = [builder.extract_value(x, e) for x, n in zip(args, (4, 2, 4)) for e in range(n)]
            code = (
                f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
                "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
            )
            constraints = "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f"
            struct = ir.LiteralStructType([F32] * 4)
            return _tuple(builder, _asm(builder, code, constraints, struct, operands, effect=False), 4)

        return FLOATS(WORDS, types.UniTuple(WORD, 2), FLOATS), codegen

    return _named(mma, name)


def _pack(name: str, kind: str):
    def pack(typingctx, low, high):
        def codegen(context, builder, sig, args):
            code = f"cvt.rn.{kind}.f32 $0, $1, $2;"
            return _asm(builder, code, "=r,f,f", I32, [args[1], args[0]], effect=False)

        return WORD(FLOAT, FLOAT), codegen

    return _named(pack, name)


def _named(function, name: str):
    """An intrinsic with a fingerprint: its name and this file decide what a kernel that calls it compiles to."""
    function.__name__ = function.__qualname__ = name
    made = intrinsic(function)
    made.fingerprint = name, SOURCE
    return made


def _unpack(name: str, halves: tuple[str, str]):
    def unpack(typingctx, word):
        def codegen(context, builder, sig, args):
            found = [_asm(builder, code, "=f,r", F32, args, effect=False) for code in halves]
            return cgutils.pack_array(builder, found)

        return types.UniTuple(FLOAT, 2)(WORD), codegen

    return _named(unpack, name)


ldmatrix, ldmatrix_right = _load("ldmatrix", ""), _load("ldmatrix_right", "", True)
ldmatrix_trans, ldmatrix_trans_right = _load("ldmatrix_trans", ".trans"), _load("ldmatrix_trans_right", ".trans", True)
stmatrix, stmatrix_trans = _store("stmatrix", ""), _store("stmatrix_trans", ".trans")
mma_fp16, mma_bf16 = _multiply("mma_fp16", "f16"), _multiply("mma_bf16", "bf16")
pack_fp16, pack_bf16 = _pack("pack_fp16", "f16x2"), _pack("pack_bf16", "bf16x2")
HALF = "{{.reg .f16 low, high; mov.b32 {{low, high}}, $1; cvt.f32.f16 $0, {};}}"
unpack_fp16 = _unpack("unpack_fp16", (HALF.format("low"), HALF.format("high")))
unpack_bf16 = _unpack("unpack_bf16", ("shl.b32 $0, $1, 16;", "and.b32 $0, $1, 0xffff0000;"))


@intrinsic
def copy_chunk(typingctx, tile, r, X, n, y, x, down, right, seen):
    def codegen(context, builder, sig, args):
        integers = (context.cast(builder, args[at], sig.args[at], types.int32) for at in (1, 3, 4, 5, 6, 7))
        r, n, y, x, down, right = integers
        tile, array = _Tile(context, builder, sig.args[0], args[0]), arrayobj.make_array(X)(context, builder, args[2])
        to = builder.add(tile.chunk(y, builder.add(x, right)), builder.mul(builder.add(r, down), tile.bytes))

        data = builder.addrspacecast(array.data, ir.PointerType(array.data.type.pointee, 1))
        start = builder.add(builder.ptrtoint(data, I64), builder.zext(builder.shl(x, _int(1)), I64))
        stride = builder.trunc(builder.lshr(builder.extract_value(array.strides, 0), I64(4)), I32)
        for rows in (y, n, down):  # rows · stride, by 16 bytes: a product of two 64-bit numbers takes four instructions
            operands = [stride, builder.shl(rows, _int(4)), start]
            start = _asm(builder, "mad.wide.u32 $0, $1, $2, $3;", "=l,r,r,l", I64, operands, effect=False)
        start = builder.add(start, builder.sext(builder.shl(right, _int(1)), I64))  # last: part of the instruction
        count = builder.select(args[8], _int(16), _int(0))
        code = "cp.async.cg.shared.global.L2::128B [$0], [$1], 16, $2;"
        _asm(builder, code, "r,l,r", VOID, [to, start, count])
        return context.get_dummy_value()

    return types.void(tile, r, X, n, y, x, down, right, types.boolean), codegen


copy_chunk.fingerprint = "copy_chunk", SOURCE


@intrinsic
def copy_chunk_at(typingctx, tile, row, column, X, n, step, seen):
    def codegen(context, builder, sig, args):
        tile, row, column = _place(context, builder, sig, args, 0)
        step = context.cast(builder, args[5], sig.args[5], types.int32)
        to = builder.add(tile.chunk(row, column), builder.mul(step, tile.bytes))
        start = builder.ptrtoint(_global(context, builder, sig, args, 3, column), I64)
        stride = builder.extract_value(arrayobj.make_array(X)(context, builder, args[3]).strides, 0)
        start = builder.add(start, builder.mul(builder.sext(step, I64), stride))
        count = builder.select(args[6], _int(16), _int(0))
        code = "cp.async.cg.shared.global.L2::128B [$0], [$1], 16, $2;"
        _asm(builder, code, "r,l,r", VOID, [to, start, count])
        return context.get_dummy_value()

    return types.void(tile, row, column, X, n, step, types.boolean), codegen


copy_chunk_at.fingerprint = "copy_chunk_at", SOURCE


@intrinsic
def store_chunk(typingctx, X, n, tile, row, column):
    def codegen(context, builder, sig, args):
        tile, row, column = _place(context, builder, sig, args, 2)
        shared = builder.inttoptr(tile.chunk(row, column), ir.PointerType(FOUR, 3))
        start = builder.bitcast(_global(context, builder, sig, args, 0, column), ir.PointerType(FOUR, 1))
        builder.store(builder.load(shared, align=16), start, align=16)
        return context.get_dummy_value()

    return types.void(X, n, tile, row, column), codegen


store_chunk.fingerprint = "store_chunk", SOURCE


@intrinsic
def read_chunk(typingctx, X, n, column):
    def codegen(context, builder, sig, args):
        column = context.cast(builder, args[2], sig.args[2], types.int32)
        start = builder.bitcast(_global(context, builder, sig, args, 0, column), ir.PointerType(FOUR, 1))
        loaded = builder.load(start, align=16)
        return cgutils.pack_array(builder, [builder.extract_element(loaded, _int(e)) for e in range(4)])

    return WORDS(X, n, column), codegen


read_chunk.fingerprint = "read_chunk", SOURCE


@intrinsic
def read_four(typingctx, x, n):
    def codegen(context, builder, sig, args):
        start = _adjacent(context, builder, sig, args, 0, 1)
        loaded = builder.load(builder.bitcast(start, ir.PointerType(ir.VectorType(F32, 4), 1)), align=16)
        return cgutils.pack_array(builder, [builder.extract_element(loaded, _int(e)) for e in range(4)])

    return FLOATS(x, n), codegen


read_four.fingerprint = "read_four", SOURCE


@intrinsic
def add_four(typingctx, x, n, y):
    def codegen(context, builder, sig, args):
        start = _adjacent(context, builder, sig, args, 0, 1)
        code = "red.relaxed.gpu.global.add.v4.f32 [$0], {$1, $2, $3, $4};"
        operands = [builder.ptrtoint(start, I64), *(builder.extract_value(args[2], e) for e in range(4))]
        _asm(builder, code, "l,f,f,f,f", VOID, operands)
        return context.get_dummy_value()

    return types.void(x, n, FLOATS), codegen


add_four.fingerprint = "add_four", SOURCE


@intrinsic
def read_two(typingctx, x, n):
    def codegen(context, builder, sig, args):
        start = _adjacent(context, builder, sig, args, 0, 3)
        loaded = builder.load(builder.bitcast(start, ir.PointerType(ir.VectorType(F32, 2), 3)), align=8)
        return cgutils.pack_array(builder, [builder.extract_element(loaded, _int(e)) for e in range(2)])

    return types.UniTuple(FLOAT, 2)(x, n), codegen


read_two.fingerprint = "read_two", SOURCE


@intrinsic
def copy_four(typingctx, x, r, y, n):
    def codegen(context, builder, sig, args):
        to = builder.ptrtoint(_adjacent(context, builder, sig, args, 0, 3), I32)
        start = builder.ptrtoint(_adjacent(context, builder, sig, args, 2, 1), I64)
        _asm(builder, "cp.async.cg.shared.global [$0], [$1], 16;", "r,l", VOID, [to, start])
        return context.get_dummy_value()

    return types.void(x, r, y, n), codegen


copy_four.fingerprint = "copy_four", SOURCE


@intrinsic
def commit_group(typingctx):
    def codegen(context, builder, sig, args):
        _asm(builder, "cp.async.commit_group;", "", VOID, [])
        return context.get_dummy_value()

    return types.void(), codegen


commit_group.fingerprint = "commit_group", SOURCE


def wait_group(newest: int):
    def wait(typingctx):
        def codegen(context, builder, sig, args):
            _asm(builder, f"cp.async.wait_group {newest};", "", VOID, [])
            return context.get_dummy_value()

        return types.void(), codegen

    return _named(wait, f"wait_group {newest}")


def named_barrier(threads: int):
    def barrier(typingctx, name):
        def codegen(context, builder, sig, args):
            name = context.cast(builder, args[0], sig.args[0], types.int32)
            _asm(builder, f"bar.sync $0, {threads};", "r", VOID, [name])
            return context.get_dummy_value()

        return types.void(name), codegen

    return _named(barrier, f"named_barrier {threads}")


def named_any(threads: int):
    def met(typingctx, name, x):
        def codegen(context, builder, sig, args):
            name = context.cast(builder, args[0], sig.args[0], types.int32)
            code = f"bar.red.or.pred p, $1, {threads}, p;"
            code = f"{{ .reg .pred p; setp.ne.u32 p, $2, 0; {code} selp.u32 $0, 1, 0, p; }}"
            found = _asm(builder, code, "=r,r,r", I32, [name, builder.zext(args[1], I32)])
            return builder.icmp_unsigned("!=", found, _int(0))

        return types.boolean(name, types.boolean), codegen

    return _named(met, f"named_any {threads}")


def named_give(threads: int):
    return _named_half("named_give", f"bar.arrive $0, {threads};")


def named_take(threads: int):
    return _named_half("named_take", f"bar.sync $0, {threads};")


def _named_half(which: str, code: str):
    def half(typingctx, name, mine):
        def codegen(context, builder, sig, args):
            with builder.if_then(args[1]):
                name = context.cast(builder, args[0], sig.args[0], types.int32)
                _asm(builder, code, "r", VOID, [name])
            return context.get_dummy_value()

        return types.void(name, types.boolean), codegen

    return _named(half, f"{which} {code}")


@intrinsic
def fma(typingctx, x, y, z):
    def codegen(context, builder, sig, args):
        return builder.fma(*args)

    return FLOAT(FLOAT, FLOAT, FLOAT), codegen


fma.fingerprint = "fma", SOURCE


@device_function
def uniform(n):
    return cuda.shfl_sync(ALL_LANES, n, 0)


@intrinsic
def here(typingctx, x):
    def codegen(context, builder, sig, args):
        return _asm(builder, "mov.b32 $0, $1;", "=r,r", I32, args)

    return types.int32(types.int32), codegen


here.fingerprint = "here", SOURCE
