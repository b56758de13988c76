// What a thread block of fwd_v3 keeps in shared memory: its tiles, and the barriers that say who may use them.
//
// Compile-time, by -D: see fwd_v3.cu.
#pragma once

#include "scheduler.cuh"

constexpr int d = HEAD_DIM, Bc = TILE_BC, Br = 64 * WARPGROUPS;
constexpr int PANELS = (d + 63) / 64;  // of a tile: 64 columns, 128 bytes wide
constexpr int Q_PANEL = 64 * 128, Q_BYTES = PANELS * Q_PANEL, KV_PANEL = Bc * 128, KV_BYTES = PANELS * KV_PANEL;
constexpr int CONSUMERS = 4 * WARPGROUPS;  // warps, each of which releases a stage
static_assert(O_APART || STAGES * Bc >= Br, "O has no room among the tiles of V");

struct Shared {
    alignas(1024) unsigned char sQ[WARPGROUPS][1][Q_BYTES];  // [64, d] each
    alignas(1024) unsigned char sO[O_APART ? WARPGROUPS : 1][O_APART ? Q_BYTES : 1024];
    alignas(1024) unsigned char sK[STAGES][KV_BYTES];  // [Bc, d]
    alignas(1024) unsigned char sV[STAGES][KV_BYTES];  // [Bc, d]
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
