// Q, K, V from 16 bits to e4m3 in one pass: read once, rotated, scaled, V transposed.  [FA3, 2407.08608, §3.3]
//
// sandbox/quantize.py is the same in torch, bit for bit, and says what and why.  A thread block takes some rows of a head
// of Q, K or V at a time, a thread 32 numbers of a row: four chunks of 8, as far apart as there are lanes to a row.  While
// it works on them, those of the next ones are on their way to shared memory, each thread's to a place of its own.
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
    u32 flip[8];            // which signs change, of a lane's columns
};

constexpr int INFINITE = 0x7F800000;  // as an integer; NaN is more

DEVICE int column(int s, int lane) { return 8 * (s * LANES + lane); }

// The rows of a thread block at a time: of Q, K or V (0, 1, 2), of which batch and head, from i0 on.
struct alignas(16) Tile {
    int of, b, h, i0;

    DEVICE const Side &side(const Sides &sides) const { return of == 0 ? sides.Q : of == 1 ? sides.K : sides.V; }
    DEVICE int rows() const { return of == 0 ? Q_ROWS : KV_ROWS; }
};

DEVICE int count(const Sides &sides) {
    return sides.heads_q * sides.Q.tiles + sides.heads_kv * (sides.K.tiles + sides.V.tiles);
}

DEVICE Tile tile_at(const Sides &sides, int index) {
    const int of_Q = sides.heads_q * sides.Q.tiles, of_K = sides.heads_kv * sides.K.tiles;
    Tile tile;
    tile.of = index < of_Q ? 0 : index - of_Q < of_K ? 1 : 2;
    const Side &side = tile.side(sides);
    index -= tile.of == 0 ? 0 : tile.of == 1 ? of_Q : of_Q + of_K;
    const int bh = index / side.tiles;
    tile.i0 = index % side.tiles * tile.rows(), tile.b = bh / side.H, tile.h = bh % side.H;
    return tile;
}

// Where a thread's numbers of the next tile arrive, in 16 bits, two to a word.
struct Next {
    uint4 (*chunks)[THREADS];

    DEVICE void ask(const Sides &sides, const Tile &tile) const {
        const Side &side = tile.side(sides);
        const int t = anew(threadIdx.x), row = t / LANES, lane = t % LANES, i = tile.i0 + row;
        const bool there = row < tile.rows() && i < side.N;
        const char *from = static_cast<const char *>(side.from);
        if (there) from += 2 * (tile.b * side.batch + i * side.row + tile.h * side.head);
#pragma unroll
        for (int s = 0; s < 4; ++s) ask_16_bytes(&chunks[s][threadIdx.x], from + 2 * column(s, lane), there);
    }

    DEVICE void take(u32 (&two)[4][4]) const {
        asked_is_here();
#pragma unroll
        for (int s = 0; s < 4; ++s) {
            const uint4 four = chunks[s][threadIdx.x];
            two[s][0] = four.x, two[s][1] = four.y, two[s][2] = four.z, two[s][3] = four.w;
        }
    }
};

// Rows as this thread holds them: its place, and its numbers.
struct Piece {
    int row, lane;  // in the tile; in the row
    float x[32];    // chunk s·LANES + lane of the row at 8s

    DEVICE void take(const u32 (&two)[4][4]) {
#pragma unroll
        for (int e = 0; e < 16; ++e) unpack<BF16>(two[e / 4][e % 4], x[2 * e], x[2 * e + 1]);
    }

    // x diag(±1): those of the lane's word e are bits 31 - e and 15 - e
    DEVICE void change_signs(u32 (&two)[4][4], const u32 *flip) const {
        const u32 mine = flip[lane];
#pragma unroll
        for (int e = 0; e < 16; ++e) two[e / 4][e % 4] ^= mine << e & 0x80008000;
    }

