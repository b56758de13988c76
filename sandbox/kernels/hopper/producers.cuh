// Who asks the copy engine for tiles: warps of their own, or a warp of those that multiply.  [FA3, 2407.08608, §3.1]
#pragma once

#include "shared.cuh"

using Blocks = Order<Br, Bc, BANDED>;

// A producer is one lane; a warp that multiplies comes here as a whole, and its first lane asks.
DEVICE bool asks() { return WARP_SPECIALIZED || threadIdx.x % 32 == 0; }

constexpr int IN_A_ROW = WARP_SPECIALIZED ? 1 : PANELS;  // copies: a loop would cost products uniform registers

// The j-th tile of rows from i0 on, to the ring's stage, which is free.
template <int Size, int Bytes>
DEVICE void ask(const Ring<Size> &ring, unsigned char (&tiles)[Size][Bytes], const TensorMap &map, int i0, int j,
                int head, int batch, u64 policy) {
    constexpr int PANEL = Bytes / PANELS, ROWS = PANEL / WIDTH;
    if (!asks()) return;
    ring.announce(Bytes);
    const u32 tile = shared_address(tiles[ring.stage]);
#pragma unroll IN_A_ROW
    for (int p = 0; p < PANELS; ++p)
        copy_in(tile + p * PANEL, map, ring.full(), WIDTH / BYTES * p, i0 + j * ROWS, head, batch, policy);
}

// Q of a row block, 64 rows a warpgroup; of one that has none, what lies there.
DEVICE void ask_Q(Ring<1> ring, Shared &s, const TensorMap &map, const Work &w) {
#pragma unroll 1
    for (int g = 0; g < WARPGROUPS; ++g) {
        ring.barriers = shared_address(s.Q[g]);
        ring.acquire();
        if (w.i0 + 64 * g >= 0) ask(ring, s.sQ[g], map, w.i0, g, w.head, w.batch, EVICT_FIRST);
        else if (asks()) barrier_arrive(ring.full());
    }
}

// Block j of K or of V.
DEVICE void ask_K(const Ring<STAGES> &ring, Shared &s, const TensorMap &map, const Work &w, int j) {
    ask(ring, s.sK, map, 0, j, w.kv_head, w.batch, EVICT_LAST);
}

DEVICE void ask_V(const Ring<STAGES> &ring, Shared &s, const TensorMap &map, const Work &w, int j) {
    if (!EIGHT_BITS) return ask(ring, s.sV, map, 0, j, w.kv_head, w.batch, EVICT_LAST);
    ring.announce(KV_BYTES);  // Vᵀ: rows are columns of V, and panels keys
    const u32 tile = shared_address(s.sV[ring.stage]);
#pragma unroll
    for (int p = 0; p < Bc / DEEP; ++p)
        copy_in(tile + p * (d * DEEP), map, ring.full(), j * Bc + DEEP * p, 0, w.kv_head, w.batch, EVICT_LAST);
}

// O of a row block from V's tiles, when all have written it there.
DEVICE void send_O(Ring<1> &O_here, Shared &s, const TensorMap &map, const Work &w) {
    O_here.wait(), O_here.next();
    if (!asks()) return;
#pragma unroll 1
    for (int t = w.i0 < 0 ? -w.i0 / 64 * O_PANELS : 0; t < WARPGROUPS * O_PANELS; ++t)
        copy_out(map, shared_address(s.sV) + t * O_PANEL, t % O_PANELS * 64, w.i0 + t / O_PANELS * 64, w.head, w.batch);
    copies_out_commit();
}

// ---- four warps with a job each: none waits for what another waits for ------------------------------------------------

// One hands out row blocks.
DEVICE void hand_out(Shared &s, const Shape &shape, int *counter) {
    Deal<DYNAMIC, Blocks> deal{{shape}, {&s.slot, s.told}, counter};
    while (deal.one()) deal.next.told.acquire(), deal.draw();
}

DEVICE void bring_Q(Shared &s, const TensorMap &map) {
    Ring<1> ring(s.Q[0]);
    Next next{&s.slot, s.told};
    for (Work w; next.hear(w, 1); ring.next()) {
        next.heard();
        ask_Q(ring, s, map, w);
    }
}

