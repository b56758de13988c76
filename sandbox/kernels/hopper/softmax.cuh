// The online softmax on a warpgroup's accumulators: P̃, m, l and what older sums are worth.  [1805.02867; FA2 Algorithm 1]
//
// A thread holds two rows, lane/4 and lane/4 + 8 of its warp's 16; four neighbouring lanes share a row.
//
// Lazy: m follows the maximum only where that has grown by more than 2^8, so that O is seldom rescaled.  P̃ <= 2^8 then, and
// the result is as exact: any m gives the same quotient.  [FlashAttention-4's conditional rescaling]
#pragma once

#include "ptx.cuh"

constexpr float NEG_INF = __builtin_bit_cast(float, 0xFF800000);

// The row (0 or 1) that element e of a thread's accumulators belongs to, and its column in the tile.
DEVICE constexpr int row_of(int e) { return e / 2 % 2; }
DEVICE constexpr int column_of(int e, int lane) { return e / 4 * 8 + lane % 4 * 2 + e % 2; }

// Offset: P̃ is as many powers of 2 larger, and l with it.
template <bool Lazy, int Offset = 0>
struct Softmax {
    static constexpr float GROWTH = 8.f;  // powers of 2
    static constexpr float SLACK = 1.f, ROOM = 0.5f;
    float m[2] = {NEG_INF, NEG_INF};  // running maximum of the scores, or one of before, in powers of 2
    float l[2] = {0.f, 0.f};          // running sum, this lane's part
    float alpha[2];                   // exp(m_old - m): what O and l of before are worth now

    // rS becomes P̃ = 2^(unit S - m + Offset).  unit > 0: log2 e, times the scale that S has not had yet.
    template <int Size>
    DEVICE void update(float (&rS)[Size], float unit) {
#pragma unroll
        for (int a = 0; a < 2; ++a) {
            float top = rS[2 * a];
#pragma unroll
            for (int e = 2 * a; e < Size; e += 4) top = fmaxf(top, fmaxf(rS[e], rS[e + 1]));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
            top = fmaxf(m[a], top * unit);
            if (Lazy && top - m[a] <= GROWTH) top = m[a];
            const float seen = top == NEG_INF ? 0.f : top;  // a row that has seen nothing: P̃ = 0
            alpha[a] = exp2_approx(m[a] - seen);            // exactly 1 where m stays
            m[a] = top;
            float sum = 0.f;
#pragma unroll
            for (int e = 2 * a; e < Size; e += 4) {
                rS[e] = exp2_approx(rS[e] * unit + (Offset - seen));
                rS[e + 1] = exp2_approx(rS[e + 1] * unit + (Offset - seen));
                sum += rS[e] + rS[e + 1];
            }
            l[a] = l[a] * alpha[a] + sum;
        }
    }

    // m follows, where P̃ would be too large: where the maximum has grown by more than there is room for.
    template <int Size>
    DEVICE void follow(const float (&rS)[Size], float unit) {
        float top[2] = {NEG_INF, NEG_INF};
        alpha[0] = alpha[1] = 1.f;
        measure(rS, top);
        rise(top, unit);
    }

    template <int Size>
    DEVICE void weights(float (&rS)[Size], float unit, float fold, float unfold) {
        float to[2], sum[2] = {0.f, 0.f};
#pragma unroll
        for (int a = 0; a < 2; ++a) to[a] = Offset + fold - (m[a] == NEG_INF ? 0.f : m[a]);
#pragma unroll
        for (int e = 0; e < Size; e += 2) {
            const int a = row_of(e);
            rS[e] = exp2_approx(rS[e] * unit + to[a]), rS[e + 1] = exp2_approx(rS[e + 1] * unit + to[a]);
            sum[a] += rS[e] + rS[e + 1];
        }
#pragma unroll
        for (int a = 0; a < 2; ++a) l[a] = l[a] * alpha[a] + sum[a] * unfold;
    }

    template <int Size>
    DEVICE void measure(const float (&rS)[Size], float (&top)[2]) {
#pragma unroll
        for (int e = 0; e < Size; e += 2) top[row_of(e)] = fmaxf(top[row_of(e)], fmaxf(rS[e], rS[e + 1]));
    }

    DEVICE void rise(float (&top)[2], float unit) {
#pragma unroll
        for (int a = 0; a < 2; ++a) {
            top[a] = fmaxf(top[a], __shfl_xor_sync(~0u, top[a], 1));
            top[a] = fmaxf(top[a], __shfl_xor_sync(~0u, top[a], 2));
            top[a] *= unit;
            if (top[a] > m[a] + ROOM) {
                alpha[a] = exp2_approx(m[a] - (top[a] + SLACK));
                m[a] = top[a] + SLACK;
            }
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

    // Once joined.
    DEVICE float lse(int a) const {
        return l[a] == 0.f ? NEG_INF : (m[a] - Offset + log2_approx(l[a])) * 0.6931471805599453f;
    }
};

// rO = diag(x) rO
template <int Size>
DEVICE void scale_rows(float (&rO)[Size], const float (&x)[2]) {
#pragma unroll
    for (int e = 0; e < Size; ++e) rO[e] *= x[row_of(e)];
}
