// Q, K, V from 16 bits to e4m3 in one pass: read once, rotated, scaled, V transposed.  [FA3, 2407.08608, §3.3]
//
// sandbox/quantize.py is the same in torch, bit for bit, and says what and why.  A thread block takes some rows of a head
// of Q, K or V, a thread 32 numbers of a row: four chunks of 8, as far apart as there are lanes to a row.
//
// Compile-time, by -D: HEAD_DIM, Q_ROWS and KV_ROWS (of a thread block), Q_BLOCK and KV_BLOCK (that share a scale, and
// divide them), BF16, INCOHERENT (Q and K are rotated), STEP:
//
//     BLOCKS     a scale for each block, from the block itself
//     AMAX       only the largest number of each head, for a scale that more than a block share
//     GIVEN      by the scales that are there
//     TRANSPOSE  no scales: V, which is in e4m3, to Vᵀ
#include "ptx.cuh"

constexpr int d = HEAD_DIM, LANES = d / 32;  // to a row
constexpr int THREADS = LANES * (Q_ROWS > KV_ROWS ? Q_ROWS : KV_ROWS);  // where there are fewer rows, some have none
enum Step { BLOCKS, AMAX, GIVEN, TRANSPOSE };

// [B, N, H, d] in 16 bits, 8 to be transposed, any strides; e4m3, [B, N, H, d] or Vᵀ [B, H, d, N_pad]; fp32 [B, H, blocks].
struct Side {
    const void *from;
    void *to;
    float *scale;
    long long batch, row, head;  // strides, in numbers
    int N, H, blocks, tiles;     // scales, and thread blocks, to a head
};

struct Sides {
    Side Q, K, V;
    int heads_q, heads_kv;  // of all batches
    u32 flip[8];            // bit c: column c changes its sign
};

// Rows as this thread holds them: its place, and its numbers.
struct Piece {
    int row, lane;  // in the tile; in the row
    float x[32];    // chunk s·LANES + lane of the row at 8s

    DEVICE static int column(int s, int lane) { return 8 * (s * LANES + lane); }

    DEVICE void read(const Side &side, int b, int h, int i) {
#pragma unroll
        for (int s = 0; s < 4; ++s) {
            u32 two[4] = {0, 0, 0, 0};
            if (i < side.N)
                load_16_bytes(static_cast<const char *>(side.from) +
                                  2 * (b * side.batch + i * side.row + h * side.head + column(s, lane)),
                              two);
#pragma unroll
            for (int e = 0; e < 4; ++e) unpack<BF16>(two[e], x[8 * s + 2 * e], x[8 * s + 2 * e + 1]);
        }
    }

    // x diag(±1) Hadamard / √d: butterflies between neighbours first, then between pairs, up to halves
    DEVICE void rotate(const u32 *flip) {
#pragma unroll
        for (int s = 0; s < 4; ++s) {
            const int c = column(s, lane);
            const u32 bits = flip[c / 32] >> c % 32;
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                float &y = x[8 * s + e];
                y = __builtin_bit_cast(float, __builtin_bit_cast(u32, y) ^ (bits << (31 - e) & 0x80000000));
            }
        }
        butterflies<1>(), butterflies<2>(), butterflies<4>();
#pragma unroll
        for (int other = 1; other < LANES; other *= 2) {
            const float mine = lane & other ? -1.f : 1.f;
#pragma unroll
            for (int e = 0; e < 32; ++e) x[e] = mine * x[e] + __shfl_xor_sync(~0u, x[e], other);
        }
        butterflies<8>(), butterflies<16>();
#pragma unroll
        for (int e = 0; e < 32; ++e) x[e] *= d == 64 ? 0.125f : d == 256 ? 0.0625f : 0.08838834764831845f;
    }

    template <int Width>
    DEVICE void butterflies() {
#pragma unroll
        for (int e = 0; e < 32; ++e)
            if (!(e & Width)) {
                const float a = x[e], b = x[e + Width];
                x[e] = a + b, x[e + Width] = a - b;
            }
    }

    // The largest |x| that is finite.
    DEVICE float amax() const {
        float most = 0.f;
#pragma unroll
        for (int e = 0; e < 32; ++e) most = fmaxf(most, finite(x[e]) ? fabsf(x[e]) : 0.f);
        return most;
    }

    // Eight numbers in e4m3; what is not finite becomes NaN, as x - x does, which else is 0.
    DEVICE void scaled(int s, float inverse, u32 (&eight)[2]) const {
        float y[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) y[e] = x[8 * s + e] * inverse - (x[8 * s + e] - x[8 * s + e]);
        eight[0] = pack_e4m3(y[0], y[1], y[2], y[3]), eight[1] = pack_e4m3(y[4], y[5], y[6], y[7]);
    }
};

// The scale of the block that this thread's row is in: of the largest of its warps'.
template <int Block>
DEVICE float scale_of(float most, float *of_warp, int row) {
    constexpr int WARPS = Block * LANES / 32;
    most = largest(most);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = most;
    __syncthreads();
    const int first = row / Block * WARPS;
    for (int w = 0; w < WARPS; ++w) most = fmaxf(most, of_warp[first + w]);
    return most == 0.f ? 1.f : fmaxf(most * (1.f / 448.f), 5.421010862427522e-20f);  // 2⁻⁶⁴
}