// K, from the last block to the first.
//
// The next row block is drawn when K of this one has been asked for: late enough to go to whoever is free, early enough.
DEVICE void bring_K(Shared &s, const TensorMap &map) {
    Ring<STAGES> ring(s.K);
    Next next{&s.slot, s.told};
    for (Work w; next.hear(w, 1); next.heard()) {
#pragma unroll 1
        for (int j = w.end - 1; j >= w.first; --j, ring.next()) ring.acquire(), ask_K(ring, s, map, w, j);
    }
}

// V; and where O has no tile of its own, O, which leaves through those of V before the next V comes.
DEVICE void bring_V(Shared &s, const TensorMap &map, const TensorMap &O) {
    Ring<STAGES> ring(s.V);
    Next next{&s.slot, s.told};
    Ring<1> O_here(s.O_here);
    for (Work w; next.hear(w, 1);) {
        next.heard();
#pragma unroll 1
        for (int j = w.end - 1; j >= w.first; --j, ring.next()) ring.acquire(), ask_V(ring, s, map, w, j);
        if (!O_APART) send_O(O_here, s, O, w), copies_out_read();
    }
}

// What each of the four warps does.
DEVICE void produce(Shared &s, const TensorMap &Q, const TensorMap &K, const TensorMap &V, const TensorMap &O,
                    const Shape &shape, int *counter) {
    const int warp = threadIdx.x / 32 % 4;
    if (threadIdx.x % 32 != 0) return;
    if (warp == 0) hand_out(s, shape, counter);
    else if (warp == 1) bring_Q(s, Q);
    else if (warp == 2) bring_K(s, K);
    else bring_V(s, V, O);
}

// ---- or none: a warp of the last warpgroup asks for tiles between its products ------------------------------------------

// Where it has released a stage, it asks for the block that comes there next, and so waits until all have released it.
// None of them needs anything for that which this warp asks for later; nor does it wait long, as the last warpgroup is
// behind the others where they take turns.
struct Loader {
    Shared &s;
    const TensorMap &map_Q, &map_K, &map_V, &map_O;
    Deal<DYNAMIC, Blocks> deal;
    Ring<1> O_here{s.O_here};
    const bool mine = !WARP_SPECIALIZED && uniform(~0u, threadIdx.x / 32) == 4 * (WARPGROUPS - 1);

    DEVICE Loader(Shared &s, const TensorMap &Q, const TensorMap &K, const TensorMap &V, const TensorMap &O,
                  const Shape &shape, int *counter)
        : s(s), map_Q(Q), map_K(K), map_V(V), map_O(O), deal{{shape}, {&s.slot, s.told}, counter} {}

    // Hands out the next row block: its Q, and its first blocks of K.
    DEVICE void first_K(const Ring<1> &Q_ring, Ring<STAGES> K_ring) {
        if (!mine) return;
        if (asks()) deal.next.told.acquire(), deal.one();
        const Work w = first_lane(~0u, s.slot);
        if (w.end < 0) return;
        ask_Q(Q_ring, s, map_Q, w);
#pragma unroll 1
        for (int n = 1; n <= STAGES; ++n) K(K_ring, w, w.end - n), K_ring.next();
    }

    // Its first blocks of V, when O of the one before has left V's tiles.
    DEVICE void first_V(Ring<STAGES> V_ring, const Work &w) {
        if (!mine) return;
        if (!O_APART && asks()) copies_out_read();
#pragma unroll 1
        for (int n = 1; n <= STAGES; ++n) V(V_ring, w, w.end - n), V_ring.next();
    }

    // Block j, if the row block has one.
    DEVICE void K(const Ring<STAGES> &ring, const Work &w, int j) {
        if (!mine || j < w.first) return;
        ring.acquire(), ask_K(ring, s, map_K, w, j);
        if (j == w.first && asks()) deal.draw();
    }

    DEVICE void V(const Ring<STAGES> &ring, const Work &w, int j) {
        if (mine && j >= w.first) ring.acquire(), ask_V(ring, s, map_V, w, j);
    }

    DEVICE void send_O(const Work &w) {
        if (mine && !O_APART) ::send_O(O_here, s, map_O, w);
    }
};
