// FlashAttention-3, forward, for Hopper, in 8 bits: both products take e4m3, with a scale for each block.
// [FA3, 2407.08608, Algorithms 1 and 2, §3.3]
//
// It is fwd_v3.cu, but for four things:
//
//     V is Vᵀ        8-bit products sum along rows, so V comes transposed; and its keys lie in the order in which a thread
//                    has them in P̃ after the first product, so that P̃ needs no exchange between lanes
//     P̃ is larger   by 2^8, for e4m3 to have room for small ones; l sums it before it is rounded
//     scales         they go into the softmax's exponent (scales.cuh)
//     O is rescaled  where P̃ would be too large, not where it has grown a lot: e4m3 ends at 448
//
// Compile-time, by -D: as fwd_v3.cu, where Q_IN_REGISTERS counts 32 columns; BLOCKED: scales of blocks, else of heads;
// TWO_LEVEL: tensor cores, which keep 13 bits or so of a sum of 8-bit products, sum no more than a block.
#define EIGHT_BITS 1
#include "rows.cuh"
#include "scales.cuh"
#include "trace.cuh"
#include "wgmma.cuh"

constexpr int HELD = Q_IN_REGISTERS;  // 32 columns of Q each, read once a row block; every product reads the others
constexpr float LOG2_E = 1.4426950408889634f;

// ---- a consumer warpgroup: 64 rows ------------------------------------------------------------------------------------

struct Consumer : Rows {
    Ring<1> Q{s.Q[warpgroup]};
    Ring<STAGES> K{s.K}, V{s.V};
    Turns<WARPGROUPS, PING_PONG> turn{warpgroup};
    Trace trace;
    const Scales &scales;
    float unit;   // of S, in powers of 2; but for K's scale, where blocks have one
    Strip strip;  // scales of K and of V, where blocks have them
    float of_K;   // the scale of the block under way
    float sunk;   // powers of 2 that V's scales have put m up by
    float sigma;  // the scale of V that is visited last
    Softmax<In8Bits> softmax;
    float rS[Bc / 2];             // S, then P̃  [64, Bc]
    u32 rP[Bc / 8];               // P̃ in 8 bits, four to a register
    u32 rQ[HELD ? 4 * HELD : 1];  // Q in 8 bits  [64, 32 HELD]
    float rO[d / 2];              // O  [64, d]
    float rT[d / 2];              // P̃ V of one block, where O is summed in two levels

    DEVICE Consumer(Shared &s, const TensorMap &O, float *LSE, const Shape &shape, u32 *marks, int warpgroup,
                    const Scales &scales)
        : Rows(s, O, LSE, shape, warpgroup), trace(marks, blockIdx.x * WARPGROUPS + warpgroup), scales(scales) {}

    DEVICE void run() {
        Next next{&s.slot, s.told};
        trace.enter(FOR_WORK);
        bool more = hear(next);
        begin(more && present());
        while (more && present()) {
            take_scales();
            softmax = {};
#pragma unroll
            for (int e = 0; e < d / 2; ++e) rO[e] = 0.f;
            attend();
            trace.enter(FOR_O), take_PV();
            V.release(), V.next();
            finish();
            const Work done = w;
            trace.enter(FOR_WORK), more = hear(next);
            begin(more && present());
            tell(softmax, done);  // under the next rows' first product
        }
        trace.leave();
        products_wait<0>(rS);
        for (; more; more = hear(next)) pass_by(Q, K, V, turn);
        if (threadIdx.x % 128 == 0) copies_out_read();
    }

    // The scale of these rows of Q, and of K and V: of all, where there is but one, else of the first blocks.
    DEVICE void take_scales() {
        const int head = w.batch * shape.H + w.head, block = max(0, min(i0, shape.N_q - 1)) / scales.q_rows;
        unit = load(scales.Q + head * scales.q_blocks + min(block, scales.q_blocks - 1)) * shape.scale * LOG2_E;
        const int blocks = head / shape.group * scales.kv_blocks;
        strip.K = scales.K + blocks, strip.V = scales.V + blocks, of_K = 1.f;
        if (BLOCKED) sunk = 0.f, strip.last = w.end - 1, strip.take(w.end - 1, lane), sigma = load(strip.V + w.first);
        else unit *= load(strip.K), sigma = load(strip.V);
    }

