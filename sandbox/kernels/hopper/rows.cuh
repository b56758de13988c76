// One warpgroup's 64 rows of a row block: which keys they see, where their tiles lie, how their results leave.
//
// A thread has two of them, in its accumulators: softmax.cuh.
#pragma once

#include "producers.cuh"
#include "softmax.cuh"

constexpr int THREADS = 128 * (WARPGROUPS + WARP_SPECIALIZED);
constexpr int LAUNCHED = 65536 / THREADS / 8 * 8;  // registers a thread starts with
constexpr int TAKEN = WARPGROUPS == 4 ? 112 : WARPGROUPS == 3 ? 160 : d * BYTES <= 128 ? 232 : 240;  // a consumer has,
constexpr int GIVEN = WARPGROUPS >= 3 ? 32 : d * BYTES <= 128 ? 40 : 24;  // and a producer keeps
static_assert(!WARP_SPECIALIZED || GIVEN + WARPGROUPS * TAKEN <= THREADS / 128 * LAUNCHED, "more would wait for ever");

// tanh x, off by 2⁻²² of 1.
DEVICE float tanh_far(float x) { return 1.f - __fdividef(2.f, 1.f + exp2_approx(x * 2.8853900817779268f)); }

// tanh x, off by 2⁻²² of itself; for |x| < 1/2: a polynomial, fitted.
DEVICE float tanh_near_0(float x) {
    const float s = x * x;
    return x + x * s * (-0.33333144f + s * (0.13325879f + s * (-0.053045493f + s * 0.017241491f)));
}

// tanh x, off by 2⁻²² of itself.
DEVICE float tanh_fast(float x) { return fabsf(x) < .5f ? tanh_near_0(x) : tanh_far(x); }

struct Rows {
    static constexpr int FIRST_NAME = Turns<WARPGROUPS, PING_PONG>::FIRST_NAME + WARPGROUPS;  // of their named barriers
    Shared &s;
    const TensorMap &O;
    float *LSE;
    const Shape &shape;
    const int warpgroup, warp, lane;
    Work w;
    int skipped = 0;  // key blocks of this row block that its other warpgroups alone see
    int i0;           // the warpgroup's first row, which is below 0 where it has none
    int row;          // this thread's first row; its second is 8 further

    DEVICE Rows(Shared &s, const TensorMap &O, float *LSE, const Shape &shape, int warpgroup)
        : s(s), O(O), LSE(LSE), shape(shape), warpgroup(warpgroup), warp(threadIdx.x / 32 % 4), lane(threadIdx.x % 32) {}

    // The next row block, if there is one.
    DEVICE bool hear(Next &next) {
        const bool more = next.hear(w);
        next.heard();
        i0 = w.i0 + 64 * warpgroup;
        row = i0 + 16 * warp + lane / 4;
        if (BANDED && WARP_SPECIALIZED) {  // the loader waits for all, who would wait for its turns
            const int seen = min(i0 + 64, shape.N_q) + shape.hi;  // keys before this one
            const int end = max((seen + Bc - 1) / Bc, w.first + 1);
            skipped = max(0, min(w.end - end, STAGES - 1)), w.end -= skipped;
        }
        return more;
    }

    // Whether the row block has rows of this warpgroup.  With no band only the last ones may have none (Order).
    DEVICE bool present() const { return BANDED || !WARP_SPECIALIZED || i0 < shape.N_q; }

    // One that has none: the others go on as if it computed.
    template <class Turn>
    DEVICE void pass_by(Ring<1> &Q, Ring<STAGES> &K, Ring<STAGES> &V, const Turn &turn) const {
        Q.skip();
#pragma unroll 1
        for (int j = w.end - 1; j >= w.first; --j) {
            K.skip();
            if (j < w.end - 1) turn.wait(), turn.pass();
            V.skip();
        }
        if (O_APART) return;
        named_sync(FIRST_NAME + WARPGROUPS, 128 * WARPGROUPS);
        if (threadIdx.x % 128 == 0) barrier_arrive(shared_address(s.O_here));
    }

    // Where this lane's row of the c-th 32 bytes of a tile [64, ·] lies: its first 16 bytes, or the others.
    template <int Width = 128>
    DEVICE u32 columns_at(u32 tile, int c) const {
        constexpr int CHUNKS = Width / 16;
        const int r = 16 * warp + lane % 16, chunk = 2 * c + lane / 16;
        return tile + chunk / CHUNKS * (64 * Width) + r * Width + (chunk % CHUNKS ^ r * Width / 128 % CHUNKS) * 16;
    }

