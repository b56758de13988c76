// What e4m3 is worth: a scale for each block of Q, K and V.  [FA3, 2407.08608, §3.3]
//
// Q's and K's go into the softmax's exponent.  So do V's.  From block to block, V_j = σ_j V̂_j, what is summed becomes
//
//     O ← α (σ_prev / σ_j) O + P̃_j V̂_j     l ← α l + rowsum(P̃_j)     α = 2^(m_prev - m_j)
//
// and as any m will do, it is m that makes way: m_j = m_prev - log2(σ_j / σ_prev), and O stays as it is.  Where P̃_j then is
// too large for e4m3, the softmax takes a larger m, as ever; where it would become too small, O is rescaled after all.
#pragma once

#include "rows.cuh"

// Q [B, H, q_blocks], K and V [B, H_kv, kv_blocks]; one of each head, or of blocks: q_rows of Q, Bc of K and V.
struct Scales {
    const float *Q, *K, *V;
    int q_blocks, q_rows, kv_blocks;
};

constexpr int STRIP = 32;          // blocks, a lane each: block j in lane j % 32
constexpr float MOST_SUNK = 0.5f;  // powers of 2 that P̃ may lose

// A head's scales of K and V, of the blocks that come next.
struct Strip {
    const float *K, *V;  // of its block 0
    int last;            // block, the first to be visited
    float of_K;          // below 0 where there is more to do than to multiply
    float rise;          // log2(σ_j / σ_j+1), of V

    // Block j, and those that are visited after it, down to a multiple of 32.
    DEVICE void take(int j, int lane) {
        const int mine = min(j / STRIP * STRIP + lane, j), before = min(mine + 1, last);
        of_K = load(K + mine);
        const float sigma = load(V + mine), sigma_before = load(V + before);
        rise = sigma == sigma_before ? 0.f : log2_approx(__fdividef(sigma, sigma_before));
        if (rise != 0.f || mine % STRIP == 0) of_K = -of_K;
    }
};