    // Those of block j.
    DEVICE void take_scale(int j) {
        if (!BLOCKED) return;
        of_K = __shfl_sync(~0u, strip.of_K, j);  // lane j % 32
        if (of_K >= 0.f) return;
        of_K = -of_K;
        if (const float rise = __shfl_sync(~0u, strip.rise, j); rise != 0.f) follow_V(rise);
        if (j % STRIP == 0 && j > w.first) strip.take(j - 1, lane);
    }

    // V's scale is so many powers of 2 larger than that of the block before.
    DEVICE void follow_V(float rise) {
        softmax.lower(rise), sunk = fmaxf(sunk - rise, 0.f);
        if (sunk <= MOST_SUNK) return;
        const float by = exp2_approx(sunk);  // at once: to be kept for when O is rescaled anyway, it costs every step
        softmax.lower(sunk), sunk = 0.f;
        products_wait<0>(rO), scale_rows(rO, {by, by});
        if (TWO_LEVEL) scale_rows(rT, {by, by});
    }

    DEVICE void skip_K() {
        for (int n = 0; n < skipped; ++n) K.skip(), turn.wait(), turn.pass();
    }

    DEVICE void skip_V() {
        for (int n = 0; n < skipped; ++n) V.skip();
    }

    DEVICE void begin(bool more) {
        if (more) {
            trace.enter(FOR_Q), Q.wait();
            take_Q();
            trace.enter(FOR_K), skip_K(), K.wait();
        }
        scores();
    }

    DEVICE void attend() {
        int j = w.end - 1;
        first(j--);
        skip_V();
        int end = end_whole();
        const int first_of_whole = first_whole();
        do {  // the same code for both kinds of cut ones, which takes long enough to compile
            for (; BANDED && j >= end; --j) step<true>(j);
            for (; j >= first_of_whole; --j) step<false>(j);
            end = w.first;
        } while (BANDED && j >= end);
        trace.enter(FOR_V), V.wait();
        weigh();
    }

    DEVICE void first(int j) {
        take_scale(j);
        trace.enter(FOR_S), products_wait<0>(rS);
        trace.enter(SOFTMAX);
        release_K(j);
        exponentials<true, true>(j);
        take_P();
    }

    // S_j = Q K_jᵀ is under way while O += P̃ V of the block before begins; then the softmax of S_j runs under that.
    template <bool MASKED>
    DEVICE void step(int j) {
        trace.enter(FOR_K), K.wait();
        trace.enter(FOR_TURN), turn.wait();
        scores();
        trace.enter(FOR_V), V.wait();
        weigh();
        turn.pass();
        take_scale(j);
        trace.enter(FOR_S), products_wait<OVERLAP ? 1 : 0>(rS);
        trace.enter(SOFTMAX);
        release_K(j);
        exponentials<MASKED>(j);
        settled(rS);
        trace.enter(FOR_O);
        if (TWO_LEVEL) take_PV();
        if (softmax.changed()) products_wait<0>(rO), scale_rows(rO, softmax.alpha);
        products_wait<0>(rO);  // not before the softmax: ptxas would move it there, but for the branch
        V.release(), V.next();
        take_P();
    }

    template <bool MASKED, bool FIRST = false>
    DEVICE void exponentials(int j) {
        float of_S = unit * of_K;
        if (SCORED) score(rS, of_S / LOG2_E), of_S = LOG2_E;
        if (MASKED) mask(rS, j);
        softmax.template follow<FIRST>(rS, of_S), softmax.weights(rS, of_S);
    }

    // S_j is there, so that the next K may come; if it was the last one, the next Q, too.
    DEVICE void release_K(int j) {
        K.release(), K.next();
        if (HELD < d / 32 && j == w.first) Q.release(), Q.next();
    }

