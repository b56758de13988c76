// Which row blocks a thread block computes, in which order, and which key blocks each of them sees.
#pragma once

#include "ptx.cuh"

// The sizes and the mask of a problem: row i sees key j when i + lo <= j <= i + hi.
struct Shape {
    int N_q, N_k, H, group;  // group: query heads that share a key/value head
    int lo, hi;
    int heads;    // of all batches
    int section;  // heads whose K and V stay in L2 while their row blocks are computed
    float scale, softcap;
};

// Br rows of one head and the key blocks [first, end) that they see.
struct Work {
    int i0, head, batch, first, end;
};

// A static schedule: this block takes every gridDim.x-th row block.  Under a band, the rows that see most come first
// (longest processing time first), in sections of heads so that K and V are read from L2.
template <int Br, int Bc, bool Banded>
struct Schedule {
    const Shape &shape;
    int next = blockIdx.x;

    DEVICE bool take(Work &work) {
        const int Tr = (shape.N_q + Br - 1) / Br;
        if (next >= Tr * shape.heads) return false;
        int i, bh;
        if (Banded) {
            const int start = next / (Tr * shape.section) * shape.section;
            const int heads = min(shape.section, shape.heads - start), place = next - start * Tr;
            i = Tr - 1 - place / heads, bh = start + place % heads;
        } else {
            i = next % Tr, bh = next / Tr;
        }
        next += gridDim.x;
        work.i0 = i * Br, work.head = bh % shape.H, work.batch = bh / shape.H;
        key_blocks(work);
        return true;
    }

    DEVICE void key_blocks(Work &work) const {
        int first = 0, end = shape.N_k;
        if (Banded) {
            first = max(first, work.i0 + shape.lo);
            end = min(end, min(work.i0 + Br, shape.N_q) + shape.hi);
        }
        work.first = first < end ? first / Bc : 0;
        work.end = first < end ? (end + Bc - 1) / Bc : 0;
    }
};
