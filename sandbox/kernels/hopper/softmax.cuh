// The online softmax on a warpgroup's accumulators: P̃, m, l and what older sums are worth.  [1805.02867; FA2 Algorithm 1]
//
// A thread holds two rows, lane/4 and lane/4 + 8 of its warp's 16; four neighbouring lanes share a row.
//
// Lazy: m follows the maximum only where that has grown by more than 2^8, so that O is seldom rescaled.  P̃ <= 2^8 then, and
// the result is as exact: any m gives the same quotient.  [FlashAttention-4's conditional rescaling]
#pragma once

#include "ptx.cuh"

constexpr float GROWTH = 8.f;  // powers of 2
constexpr float NEG_INF = __builtin_bit_cast(float, 0xFF800000);

// The row (0 or 1) that element e of a thread's accumulators belongs to, and its column in the tile.
DEVICE constexpr int row_of(int e) { return e / 2 % 2; }
DEVICE constexpr int column_of(int e, int lane) { return e / 4 * 8 + lane % 4 * 2 + e % 2; }

template <bool Lazy>
struct Softmax {
    float m[2] = {NEG_INF, NEG_INF};  // running maximum of the scores, or one of before, in S's own unit
    float l[2] = {0.f, 0.f};          // running sum, this lane's part
    float alpha[2];                   // exp(m_old - m): what O and l of before are worth now

    // rS becomes P̃ = 2^(unit (S - m)).  unit: log2 e, times the scale that S has not had yet.
    template <int Size>
    DEVICE void update(float (&rS)[Size], float unit) {
#pragma unroll
        for (int a = 0; a < 2; ++a) {
            float top = m[a];
#pragma unroll
            for (int e = 2 * a; e < Size; e += 4) top = fmaxf(top, fmaxf(rS[e], rS[e + 1]));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
            if (Lazy && (top - m[a]) * unit <= GROWTH) top = m[a];
            const float seen = top == NEG_INF ? 0.f : top;  // a row that has seen nothing: P̃ = 0
            alpha[a] = exp2_approx((m[a] - seen) * unit);   // exactly 1 where m stays
            m[a] = top;
            float sum = 0.f;
#pragma unroll
            for (int e = 2 * a; e < Size; e += 4) {
                rS[e] = exp2_approx(rS[e] * unit - seen * unit);
                rS[e + 1] = exp2_approx(rS[e + 1] * unit - seen * unit);
                sum += rS[e] + rS[e + 1];
            }
            l[a] = l[a] * alpha[a] + sum;
        }
    }

    // Whether what older sums are worth has changed in any row of the warp.
    DEVICE bool changed() const { return __any_sync(~0u, alpha[0] != 1.f || alpha[1] != 1.f); }

    // All keys have been seen: l becomes the sum over a row's four lanes, and alpha what O is to be multiplied by.
    DEVICE void join() {
#pragma unroll
        for (int a = 0; a < 2; ++a) {
            l[a] += __shfl_xor_sync(~0u, l[a], 1);
            l[a] += __shfl_xor_sync(~0u, l[a], 2);
            alpha[a] = l[a] == 0.f ? 0.f : __fdividef(1.f, l[a]);
        }
    }

    // Whether any row of the warp has seen nothing; once joined.
    DEVICE bool blind() const { return __any_sync(~0u, l[0] == 0.f || l[1] == 0.f); }

    // Once joined.  unit: as in `update`.
    DEVICE float lse(int a, float unit) const {
        return l[a] == 0.f ? NEG_INF : (m[a] * unit + log2_approx(l[a])) * 0.6931471805599453f;
    }
};

// rO = diag(x) rO
template <int Size>
DEVICE void scale_rows(float (&rO)[Size], const float (&x)[2]) {
#pragma unroll
    for (int e = 0; e < Size; ++e) rO[e] *= x[row_of(e)];
}