    // Registers take all of Q or nothing; if all, the next Q may come.
    DEVICE void take_Q() {
        const u32 sQ = shared_address(s.sQ[warpgroup]);
#pragma unroll
        for (int c = 0; c < HELD; ++c) load_matrices(columns_at<WIDTH>(sQ, c), rQ + 4 * c);
        if (HELD == d / 32) {
            __syncwarp(~0u);  // all lanes have read
            Q.release(), Q.next();
        }
    }

    // S = Q Kᵀ  [64, Bc]
    DEVICE void scores() {
        trace.enter(QK);
        const u64 q = by_columns(shared_address(s.sQ[warpgroup]), WIDTH);
        const u64 k = further(by_columns(shared_address(s.sK[0]), WIDTH), K.stage * (KV_BYTES >> 4));
        products_begin(), made_anew(rS);
#pragma unroll
        for (int c = 0; c < d / 32; ++c) {
            const int panel = c / (WIDTH / 32), inside = c % (WIDTH / 32) * NEXT_COLUMNS;
            const int in_Q = panel * (Q_PANEL >> 4) + inside, in_K = panel * (KV_PANEL >> 4) + inside;
            if (c < HELD) Product<Bc, E4M3>::columns(rS, rQ + 4 * c, k, in_K, c > 0);
            else Product<Bc, E4M3>::tiles(rS, q, in_Q, k, in_K, c > 0);
        }
        products_commit();
    }

    // O += P̃ V  [64, d]
    DEVICE void weigh() {
        trace.enter(PV);
        float(&sum)[d / 2] = TWO_LEVEL ? rT : rO;
        const u64 v = further(by_columns(shared_address(s.sV[0]), DEEP), V.stage * (KV_BYTES >> 4));
        products_begin();
#pragma unroll
        for (int c = 0; c < Bc / 32; ++c) {
            const int panel = c / (DEEP / 32), inside = c % (DEEP / 32) * NEXT_COLUMNS;
            Product<d, E4M3>::columns(sum, rP + 4 * c, v, panel * (d * DEEP >> 4) + inside, !TWO_LEVEL || c > 0);
        }
        products_commit();
    }

    DEVICE void take_PV() {
        products_wait<0>(TWO_LEVEL ? rT : rO);
        if (TWO_LEVEL)
#pragma unroll
            for (int e = 0; e < d / 2; ++e) rO[e] += rT[e];
    }

    // Of every 16 keys a thread has two neighbours, and two that are 8 further.
    DEVICE void take_P() {
        trace.enter(PACK);
#pragma unroll
        for (int e = 0; e < Bc / 8; ++e) {
            const float *x = rS + e / 2 * 8 + e % 2 * 2;
            rP[e] = pack_e4m3(x[0], x[1], x[4], x[5]);
        }
    }

    // O = σ diag(l)⁻¹ O, to its tile and out
    DEVICE void finish() {
        trace.enter(FINISH);
        softmax.join();
#pragma unroll
        for (int e = 0; e < d / 2; ++e) rO[e] *= softmax.alpha[row_of(e)] * sigma;
        if (softmax.blind())  // P̃ V is no 0 where V is not finite
#pragma unroll
            for (int e = 0; e < d / 2; ++e)
                if (softmax.l[row_of(e)] == 0.f) rO[e] = 0.f;
        send(rO);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    fwd_v3_fp8(const __grid_constant__ TensorMap Q, const __grid_constant__ TensorMap K,
               const __grid_constant__ TensorMap V, const __grid_constant__ TensorMap O, float *LSE, int *counter,
               u32 *marks, const __grid_constant__ Scales scales, const __grid_constant__ Shape shape) {
    Shared &s = *reinterpret_cast<Shared *>(shared_memory() + (0u - shared_address(shared_memory())) % 1024);
    if (threadIdx.x == 0) {
        prefetch(Q), prefetch(K), prefetch(V), prefetch(O);
        s.init();
    }
    __syncthreads();

    const int warpgroup = uniform(~0u, threadIdx.x / 128);
    if (warpgroup == WARPGROUPS) {
        give_registers<GIVEN>();
        produce(s, Q, K, V, O, shape, counter);
    } else {
        take_registers<TAKEN>();
        Consumer(s, O, LSE, shape, marks, warpgroup, scales).run();
    }
}
