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
DEVICE Worth first_lane(const Worth &worth) {
    const auto read = [](const float &x) {
        return __builtin_bit_cast(float, first_lane(~0u, reinterpret_cast<const int &>(x)));
    };
    return {read(worth.K), read(worth.fold), read(worth.unfold), read(worth.sigma)};
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
        float unfold = __fdividef(sigma, v);
        if (unfold < 0.82f || unfold > 4.f) unfold = 1.f, sigma = v;
        s.worth[stage] = {k, -log2_approx(unfold), unfold, sigma};
        const int after = max(j - 1, first);
        k = load(K + after), v = load(V + after);
    }
};
