// What e4m3 is worth: a scale for each block of Q, K and V.  [FA3, 2407.08608, §3.3]
//
// Q's and K's go into the softmax's exponent.  V_j = σ_j V̂_j comes to the unit σ that O has by P̃, which becomes σ_j/σ
// times as large as long as e4m3 has room for that, or else by O, which is rescaled to σ_j.  A producer works this out,
// once for all who multiply, and leaves it beside K's tile.
#pragma once

#include "shared.cuh"

// Q [B, H, q_blocks], K and V [B, H_kv, kv_blocks]; one of each head, or of blocks: q_rows of Q, Bc of K and V.
struct Scales {
    const float *Q, *K, *V;
    int q_blocks, q_rows, kv_blocks;
};

// What the first lane reads, which also gives K's stage back: for all of them.
DEVICE float first_lane(const float &x) {
    float mine = 0.f;
    if (threadIdx.x % 32 == 0) mine = x;
    return __shfl_sync(~0u, mine, 0);
}

DEVICE Worth first_lane(const Worth &worth) {
    Worth mine = {};
    if (threadIdx.x % 32 == 0) mine = worth;
    return {__shfl_sync(~0u, mine.K, 0), __shfl_sync(~0u, mine.fold, 0)};
}

// Beside K's tiles: the worth of each block, in the order in which a row block visits them.
struct BesideK {
    Shared &s;
    const Scales &scales;
    const Shape &shape;
    const float *K, *V;
    float k, v, sigma;
    int first;

    DEVICE BesideK(Shared &s, const Scales &scales, const Shape &shape) : s(s), scales(scales), shape(shape) {}

    DEVICE void begin(const Work &w) {
        if (!BLOCKED) return;
        const int blocks = (w.batch * shape.H + w.head) / shape.group * scales.kv_blocks;
        K = scales.K + blocks, V = scales.V + blocks, first = w.first;
        k = load(K + w.end - 1), v = sigma = load(V + w.end - 1);
    }

    // Of block j, in its stage; the scales of the next one are asked for.
    DEVICE void put(int stage, int j) {
        if (!BLOCKED) return;
        const float ratio = __fdividef(sigma, v);
        const bool moves = ratio < 0.82f || ratio > 4.f;
        if (moves) sigma = v;
        s.worth[stage] = {k, moves ? 0.f : -log2_approx(ratio)}, s.sigma[stage] = sigma;
        const int after = max(j - 1, first);
        k = load(K + after), v = load(V + after);
    }
};
