// What a thread block of fwd_v3 keeps in shared memory: its tiles, and the barriers that say who may use them.
//
// A tile is a row of panels, each as wide as its swizzle.  Those of Q and K are WIDTH bytes wide, O's 128; so are V's in
// 16 bits [Bc, d], while in 8 bits V is Vᵀ [d, Bc], in panels of DEEP keys.
//
// Compile-time, by -D: see fwd_v3.cu; EIGHT_BITS, by a file that includes this.
#pragma once

#include "scheduler.cuh"

#ifndef EIGHT_BITS
#define EIGHT_BITS 0
#endif

constexpr int d = HEAD_DIM, Bc = TILE_BC, Br = 64 * WARPGROUPS;
constexpr int BYTES = EIGHT_BITS ? 1 : 2;  // of one of Q, K, V
constexpr int WIDTH = EIGHT_BITS && d == 64 ? 64 : 128;
constexpr int DEEP = Bc % 128 == 0 ? 128 : Bc % 64 == 0 ? 64 : 32;
constexpr int PANELS = (d * BYTES + WIDTH - 1) / WIDTH, O_PANELS = (d + 63) / 64;
constexpr int Q_PANEL = 64 * WIDTH, Q_BYTES = PANELS * Q_PANEL, KV_PANEL = Bc * WIDTH, KV_BYTES = PANELS * KV_PANEL;
constexpr int O_PANEL = 64 * 128, O_BYTES = O_PANELS * O_PANEL;
constexpr int CONSUMERS = 4 * WARPGROUPS;  // warps, each of which releases a stage
static_assert(O_APART || STAGES * KV_BYTES >= WARPGROUPS * O_BYTES, "O has no room among the tiles of V");

struct Shared {
    alignas(1024) unsigned char sQ[WARPGROUPS][1][Q_BYTES];  // [64, d] each
    alignas(1024) unsigned char sO[O_APART ? WARPGROUPS : 1][O_APART ? O_BYTES : 1024];
    alignas(1024) unsigned char sK[STAGES][KV_BYTES];  // [Bc, d]
    alignas(1024) unsigned char sV[STAGES][KV_BYTES];  // [Bc, d], or its transpose
    u64 Q[WARPGROUPS][2], K[2 * STAGES], V[2 * STAGES], told[2], O_here[1];  // barriers
    Work slot;

    DEVICE void init() {
        for (int g = 0; g < WARPGROUPS; ++g) Ring<1>::init(Q[g], 4);
        Ring<STAGES>::init(K, CONSUMERS);
        Ring<STAGES>::init(V, CONSUMERS);
        Ring<1>::init(told, CONSUMERS + 3 * WARP_SPECIALIZED);  // three producers hear of row blocks, too
        barrier_init(shared_address(O_here), WARPGROUPS);
        barrier_init_fence();
    }
};
