// The online softmax on a warpgroup's accumulators: P̃, m, l and what older sums are worth.  [1805.02867; FA2 Algorithm 1]
//
// A thread holds two rows, lane/4 and lane/4 + 8 of its warp's 16; four neighbouring lanes share a row.
//
// m need not be the maximum: any m gives the same quotient, as long as P̃ = 2^(S - m) is neither too large nor too small for
// its format.  So m follows the maximum only where that has grown by more than ROOM, and O is seldom rescaled.
// [FlashAttention-4's conditional rescaling]
#pragma once

#include "ptx.cuh"

constexpr float NEG_INF = __builtin_bit_cast(float, 0xFF800000);
constexpr float LOWEST = __builtin_bit_cast(float, 0xFF7FFFFF);  // finite: less NEG_INF it is no NaN

// The row (0 or 1) that element e of a thread's accumulators belongs to, and its column in the tile.
DEVICE constexpr int row_of(int e) { return e / 2 % 2; }
DEVICE constexpr int column_of(int e, int lane) { return e / 4 * 8 + lane % 4 * 2 + e % 2; }

// Powers of 2: how far a maximum may be above m; how far m is above the first one, and above a new one; how much larger P̃
// and l are.  Most maxima are less than four times that of the first block, so that few rows follow one after it.
template <bool Lazy>
struct In16Bits {
    static constexpr float ROOM = Lazy ? 8.f : 0.f, FIRST = 0.f, SLACK = 0.f, OFFSET = 0.f;
};
struct In8Bits {  // at most 2^8.8, and e4m3 ends at 448 = 2^8.807
    static constexpr float ROOM = 0.8f, FIRST = 2.f, SLACK = 1.f, OFFSET = 8.f;
};

// The maxima of a thread's two rows, over the four lanes that share them.
//
// The card compares three integers at a time, of floats two.  Floats that are not all negative have the maximum that they
// have as integers; where a row is negative, its warp starts again.
template <int Size>
DEVICE void maxima(const float (&rS)[Size], float (&top)[2]) {
    int most[2] = {-1, -1};
#pragma unroll
    for (int e = 0; e < Size; e += 2) {
        int &x = most[row_of(e)];
        x = max(max(x, __builtin_bit_cast(int, rS[e])), __builtin_bit_cast(int, rS[e + 1]));
    }
#pragma unroll
    for (int a = 0; a < 2; ++a) {
        most[a] = max(most[a], __shfl_xor_sync(~0u, most[a], 1));
        most[a] = max(most[a], __shfl_xor_sync(~0u, most[a], 2));
        top[a] = __builtin_bit_cast(float, most[a]);
    }
    if (!__any_sync(~0u, most[0] < 0 || most[1] < 0)) return;
    top[0] = top[1] = NEG_INF;
#pragma unroll
    for (int e = 0; e < Size; e += 2) top[row_of(e)] = fmaxf(top[row_of(e)], fmaxf(rS[e], rS[e + 1]));
#pragma unroll
    for (int a = 0; a < 2; ++a) {
        top[a] = fmaxf(top[a], __shfl_xor_sync(~0u, top[a], 1));
        top[a] = fmaxf(top[a], __shfl_xor_sync(~0u, top[a], 2));
    }
}

template <class Leeway>
struct Softmax {
    float m[2] = {LOWEST, LOWEST};  // running maximum of the scores, or a little above or below, in powers of 2
    float l[2] = {0.f, 0.f};        // running sum, this lane's part
    float alpha[2];                 // exp(m_old - m): what O and l of before are worth now

    // m, and alpha.  unit > 0: log2 e, times the scale that S has not had yet.
    template <bool First = false, int Size>
    DEVICE void follow(const float (&rS)[Size], float unit) {
        float top[2];
        maxima(rS, top);
#pragma unroll
        for (int a = 0; a < 2; ++a) {
            top[a] *= unit;
            alpha[a] = 1.f;
            if (top[a] > m[a] + Leeway::ROOM) {
                top[a] += First ? Leeway::FIRST : Leeway::SLACK;
                alpha[a] = exp2_approx(m[a] - top[a]), m[a] = top[a];
            }
        }
    }

    // m becomes less by so many powers of 2.
    DEVICE void lower(float by) {
#pragma unroll
        for (int a = 0; a < 2; ++a) {
            const float before = m[a];
            m[a] -= by, l[a] *= exp2_approx(before - m[a]);
        }
    }

    // rS becomes P̃ = 2^(unit S - m).
    template <int Size>
    DEVICE void weights(float (&rS)[Size], float unit) {
        const float to[2] = {Leeway::OFFSET - m[0], Leeway::OFFSET - m[1]};
        float sum[2];
#pragma unroll
        for (int e = 0; e < Size; e += 2) {
            const int a = row_of(e);
            rS[e] = exp2_approx(rS[e] * unit + to[a]), rS[e + 1] = exp2_approx(rS[e + 1] * unit + to[a]);
            sum[a] = e < 4 ? rS[e] + rS[e + 1] : sum[a] + (rS[e] + rS[e + 1]);
        }
#pragma unroll
        for (int a = 0; a < 2; ++a) l[a] = l[a] * alpha[a] + sum[a];
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
        return l[a] == 0.f ? NEG_INF : (m[a] - Leeway::OFFSET + log2_approx(l[a])) * 0.6931471805599453f;
    }
};

// rO = diag(x) rO
template <int Size>
DEVICE void scale_rows(float (&rO)[Size], const float (&x)[2]) {
#pragma unroll
    for (int e = 0; e < Size; ++e) rO[e] *= x[row_of(e)];
}