    // Key blocks [first, end) whose every key every row of the warpgroup sees.
    DEVICE int first_whole() const {
        const int last = min(i0 + 64, shape.N_q) - 1;
        return BANDED ? max(w.first, (last + shape.lo + Bc - 1) / Bc) : w.first;
    }

    DEVICE int end_whole() const {
        const int seen = BANDED ? min(shape.N_k, i0 + shape.hi + 1) : shape.N_k;
        return max(w.first, seen / Bc);
    }

    // S scaled, and capped: by c·tanh(S/c).
    DEVICE void score(float (&rS)[Bc / 2], float scale) const {
        const float by = CAPPED ? fmaxf(LOWEST, fminf(scale / shape.softcap, -LOWEST)) : scale;  // finite: 0 stays 0
#pragma unroll
        for (int e = 0; e < Bc / 2; ++e) rS[e] *= by;
        if (!CAPPED) return;
        float most = 0.f;
#pragma unroll
        for (int e = 0; e < Bc / 2; ++e) most = fmaxf(most, fabsf(rS[e]));
        if (BYTES == 1 || __any_sync(~0u, most >= .5f)) {
#pragma unroll
            for (int e = 0; e < Bc / 2; ++e) rS[e] = shape.softcap * (BYTES == 1 ? tanh_far(rS[e]) : tanh_fast(rS[e]));
        } else {  // most scores are far below their cap
#pragma unroll
            for (int e = 0; e < Bc / 2; ++e) rS[e] = shape.softcap * tanh_near_0(rS[e]);
        }
    }

    DEVICE void mask(float (&rS)[Bc / 2], int j) const {
        const int key = j * Bc + column_of(0, lane), last = shape.N_k - 1 - key;  // columns are counted from key
#pragma unroll
        for (int e = 0; e < Bc / 2; ++e) {
            const int i = row + 8 * row_of(e) - key;
            if (column_of(e, 0) > (BANDED ? min(last, i + shape.hi) : last)) rS[e] = NEG_INF;
        }
        if (BANDED && shape.lo > -shape.N_q)  // a window: keys before it
#pragma unroll
            for (int e = 0; e < Bc / 2; ++e)
                if (column_of(e, 0) < row + 8 * row_of(e) - key + shape.lo) rS[e] = NEG_INF;
    }

    // O in 16 bits to its tile, and out.
    DEVICE void send(const float (&rO)[d / 2]) const {
        const u32 name = FIRST_NAME + warpgroup;
        const u32 sO = shared_address(O_APART ? s.sO[warpgroup] : &s.sV[0][0] + warpgroup * O_BYTES);
        if (!O_APART) named_sync(FIRST_NAME + WARPGROUPS, 128 * WARPGROUPS);  // nobody reads V any more
        if (O_APART && threadIdx.x % 128 == 0) copies_out_read();
        if (O_APART) named_sync(name, 128);  // the O of before has left
#pragma unroll
        for (int c = 0; c < d / 16; ++c) {
            const float *x = rO + 8 * c;
            store_matrices(columns_at(sO, c), pack<BF16>(x[0], x[1]), pack<BF16>(x[2], x[3]), pack<BF16>(x[4], x[5]),
                           pack<BF16>(x[6], x[7]));
        }
        async_fence();
        named_sync(name, 128);
        if (threadIdx.x % 128 == 0) {
            if (!O_APART) {
                barrier_arrive(shared_address(s.O_here));
            } else {
                for (int p = 0; p < O_PANELS && (!BANDED || i0 >= 0); ++p)
                    copy_out(O, sO + p * O_PANEL, 64 * p, w.i0 + 64 * warpgroup, w.head, w.batch);
                copies_out_commit();
            }
        }
    }

    // LSE = m + log l, of the rows of `w`
    template <class Leeway>
    DEVICE void tell(const Softmax<Leeway> &softmax, const Work &w) const {
        float *to = LSE + (static_cast<long long>(w.batch) * shape.H + w.head) * shape.N_q;
#pragma unroll
        for (int a = 0; a < 2; ++a) {
            const int i = w.i0 + 64 * warpgroup + 16 * warp + lane / 4 + 8 * a;
            if (lane % 4 == 0 && static_cast<u32>(i) < shape.N_q) store(to + i, softmax.lse(a));
        }
    }
};
