// FlashAttention-3, forward, for Hopper: four producer warps, and two to four warpgroups that multiply.
// [FA3, 2407.08608, Algorithms 1 and 2]
//
// One thread block a multiprocessor walks through row blocks (persistent).  Of the producer warps one hands out row
// blocks, the others ask the copy engine for tiles of Q, K and V, STAGES ahead (producers.cuh); each consumer warpgroup
// owns 64 rows.  Its ideas, each a switch:
//
//     WARP_SPECIALIZED  producer warps; else a warp of those that multiply asks for tiles, too  (§3.1)
//     PING_PONG         while one warpgroup multiplies, another takes its softmax  (§3.1)
//     OVERLAP           Q Kᵀ of the next block runs under the softmax of this one  (§3.2)
//     DYNAMIC           a block that is free takes the next row block, and not each gridDim.x-th
//     LAZY              O is rescaled only where the maximum has grown a lot
//
// Compile-time, by -D: HEAD_DIM, WARPGROUPS, TILE_BC, STAGES (of K and of V), BF16, BANDED (causal, window), SCORED (scaled
// before the softmax), CAPPED (and capped), O_APART (O has a tile of its own; else it leaves through V's, and the next V
// waits), Q_IN_REGISTERS (so many times 16 columns), the switches; TRACE (trace.cuh).
#include "rows.cuh"
#include "trace.cuh"
#include "wgmma.cuh"

constexpr int HELD = Q_IN_REGISTERS;  // 16 columns of Q each, read once a row block; every product reads the others

// ---- a consumer warpgroup: 64 rows ------------------------------------------------------------------------------------

struct Consumer : Rows {
    Ring<1> Q{s.Q[warpgroup]};
    Ring<STAGES> K{s.K}, V{s.V};
    Turns<WARPGROUPS, PING_PONG> turn{warpgroup};
    Trace trace;
    float unit;  // of S, in powers of 2
    Softmax<In16Bits<LAZY>> softmax;
    float rS[Bc / 2];             // S, then P̃  [64, Bc]
    u32 rP[Bc / 4];               // P̃ in 16 bits, two to a register
    u32 rQ[HELD ? 4 * HELD : 1];  // Q in 16 bits  [64, 16 HELD]
    float rO[d / 2];              // O  [64, d]
    Loader &load;                 // idle where there are producers

    DEVICE Consumer(Shared &s, const TensorMap &O, float *LSE, const Shape &shape, u32 *marks, int warpgroup,
                    Loader &load)
        : Rows(s, O, LSE, shape, warpgroup), trace(marks, blockIdx.x * WARPGROUPS + warpgroup),
          unit((SCORED ? 1.f : shape.scale) * 1.4426950408889634f), load(load) {}

    DEVICE void run() {
        Next next{&s.slot, s.told};
        load.first_K(Q, K);
        trace.enter(FOR_WORK);
        bool more = hear(next);
        begin(more && present());
        while (more && present()) {
            load.first_V(V, w);
            softmax = {};
#pragma unroll
            for (int e = 0; e < d / 2; ++e) rO[e] = 0.f;
            attend();
            load.first_K(Q, K);  // of the next rows, under the last product
            trace.enter(FOR_O), products_wait<0>(rO);
            release_V(w.first);
            finish();
            const Work done = w;
            trace.enter(FOR_WORK), more = hear(next);
            begin(more && present());
            load.send_O(done), tell(softmax, done);  // under the next rows' first product
        }
        trace.leave();
        products_wait<0>(rS);
        for (; more; more = hear(next)) pass_by(Q, K, V, turn);
        if (threadIdx.x % 128 == 0) copies_out_read();
    }

    // The last blocks, which only rows of other warpgroups see, and the turns at them.  No more than come whatever this
    // warpgroup does: it waits for them one by one, and the others for their release.
    DEVICE void skip_K() {
        for (int n = 0; n < skipped; ++n) K.skip(), turn.wait(), turn.pass();
    }

    DEVICE void skip_V() {
        for (int n = 0; n < skipped; ++n) V.skip();
    }

    // S of the first block has no softmax to run under.  After the last row block it is of whatever lies there.
    DEVICE void begin(bool more) {
        if (more) {
            trace.enter(FOR_Q), Q.wait();
            take_Q();
            trace.enter(FOR_K), skip_K(), K.wait();
        }
        scores();
    }