    // x Hadamard / √d: butterflies between neighbours first, then between pairs, up to halves
    DEVICE void rotate() {
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

    // The largest |x|, as an integer; INFINITE or more where one is not finite.
    DEVICE int most() const {
        float most = 0.f;
#pragma unroll
        for (int e = 0; e < 32; ++e) most = max_or_nan(most, fabsf(x[e]));
        return __builtin_bit_cast(int, most);
    }

    // The largest that is finite.
    DEVICE int most_finite() const {
        float most = 0.f;
#pragma unroll
        for (int e = 0; e < 32; ++e) most = fmaxf(most, x[e] - x[e] == 0.f ? fabsf(x[e]) : 0.f);
        return __builtin_bit_cast(int, most);
    }

    // To its row in e4m3; what is not finite becomes NaN, as x - x does, which else is 0.
    template <bool Finite>
    DEVICE void put(unsigned char *row, float inverse) const {
#pragma unroll
        for (int s = 0; s < 4; ++s) {
            float y[8];
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                const float of = x[8 * s + e];
                y[e] = Finite ? of * inverse : of * inverse - (of - of);
            }
            store_8_bytes(row + column(s, lane), {pack_e4m3(y[0], y[1], y[2], y[3]), pack_e4m3(y[4], y[5], y[6], y[7])});
        }
    }
};

// Of a thread block: the largest |x| of each block that has a scale, and of what is finite of it.
struct Largest {
    static constexpr int OF_Q = Q_ROWS / Q_BLOCK, OF_KV = KV_ROWS / KV_BLOCK, BLOCKS = OF_Q > OF_KV ? OF_Q : OF_KV;
    int of[BLOCKS], finite[BLOCKS];

    DEVICE void clear() {
        if (threadIdx.x < BLOCKS) of[threadIdx.x] = finite[threadIdx.x] = 0;
    }

    // Of this thread's block; whether all x of the thread block are finite.
    DEVICE float find(const Piece &piece, int block, bool &all_finite) {
        const int most = largest(piece.most());
        if (threadIdx.x % 32 == 0) raise(of + block, most);
        all_finite = !__syncthreads_or(most >= INFINITE);
        if (all_finite) return __builtin_bit_cast(float, of[block]);
        const int less = largest(piece.most_finite());
        if (threadIdx.x % 32 == 0) raise(finite + block, less);
        __syncthreads();
        return __builtin_bit_cast(float, finite[block]);
    }
};

DEVICE float scale_of(float most) {
    return most == 0.f ? 1.f : fmaxf(most * (1.f / 448.f), 5.421010862427522e-20f);  // 2⁻⁶⁴
}

// The next one up, which a block of V has for its scale.
DEVICE float power_of_2(float scale) {
    return __builtin_bit_cast(float, (__builtin_bit_cast(u32, scale) + 0x7FFFFF) & 0xFF800000);
}

DEVICE int pad(int N) { return (N + 15) / 16 * 16; }

// Of a tile of V [KV_ROWS, d] to Vᵀ: of each 16 keys, key 8a + 2q + b to slot 4q + 2a + b.  A thread takes four columns.
DEVICE void transpose(const unsigned char *sV, unsigned char *to, int i0, int N) {
    for (int n = threadIdx.x; n < KV_ROWS / 16 * (d / 4); n += THREADS) {  // neighbours write 32 bytes side by side
        const int c = n / 2 % (d / 4) * 4, j0 = (n / (d / 2) * 2 + n % 2) * 16;
        if (i0 + j0 >= N) continue;
        u32 slots[4][4];
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            const u32 *row = reinterpret_cast<const u32 *>(sV + (j0 + 2 * q) * (d + 8) + c);
            constexpr int NEXT = (d + 8) / 4;
            const u32 a = row[0], b = row[NEXT], c = row[8 * NEXT], e = row[9 * NEXT];
            const u32 ab = __byte_perm(a, b, 0x5140), ce = __byte_perm(c, e, 0x5140);  // of columns 0 and 1
            const u32 AB = __byte_perm(a, b, 0x7362), CE = __byte_perm(c, e, 0x7362);  // of columns 2 and 3
            slots[0][q] = __byte_perm(ab, ce, 0x5410), slots[1][q] = __byte_perm(ab, ce, 0x7632);
            slots[2][q] = __byte_perm(AB, CE, 0x5410), slots[3][q] = __byte_perm(AB, CE, 0x7632);
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) store_16_bytes(to + static_cast<long long>(c + e) * pad(N) + i0 + j0, slots[e]);
    }
}

