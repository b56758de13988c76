// Which row blocks a thread block computes, in which order, and which key blocks each of them sees.
#pragma once

#include "pipeline.cuh"

// The sizes and the mask of a problem: row i sees key j when i + lo <= j <= i + hi.
struct Shape {
    int N_q, N_k, H, group;  // group: query heads that share a key/value head
    int lo, hi;
    int heads;    // of all batches
    int section;  // heads whose K and V stay in L2 while their row blocks are computed
    float scale, softcap;
};

// Br rows of one head from i0 on, which may be below 0, its key/value head and the key blocks [first, end) that the rows
// see; end < 0: there is no more.
struct Work {
    int i0, head, kv_head, batch, first, end;
};

// What the first of these lanes reads, each of its numbers in a uniform register.
DEVICE Work first_lane(u32 lanes, const Work &w) {
    return {first_lane(lanes, w.i0), first_lane(lanes, w.head), first_lane(lanes, w.kv_head),
            first_lane(lanes, w.batch), first_lane(lanes, w.first), first_lane(lanes, w.end)};
}

// Row blocks in the order they are to be begun, those that take longest first.  Under a band, the rows that see most, in
// sections of heads so that K and V are read from L2; and where Br does not divide the rows, it is the first row block
// that goes over their edge, by whole warpgroups: it sees least.  With no band, it is the last one, and those of all heads
// come last: they fill up what whole ones leave of the last wave.
template <int Br, int Bc, bool Banded>
struct Order {
    const Shape &shape;

    DEVICE int rows() const { return (shape.N_q + Br - 1) / Br; }  // row blocks a head
    DEVICE int count() const { return rows() * shape.heads; }
    DEVICE int before() const { return Banded ? (rows() * Br - shape.N_q) / 64 * 64 : 0; }  // the first row

    DEVICE Work at(int index) const {
        if (index >= count()) return {0, 0, 0, 0, 0, -1};
        const int Tr = rows();
        int i, bh;
        if (Banded) {
            const int start = index / (Tr * shape.section) * shape.section;
            const int heads = min(shape.section, shape.heads - start), place = index - start * Tr;
            i = Tr - 1 - place / heads, bh = start + place % heads;
        } else {
            const int whole = shape.N_q / Br, part = index - whole * shape.heads;
            i = part < 0 ? index % whole : whole, bh = part < 0 ? index / whole : part;
        }
        const int i0 = i * Br - before(), head = bh % shape.H;
        int first = 0, end = shape.N_k;
        if (Banded) {
            first = max(first, max(i0, 0) + shape.lo);
            end = min(end, min(i0 + Br, shape.N_q) + shape.hi);
        }
        if (first >= end) first = 0, end = 1;  // rows that see nothing: one block, of which the mask leaves nothing
        return {i0, head, head / shape.group, bh / shape.H, first / Bc, (end + Bc - 1) / Bc};
    }
};

// The row block that a thread block is to compute next, told to all its warps.
struct Next {
    Work *slot;
    Ring<1> told;

    // The first of these lanes reads, which also gives the slot back; all have it, in uniform registers: what follows
    // from it is computed once a warp.
    DEVICE bool hear(Work &work, u32 lanes = ~0u) {
        told.wait();
        work = first_lane(lanes, *slot);
        return work.end >= 0;
    }

    // The slot may have the row block after it.
    DEVICE void heard() { told.release(), told.next(); }
};

// Hands out row blocks, one by one, each when all have heard the one before.
//
//     Dynamic  whoever is free takes the next ticket of a counter, which the last one puts back to 0
//     else     every thread block takes each gridDim.x-th
template <bool Dynamic, class Order>
struct Deal {
    const Order order;
    Next next;
    int *counter;
    int index = blockIdx.x;

    // Whether it was one, and not the word that there is no more.  Where all have heard the one before.
    DEVICE bool one() {
        *next.slot = order.at(index);
        next.told.publish(), next.told.next();
        return index < order.count();
    }

    // Which one comes next, not before K of this one has been asked for: who has a ticket and computes another row block
    // keeps one of the longest from those that are free.
    DEVICE void draw() { index = Dynamic ? gridDim.x + ticket() : index + gridDim.x; }

    // One is taken for each row block: a thread block's first is free.
    DEVICE int ticket() {
        const int its = atomicAdd(counter, 1);
        if (its == order.count() - 1) *counter = 0;
        return its;
    }
};