    // The key blocks from last to first: those that the mask cuts, then whole ones, then, in a window, cut ones again.
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
        trace.enter(FOR_S), products_wait<0>(rS);
        trace.enter(SOFTMAX);
        release_K(j);
        if (SCORED) score(rS, shape.scale);
        mask(rS, j);
        softmax.follow(rS, unit), softmax.weights(rS, unit);
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
        trace.enter(FOR_S), products_wait<OVERLAP ? 1 : 0>(rS);
        trace.enter(SOFTMAX);
        release_K(j);
        if (SCORED) score(rS, shape.scale);
        if (MASKED) mask(rS, j);
        softmax.follow(rS, unit), softmax.weights(rS, unit);
        settled(rS);
        trace.enter(FOR_O);
        if (softmax.changed()) products_wait<0>(rO), scale_rows(rO, softmax.alpha);
        products_wait<0>(rO);  // not before the softmax: ptxas would move it there, but for the branch
        release_V(j + 1);
        take_P();
    }

    // S_j is there, so that the next K may come; if it was the last one, the next Q, too.
    DEVICE void release_K(int j) {
        K.release(), load.K(K.again(), w, j - STAGES), K.next();
        if (HELD < d / 16 && j == w.first) Q.release(), Q.next();
    }

    // P̃ V_j is there.
    DEVICE void release_V(int j) { V.release(), load.V(V.again(), w, j - STAGES), V.next(); }

    // Registers take what they have room for; if all, the next Q may come.
    DEVICE void take_Q() {
        const u32 sQ = shared_address(s.sQ[warpgroup]);
#pragma unroll
        for (int c = 0; c < HELD; ++c) load_matrices(columns_at(sQ, c), rQ + 4 * c);
        if (HELD == d / 16) {
            __syncwarp(~0u);  // all lanes have read
            Q.release(), Q.next();
        }
    }

    // S = Q Kᵀ  [64, Bc]
    DEVICE void scores() {
        trace.enter(QK);
        const u64 q = by_columns(shared_address(s.sQ[warpgroup]));
        const u64 k = further(by_columns(shared_address(s.sK[0])), K.stage * (KV_BYTES >> 4));
        products_begin();
#pragma unroll
        for (int c = 0; c < d / 16; ++c) {
            const int panel = c / 4, inside = c % 4 * NEXT_COLUMNS;
            const int in_Q = panel * (Q_PANEL >> 4) + inside, in_K = panel * (KV_PANEL >> 4) + inside;
            if (c < HELD) Product<Bc, BF16>::columns(rS, rQ + 4 * c, k, in_K, c > 0);
            else Product<Bc, BF16>::tiles(rS, q, in_Q, k, in_K, c > 0);
        }
        products_commit();
    }

    // O += P̃ V  [64, d]
    DEVICE void weigh() {
        trace.enter(PV);
        const u64 v = further(by_rows(shared_address(s.sV[0]), KV_PANEL), V.stage * (KV_BYTES >> 4));
        products_begin();
#pragma unroll
        for (int c = 0; c < Bc / 16; ++c) Product<d, BF16>::rows(rO, rP + 4 * c, v, c * NEXT_ROWS);
        products_commit();
    }

    DEVICE void take_P() {
        trace.enter(PACK);
#pragma unroll
        for (int e = 0; e < Bc / 4; ++e) rP[e] = pack<BF16>(rS[2 * e], rS[2 * e + 1]);
    }

    // O = diag(l)⁻¹ O, to its tile and out
    DEVICE void finish() {
        trace.enter(FINISH);
        softmax.join();
#pragma unroll
        for (int e = 0; e < d / 2; ++e) rO[e] *= softmax.alpha[row_of(e)];
        if (softmax.blind())  // P̃ V is no 0 where V is not finite
#pragma unroll
            for (int e = 0; e < d / 2; ++e)
                if (softmax.l[row_of(e)] == 0.f) rO[e] = 0.f;
        send(rO);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    fwd_v3(const __grid_constant__ TensorMap Q, const __grid_constant__ TensorMap K, const __grid_constant__ TensorMap V,
           const __grid_constant__ TensorMap O, float *LSE, int *counter, u32 *marks,
           const __grid_constant__ Shape shape) {
    Shared &s = *reinterpret_cast<Shared *>(shared_memory() + (0u - shared_address(shared_memory())) % 1024);
    if (threadIdx.x == 0) {
        prefetch(Q), prefetch(K), prefetch(V), prefetch(O);
        s.init();
    }
    __syncthreads();

    const int warpgroup = uniform(~0u, threadIdx.x / 128);
    if (WARP_SPECIALIZED && warpgroup == WARPGROUPS) {
        give_registers<GIVEN>();
        produce(s, Q, K, V, O, shape, counter);
    } else {
        if (WARP_SPECIALIZED) take_registers<TAKEN>();
        Loader load{s, Q, K, V, O, shape, counter};
        Consumer(s, O, LSE, shape, marks, warpgroup, load).run();
    }
}