template <int ROWS, int Block, bool Rotated, bool Transposed>
DEVICE void take(const Side &side, const u32 *flip, const Tile &tile, u32 (&two)[4][4], Largest &largest_of,
                 unsigned char *sV) {
    const int i0 = tile.i0, b = tile.b, h = tile.h, bh = b * side.H + h;
    Piece piece;
    const int t = anew(threadIdx.x);
    piece.row = t / LANES, piece.lane = t % LANES;
    const bool mine = THREADS == ROWS * LANES || piece.row < ROWS;
    const int i = mine ? i0 + piece.row : side.N;
    if (Rotated) piece.change_signs(two, flip);
    piece.take(two);
    if (Rotated) piece.rotate();
    float *scales = side.scale + static_cast<long long>(bh) * side.blocks;
    if (STEP == AMAX) {
        int most = largest(piece.most());
        if (most >= INFINITE) most = largest(piece.most_finite());
        if (threadIdx.x % 32 == 0) raise(reinterpret_cast<int *>(scales), most);
        return;
    }
    bool all_finite = false;
    float scale;
    if (STEP == BLOCKS) {
        scale = scale_of(largest_of.find(piece, mine ? piece.row / Block : 0, all_finite));
        if (Transposed) scale = power_of_2(scale);
        if (piece.row % Block == 0 && piece.lane == 0 && i < side.N) scales[i / Block] = scale;
    } else {
        scale = scales[0];
    }
    const float inverse = 1.f / scale;
    unsigned char *to = Transposed ? sV + piece.row * (d + 8)
                                   : static_cast<unsigned char *>(side.to) +
                                         ((static_cast<long long>(b) * side.N + i) * side.H + h) * d;
    if (Transposed ? mine : i < side.N) {
        if (all_finite) piece.put<true>(to, inverse);
        else piece.put<false>(to, inverse);
    }
    if (Transposed) {
        __syncthreads();
        transpose(sV, static_cast<unsigned char *>(side.to) + static_cast<long long>(bh) * d * pad(side.N), i0, side.N);
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

extern "C" __global__ void __launch_bounds__(THREADS, 1024 / THREADS) quantize(const __grid_constant__ Sides sides) {
    unsigned char *sV = shared_memory();  // [KV_ROWS, d + 8]
    if constexpr (STEP == TRANSPOSE) return turn(sides.V, blockIdx.x, sV);
    const Next next{reinterpret_cast<uint4(*)[THREADS]>(sV + KV_ROWS * (d + 8))};
    Tile *tiles = reinterpret_cast<Tile *>(next.chunks + 4);     // four: of this turn, and of the next two
    Largest *largest_of = reinterpret_cast<Largest *>(tiles + 4);  // two: of this turn, and of the next one
    const int turns = (count(sides) - blockIdx.x + gridDim.x - 1) / gridDim.x;
    if (threadIdx.x == 0)
        for (int n = 0; n < min(2, turns); ++n) tiles[n] = tile_at(sides, blockIdx.x + n * gridDim.x);
    __syncthreads();
    next.ask(sides, tiles[0]);
#pragma unroll 1
    for (int n = 0; n < turns; ++n) {
        u32 two[4][4];
        next.take(two);
        if (n + 1 < turns) next.ask(sides, tiles[(n + 1) % 4]);
        if (threadIdx.x == 0 && n + 2 < turns) tiles[(n + 2) % 4] = tile_at(sides, blockIdx.x + (n + 2) * gridDim.x);
        const Tile &tile = tiles[n % 4];
        Largest &most = largest_of[n % 2];
        if (STEP == BLOCKS) most.clear();
        __syncthreads();  // and nobody reads the V of before any more
        if (tile.of == 0) take<Q_ROWS, Q_BLOCK, INCOHERENT, false>(sides.Q, sides.flip, tile, two, most, sV);
        else if (tile.of == 1) take<KV_ROWS, KV_BLOCK, INCOHERENT, false>(sides.K, sides.flip, tile, two, most, sV);
        else take<KV_ROWS, KV_BLOCK, false, true>(sides.V, sides.flip, tile, two, most, sV);
    }
}