DEVICE int pad(int N) { return (N + 15) / 16 * 16; }

// Of a tile of V [KV_ROWS, d] to Vᵀ: 32 keys of a column at a time, key 8a + 2q + b of 16 in slot 4q + 2a + b.
DEVICE void transpose(const unsigned char *sV, unsigned char *to, int i0, int N) {
    for (int n = threadIdx.x; n < KV_ROWS / 32 * d; n += THREADS) {
        const int c = n % d;
#pragma unroll
        for (int j0 = n / d * 32, end = j0 + 32; j0 < end; j0 += 16) {
            if (i0 + j0 >= N) return;
            u32 slots[4];
#pragma unroll
            for (int q = 0; q < 4; ++q) {
                const unsigned char *at = sV + (j0 + 2 * q) * (d + 8) + c;
                slots[q] = at[0] | at[d + 8] << 8 | at[8 * (d + 8)] << 16 | at[9 * (d + 8)] << 24;
            }
            store_16_bytes(to + static_cast<long long>(c) * pad(N) + i0 + j0, slots);
        }
    }
}

template <int ROWS, int Block, bool Rotated, bool Transposed>
DEVICE void take(const Side &side, const u32 *flip, int index, float *of_warp, unsigned char *sV) {
    const int bh = index / side.tiles, i0 = index % side.tiles * ROWS, b = bh / side.H, h = bh % side.H;
    Piece piece;
    piece.row = threadIdx.x / LANES, piece.lane = threadIdx.x % LANES;
    const bool mine = THREADS == ROWS * LANES || piece.row < ROWS;
    const int i = mine ? i0 + piece.row : side.N;
    piece.read(side, b, h, i);
    if (Rotated) piece.rotate(flip);
    float *scales = side.scale + static_cast<long long>(bh) * side.blocks;
    float most = piece.amax(), scale;
    if (STEP == AMAX) {
        most = largest(most);
        if (threadIdx.x % 32 == 0) raise(scales, most);
        return;
    }
    if (STEP == BLOCKS) {
        scale = scale_of<Block>(most, of_warp, mine ? piece.row : 0);
        if (piece.row % Block == 0 && piece.lane == 0 && i < side.N) scales[i / Block] = scale;
    } else {
        scale = scales[0];
    }
    const float inverse = 1.f / scale;
    unsigned char *to = static_cast<unsigned char *>(side.to);
#pragma unroll
    for (int s = 0; s < 4; ++s) {
        u32 eight[2];
        piece.scaled(s, inverse, eight);
        const int c = Piece::column(s, piece.lane);
        if (Transposed && mine) store_8_bytes(sV + piece.row * (d + 8) + c, eight);
        if (!Transposed && i < side.N)
            store_8_bytes(to + ((static_cast<long long>(b) * side.N + i) * side.H + h) * d + c, eight);
    }
    if (Transposed) {
        __syncthreads();
        transpose(sV, to + static_cast<long long>(bh) * d * pad(side.N), i0, side.N);
    }
}

// V in e4m3, 32 bytes a thread, to Vᵀ.
DEVICE void turn(const Side &side, int index, unsigned char *sV) {
    const int bh = index / side.tiles, i0 = index % side.tiles * KV_ROWS, b = bh / side.H, h = bh % side.H;
    const int row = threadIdx.x / LANES, lane = threadIdx.x % LANES, i = i0 + row;
#pragma unroll
    for (int s = 0; s < 2; ++s) {
        const int c = 16 * (s * LANES + lane);
        u32 x[4] = {0, 0, 0, 0};
        if (i < side.N)
            load_16_bytes(static_cast<const char *>(side.from) + b * side.batch + i * side.row + h * side.head + c, x);
        store_8_bytes(sV + row * (d + 8) + c, {x[0], x[1]});
        store_8_bytes(sV + row * (d + 8) + c + 8, {x[2], x[3]});
    }
    __syncthreads();
    transpose(sV, static_cast<unsigned char *>(side.to) + static_cast<long long>(bh) * d * pad(side.N), i0, side.N);
}

extern "C" __global__ void __launch_bounds__(THREADS) quantize(const __grid_constant__ Sides sides) {
    unsigned char *shared = shared_memory();  // a tile of V [KV_ROWS, d + 8], and a number a warp
    float *of_warp = reinterpret_cast<float *>(shared + KV_ROWS * (d + 8));
    int index = blockIdx.x;
    if constexpr (STEP == TRANSPOSE) return turn(sides.V, index, shared);
    const int of_Q = sides.heads_q * sides.Q.tiles, of_K = sides.heads_kv * sides.K.tiles;
    if (index < of_Q)
        take<Q_ROWS, Q_BLOCK, INCOHERENT, false>(sides.Q, sides.flip, index, of_warp, shared);
    else if ((index -= of_Q) < of_K)
        take<KV_ROWS, KV_BLOCK, INCOHERENT, false>(sides.K, sides.flip, index, of_warp, shared);
    else
        take<KV_ROWS, KV_BLOCK, false, true>(sides.V, sides.flip, index - of_K, of_warp, shared);
}
