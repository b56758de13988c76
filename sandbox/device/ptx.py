"""Instructions of the tensor cores, one function each; the same names on a GPU and on the simulator.  [PTX ISA 8.x]

A tile is a shared-memory array [rows, columns] of 16-bit numbers (fp16, or bf16 as int16 bits); columns is a multiple
of 16.  Its 8-element chunks, 16 bytes each, are swizzled: eight rows of one column of chunks lie in different banks,
whatever the width.  So a tile is read and written by these functions only, and each names a row and a column.

A warp's lane holds of a block of 16 x 16 numbers four words of two, of one of 16 x 8 float32 (an accumulator) four
numbers.  With g, t = lane // 4, lane % 4:

    words        0: (g, 2t), (g, 2t + 1)    1: (g + 8, 2t), …    2: (g, 2t + 8), …    3: (g + 8, 2t + 8), …
    accumulator  (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)

so two accumulators side by side, packed pair by pair, are the words of a block: P feeds P V without a shuffle.
All 32 lanes call those marked * together; (row, column) is then the same in all, both multiples of 16 (row: of 8).

ldmatrix(tile, row, column)         * words 0, 1, 2, 3 of the block at (row, column)
ldmatrix_right(tile, row, column)   * words 0, 2, 1, 3
ldmatrix_trans(tile, row, column)   * words 0, 2, 1, 3 of its transpose
ldmatrix_trans_right(tile, row, column)  * words 0, 1, 2, 3 of its transpose
stmatrix(tile, row, column, words)  * the block at (row, column) = words 0, 1, 2, 3 (sm_90)
stmatrix_trans(tile, row, column, words)  * words 0, 2, 1, 3 of its transpose
mma_fp16(A, B, C), mma_bf16         * C + A·B: A [16, 16] four words, B [16, 8] two, C an accumulator; the two words of
                                      each half of a B [16, 16] side by side: ldmatrix_right of Bᵀ, ldmatrix_trans of B
pack_fp16(low, high), pack_bf16       a word of two float32, rounded to nearest even
copy_chunk(tile, r, X, n, y, x, down, right, seen)  tile[r + y + down, x + right : +8] =
                                      X[n + y + down, x + right : +8], zeros where not seen; asynchronous.  r and n are
                                      a warp's, y and x a lane's, down and right constants; r, down, x and right are
                                      multiples of 8, X's rows start at multiples of 16 bytes, less than 2³⁶ apart
copy_chunk_at(tile, row, column, X, n, step, seen)  the same, by addresses for which ptxas keeps fewer registers:
                                      tile[row + step, column : +8] = X[n + step, column : +8]
commit_group()                        closes the group of this lane's copies since the last one
wait_group(newest)()                  until all groups but so many of the newest have arrived: for this lane's eyes
store_chunk(X, n, tile, row, column)  X[n, column : +8] = tile[row, column : +8]
named_barrier(threads)(name)          syncthreads for so many threads, whole warps, that name the same of 1 to 15
named_any(threads)(name, x)           the same, and whether x is true for any of them (simulated: for any of the block)
named_give(threads)(name, mine)       of so many threads, whole warps, those of whom `mine` is true give, and go on
named_take(threads)(name, mine)       those of whom it is true take: they wait till all the others have given or taken
                                      (simulated: all the block's threads meet where some give, none where some take)
fma(x, y, z)                          x·y + z, rounded once
uniform(n)                            n, an int32 that a warp's lanes have in common: so that the compiler knows it, too
read_chunk(X, n, column)              X[n, column : +8], four words
read_four(x, n), add_four(x, n, y)    x[n : +4], four float32; x[n : +4] += y, whoever else adds to it; 16 bytes at
                                      once, of a contiguous x in global memory
copy_four(x, r, y, n), read_two(x, r)  x[r : +4] = y[n : +4], asynchronous; x[r : +2]; x in shared memory
unpack_fp16(word), unpack_bf16        (low, high), two float32
here(x)                               x, an int32; what follows from it is computed here, not before the loop and kept
"""

from ..target import SIMULATED

if SIMULATED:
    from . import ptx_simulated as instructions
else:
    from . import ptx_gpu as instructions

ldmatrix, ldmatrix_right = instructions.ldmatrix, instructions.ldmatrix_right
ldmatrix_trans, ldmatrix_trans_right = instructions.ldmatrix_trans, instructions.ldmatrix_trans_right
stmatrix, stmatrix_trans = instructions.stmatrix, instructions.stmatrix_trans
mma_fp16, mma_bf16 = instructions.mma_fp16, instructions.mma_bf16
pack_fp16, pack_bf16 = instructions.pack_fp16, instructions.pack_bf16
copy_chunk, store_chunk = instructions.copy_chunk, instructions.store_chunk
copy_chunk_at = instructions.copy_chunk_at
commit_group, wait_group = instructions.commit_group, instructions.wait_group
named_barrier, named_any = instructions.named_barrier, instructions.named_any
named_give, named_take = instructions.named_give, instructions.named_take
fma, uniform = instructions.fma, instructions.uniform
read_chunk, read_four, add_four = instructions.read_chunk, instructions.read_four, instructions.add_four
copy_four, read_two = instructions.copy_four, instructions.read_two
unpack_fp16, unpack_bf16 = instructions.unpack_fp16, instructions.unpack_bf16
here = instructions.here
