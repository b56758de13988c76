// Q, K, V from 16 bits to e4m3 in one pass: read once, rotated, scaled, V transposed.  [FA3, 2407.08608, §3.3]
//
// sandbox/quantize.py is the same in torch, bit for bit, and says what and why.  A thread block takes some rows of a head
// of Q, K or V at a time, a thread 64 numbers: of Q and K 64 columns of a row, of V pairs of keys, which ldmatrix turns on
// their way.  Tiles come and go by the copy engine: while one is worked on in registers, the next one is under way to where
// it was, and what became of the one before is on its way out.
//
// Compile-time, by -D: HEAD_DIM, Q_ROWS and KV_ROWS (of a thread block), Q_BLOCK and KV_BLOCK (that share a scale, and
// divide them), BF16, INCOHERENT (Q and K are rotated), STEP:
//
//     BLOCKS     a scale for each block, from the block itself
//     AMAX       only the largest number of each head, for a scale that more than a block share
//     GIVEN      by the scales that are there
//     TRANSPOSE  no scales: V, which is in e4m3, to Vᵀ
#include "ptx.cuh"

enum Step { BLOCKS, AMAX, GIVEN, TRANSPOSE };
constexpr int d = HEAD_DIM, NUMBERS = 64, LANES = d / NUMBERS;  // of a thread; to a row
constexpr int ROWS = Q_ROWS > KV_ROWS ? Q_ROWS : KV_ROWS;       // where there are fewer, some warps have none
constexpr int ROWS_A_WARP = 32 / LANES, THREADS = ROWS * LANES;
constexpr int RESIDENT = THREADS > 384 ? 1 : THREADS > 192 ? 2 : 640 / THREADS;  // of a multiprocessor, by its registers
constexpr int BYTES = STEP == TRANSPOSE ? 1 : 2;  // of a number that comes
constexpr int MOST_IN_A_BOX = 256;                // rows

// Tiles are rows of panels, each as wide as its swizzle: of what comes, what leaves, and what leaves as Vᵀ; in bytes.
constexpr int WIDTH = d * BYTES == 64 ? 64 : 128, WIDE = d == 64 ? 64 : 128;
constexpr int DEEP = KV_ROWS % 128 == 0 ? 128 : KV_ROWS % 64 == 0 ? 64 : 32;

constexpr int INFINITE = 0x7F800000;  // as an integer; NaN is more

// [B, H, blocks] scales of Q, K or V [B, N, H, d], and thread blocks to a head.
struct Side {
    float *scale;
    int N, H, blocks, tiles;
};

struct Sides {
    Side Q, K, V;
    int heads_q, heads_kv;  // of all batches
    u32 flip[8];            // which signs change, of a lane's columns: two words each
};

struct Maps {
    const TensorMap &Q, &K, &V, &to_Q, &to_K, &to_V;
};

// The rows of a thread block at a time: of Q, K or V (0, 1, 2), of which batch and head, from i0 on.
struct Tile {
    int of, b, h, i0;

    DEVICE const Side &side(const Sides &sides) const { return of == 0 ? sides.Q : of == 1 ? sides.K : sides.V; }
    DEVICE int rows() const { return of == 0 ? Q_ROWS : KV_ROWS; }
};

// The index-th; `of` is below 0 where there is none.
DEVICE Tile tile_at(const Sides &sides, int index) {
    const int of_Q = sides.heads_q * sides.Q.tiles, of_K = sides.heads_kv * sides.K.tiles;
    const int of_V = sides.heads_kv * sides.V.tiles;
    Tile tile{-1};
    if (index < of_Q) tile.of = 0;
    else if ((index -= of_Q) < of_K) tile.of = 1;
    else if ((index -= of_K) < of_V) tile.of = 2;
    else return tile;
    const Side &side = tile.side(sides);
    const int bh = index / side.tiles;
    tile.i0 = index % side.tiles * tile.rows(), tile.b = bh / side.H, tile.h = bh % side.H;
    return tile;
}

// Where byte b of row r of a panel lies.
template <int Width>
DEVICE u32 swizzled(int r, int b) {
    const u32 at = r * Width + b;
    return at ^ (at >> 3 & (Width - 16));
}

// Of a tile: the largest |x| of each block that has a scale.
struct Largest {
    static constexpr int OF_Q = Q_ROWS / Q_BLOCK, OF_KV = KV_ROWS / KV_BLOCK, BLOCKS = OF_Q > OF_KV ? OF_Q : OF_KV;
    int of[BLOCKS];

    DEVICE void clear() {
        if (threadIdx.x < BLOCKS) of[threadIdx.x] = 0;
    }
};

struct Shared {
    alignas(1024) unsigned char in[ROWS * d * BYTES];  // panels [rows, WIDTH]
    alignas(1024) unsigned char out[ROWS * d];         // panels [rows, WIDE], or [d, DEEP]
    Tile tiles[4];       // of the turn before, of this one and of the next one
    Largest largest[2];  // of this turn, and of the next one
    u64 arrived;
};

// ---- the copy engine, which one thread asks ---------------------------------------------------------------------------

// What follows is what one warp does, all its lanes.
DEVICE Tile heard(const Tile &tile) {
    return {uniform(~0u, tile.of), uniform(~0u, tile.b), uniform(~0u, tile.h), uniform(~0u, tile.i0)};
}

DEVICE void ask(Shared &s, const Maps &maps, const Tile &tile) {
    const TensorMap &map = tile.of == 0 ? maps.Q : tile.of == 1 ? maps.K : maps.V;
    const int rows = tile.rows(), box = rows > MOST_IN_A_BOX ? rows / 2 : rows;
    const u32 to = shared_address(s.in), arrived = shared_address(&s.arrived);
    if (threadIdx.x % 32) return;
    barrier_expect(arrived, rows * d * BYTES);
#pragma unroll
    for (int p = 0; p < d * BYTES / WIDTH; ++p)
        for (int r = 0; r < rows; r += box)
            copy_in(to + p * (ROWS * WIDTH) + r * WIDTH, map, arrived, p * (WIDTH / BYTES), tile.i0 + r, tile.h, tile.b,
                    EVICT_FIRST);
}

DEVICE void send(Shared &s, const Maps &maps, const Tile &tile) {
    const u32 from = shared_address(s.out);
    if (threadIdx.x % 32) return;
    if (tile.of == 2) {
#pragma unroll
        for (int j = 0; j < KV_ROWS; j += DEEP) copy_out(maps.to_V, from + j * d, tile.i0 + j, 0, tile.h, tile.b);
    } else {
        const TensorMap &map = tile.of == 0 ? maps.to_Q : maps.to_K;
        const int rows = tile.rows(), box = rows > MOST_IN_A_BOX ? rows / 2 : rows;
#pragma unroll
        for (int p = 0; p < d / WIDE; ++p)
            for (int r = 0; r < rows; r += box)
                copy_out(map, from + p * (ROWS * WIDE) + r * WIDE, p * WIDE, tile.i0 + r, tile.h, tile.b);
    }
    copies_out_commit();
}

// ---- what a thread has of a tile --------------------------------------------------------------------------------------

// 64 numbers.  A row of Q or K is in lanes that are ROWS_A_WARP apart, 64 columns each.
struct Numbers {
    float x[NUMBERS];

    DEVICE void unpack_all(const u32 (&two)[NUMBERS / 2]) {
#pragma unroll
        for (int w = 0; w < NUMBERS / 2; ++w) unpack<BF16>(two[w], x[2 * w], x[2 * w + 1]);
        settled(x);
    }

    // The largest |x|, as an integer; INFINITE or more where one is not finite.
    DEVICE int most() const {
        float most = 0.f;
#pragma unroll
        for (int e = 0; e < NUMBERS; ++e) most = max_or_nan(most, fabsf(x[e]));
        return __builtin_bit_cast(int, most);
    }

    // The largest that is finite.
    DEVICE int most_finite() {
        settled(x);  // what was computed from it is not kept until here
        float most = 0.f;
#pragma unroll
        for (int e = 0; e < NUMBERS; ++e) most = fmaxf(most, x[e] - x[e] == 0.f ? fabsf(x[e]) : 0.f);
        return __builtin_bit_cast(int, most);
    }

    // x Hadamard / √d: butterflies between neighbours first, then between pairs, up to halves
    DEVICE void rotate() {
        butterflies<1>(), butterflies<2>(), butterflies<4>(), butterflies<8>(), butterflies<16>(), butterflies<32>();
#pragma unroll
        for (int other = ROWS_A_WARP; other < 32; other *= 2) {
            const float mine = threadIdx.x & other ? -1.f : 1.f;
#pragma unroll
            for (int e = 0; e < NUMBERS; ++e) x[e] = mine * x[e] + __shfl_xor_sync(~0u, x[e], other);
        }
#pragma unroll
        for (int e = 0; e < NUMBERS; ++e) x[e] *= d == 64 ? 0.125f : d == 256 ? 0.0625f : 0.08838834764831845f;
    }

    template <int Width>
    DEVICE void butterflies() {
#pragma unroll
        for (int e = 0; e < NUMBERS; ++e)
            if (!(e & Width)) {
                const float a = x[e], b = x[e + Width];
                x[e] = a + b, x[e + Width] = a - b;
            }
    }

    // Four of them in e4m3; what is not finite becomes NaN, as x - x does, which else is 0.
    template <bool Finite>
    DEVICE u32 packed(int e, float inverse) const {
        float y[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) y[n] = Finite ? x[e + n] * inverse : x[e + n] * inverse - (x[e + n] - x[e + n]);
        return pack_e4m3(y[0], y[1], y[2], y[3]);
    }
};

// Q or K: a row, 64 columns from 64 `part` on.
struct Part {
    int t = anew(threadIdx.x), row = t / 32 * ROWS_A_WARP + t % ROWS_A_WARP, part = t % 32 / ROWS_A_WARP;
};

struct OfRows : Numbers {
    static constexpr bool ROTATED = INCOHERENT, TRANSPOSED = false;

    DEVICE void read(Shared &s, u32 (&two)[NUMBERS / 2]) const {
        const Part my;
        const u32 at = shared_address(s.in) + my.part * (ROWS * WIDTH) + swizzled<WIDTH>(my.row, 0);
#pragma unroll
        for (int c = 0; c < NUMBERS / 8; ++c) load_16_bytes(at ^ 16 * c, two + 4 * c);
    }

    // x diag(±1): those of word w of 32 columns are bits 31 - w and 15 - w.
    DEVICE void change_signs(u32 (&two)[NUMBERS / 2], const u32 *flip) const {
        const Part my;
#pragma unroll
        for (int w = 0; w < NUMBERS / 2; ++w) two[w] ^= flip[2 * my.part + w / 16] << w % 16 & 0x80008000;
    }

    template <bool Finite>
    DEVICE void put(Shared &s, float inverse) const {
        constexpr int PARTS = WIDE / NUMBERS;  // to a panel
        const Part my;
        const u32 panel = shared_address(s.out) + my.part / PARTS * (ROWS * WIDE);
        const u32 at = panel + swizzled<WIDE>(my.row, my.part % PARTS * NUMBERS);
#pragma unroll
        for (int c = 0; c < NUMBERS / 16; ++c) {
            u32 four[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) four[e] = packed<Finite>(16 * c + 4 * e, inverse);
            store_16_bytes(at ^ 16 * c, four);
        }
    }
};

// V: units of 16 keys x 32 bytes, each four matrices of 8 keys x 16 bytes that are transposed.  So a lane has, of one column
// of each, keys 2q, 2q + 1, 8 + 2q and 9 + 2q, q = lane % 4: the four slots of Vᵀ from 4q on.
struct Keys {
    static constexpr int UNITS = 4 * BYTES, ACROSS = d * BYTES / 32;  // of a warp; side by side, and then below
    int t = anew(threadIdx.x), lane = t % 32, across = t / 32 * UNITS % ACROSS, key = t / 32 * UNITS / ACROSS * 16;

    DEVICE void read(Shared &s, int u, u32 *two) const {
        const u32 panels = shared_address(s.in) + across * 32 / WIDTH * (ROWS * WIDTH);
        const u32 at = panels + swizzled<WIDTH>(key + lane % 16, lane / 16 * 16);  // of the first unit
        const int byte = u % ACROSS * 32;
        load_matrices<true>((at ^ byte % WIDTH) + byte / WIDTH * (ROWS * WIDTH) + u / ACROSS * 16 * WIDTH, two);
    }

    // To column 8c + n of the unit's.
    DEVICE void write(Shared &s, int u, int c, int n, u32 four) const {
        const int slot = key + lane % 4 * 4;
        const u32 panel = shared_address(s.out) + slot / DEEP * (d * DEEP);
        const u32 at = panel + (swizzled<DEEP>(across * (32 / BYTES) + n, slot % DEEP) ^ u / ACROSS * 16);
        store_4_bytes(at + (u % ACROSS * (32 / BYTES) + 8 * c) * DEEP, four);
    }
};

struct OfKeys : Numbers {
    static constexpr bool ROTATED = false, TRANSPOSED = true;

    DEVICE void read(Shared &s, u32 (&two)[NUMBERS / 2]) const {
        const Keys my;
#pragma unroll
        for (int u = 0; u < Keys::UNITS; ++u) my.read(s, u, two + 4 * u);
    }

    DEVICE void change_signs(u32 (&)[NUMBERS / 2], const u32 *) const {}

    template <bool Finite>
    DEVICE void put(Shared &s, float inverse) const {
        const Keys my;
#pragma unroll
        for (int e = 0; e < NUMBERS; e += 4) my.write(s, e / 8, e / 4 % 2, my.lane / 4, packed<Finite>(e, inverse));
    }
};

// *to becomes the largest of the warp's where that is larger.
DEVICE void raise_to(int *to, int most) {
    if (threadIdx.x % 32 == 0) raise(to, most);
}

// ---- a thread block ---------------------------------------------------------------------------------------------------

struct Turns {
    Shared &s;
    const Maps &maps;
    const Sides &sides;
    int n = 0;

    // Of this turn or of one before or after it; computed anew, as all but numbers is: there is no register to keep it in.
    DEVICE Tile &tile(int after = 0) const { return s.tiles[anew(n) + after & 3]; }
    DEVICE Largest &found(int after = 0) const { return s.largest[anew(n) + after & 1]; }

    DEVICE void run() {
        if (threadIdx.x == 0) {
            barrier_init(shared_address(&s.arrived), 1), barrier_init_fence();
            draw(0);
        }
        found().clear();
        __syncthreads();
        if (threadIdx.x < 32) ask(s, maps, heard(tile()));
#pragma unroll 1
        for (; tile().of >= 0; ++n) {
            if (threadIdx.x == 0) draw(1);
            barrier_wait(shared_address(&s.arrived), n % 2);
            if (STEP == TRANSPOSE) transpose();
            else if (tile().of == 0) convert<OfRows, Q_ROWS, Q_BLOCK>(sides.Q);
            else if (tile().of == 1) convert<OfRows, KV_ROWS, KV_BLOCK>(sides.K);
            else convert<OfKeys, KV_ROWS, KV_BLOCK>(sides.V);
        }
        meet(true);
        if (threadIdx.x == 0) copies_out_read();
    }

    DEVICE void draw(int after) { tile(after) = tile_at(sides, blockIdx.x + (n + after) * gridDim.x); }

    // All have read the tile, so that the next one may come, and written what became of the one before, which goes.
    DEVICE void meet(bool last = false) {
        async_fence();
        __syncthreads();
        if (uniform(~0u, threadIdx.x / 32) == 0) {
            if (STEP != AMAX && n > 0) send(s, maps, heard(tile(-1)));
            const Tile next = last ? Tile{-1} : heard(tile(1));
            if (next.of >= 0) ask(s, maps, next);
        }
        found(1).clear();
    }

    template <class Of, int Rows, int Block>
    DEVICE void convert(const Side &side) {
        Of mine;
        u32 two[NUMBERS / 2];
        mine.read(s, two);
        meet();
#pragma unroll
        for (int w = 0; w < NUMBERS / 2; ++w) two[w] = anew(two[w]);  // not unpacked before: room for who asks and sends
        if (Of::ROTATED) mine.change_signs(two, sides.flip);
        mine.unpack_all(two);
        if (Of::ROTATED) mine.rotate();
        if (STEP == AMAX) {
            if (!there<Rows>()) return;
            const int most = largest(mine.most());
            return raise_to(reinterpret_cast<int *>(scales(side)), most < INFINITE ? most : largest(mine.most_finite()));
        }
        if (threadIdx.x == 0) copies_out_read();  // as all will know when they have met again
        bool all_finite = false;
        if (STEP == BLOCKS) all_finite = find_largest<Rows, Block>(mine);
        else __syncthreads();
        const float scale = STEP == GIVEN ? load(scales(side)) : scale_of<Of>(block<Rows, Block>());
        settled(mine.x);
        if (!there<Rows>()) {}
        else if (all_finite) mine.template put<true>(s, reciprocal(scale));
        else mine.template put<false>(s, reciprocal(scale));
        const int t = anew(threadIdx.x), i = tile().i0 + t * Block;  // only now, as it takes registers
        if (STEP == BLOCKS && t < Rows / Block && i < side.N) scales(side)[i / Block] = scale_of<Of>(t);
    }

    // The warp's first row; whether it is one of the tile's; the block that it is in.
    static DEVICE int row() { return anew(threadIdx.x) / 32 * ROWS_A_WARP; }
    template <int Rows>
    static DEVICE bool there() { return Rows == ROWS || row() < Rows; }
    template <int Rows, int Block>
    static DEVICE int block() { return there<Rows>() ? row() / Block : 0; }

    DEVICE float *scales(const Side &side) const {
        return side.scale + static_cast<long long>(tile().b * side.H + tile().h) * side.blocks;
    }

    // Of each block; where not all is finite, of what is.
    template <int Rows, int Block>
    DEVICE bool find_largest(Numbers &mine) {
        const int most = there<Rows>() ? largest(mine.most()) : 0;
        if (there<Rows>()) raise_to(found().of + block<Rows, Block>(), most);
        if (!__syncthreads_or(most >= INFINITE)) return true;
        found().clear();
        __syncthreads();
        if (there<Rows>()) raise_to(found().of + block<Rows, Block>(), largest(mine.most_finite()));
        __syncthreads();
        return false;
    }

    // Of a block, by its largest number; of V the next power of 2.
    template <class Of>
    DEVICE float scale_of(int block) const {
        const float most = __builtin_bit_cast(float, found().of[block]);
        const float scale = most == 0.f ? 1.f : fmaxf(most * (1.f / 448.f), 5.421010862427522e-20f);  // 2⁻⁶⁴
        if (!Of::TRANSPOSED) return scale;
        return __builtin_bit_cast(float, (__builtin_bit_cast(u32, scale) + 0x7FFFFF) & 0xFF800000);
    }

    // V in e4m3: a pair of columns at a time.
    DEVICE void transpose() {
        const Keys my;
        u32 two[Keys::UNITS][4];
#pragma unroll
        for (int u = 0; u < Keys::UNITS; ++u) my.read(s, u, two[u]);
        meet();
        if (threadIdx.x == 0) copies_out_read();
        __syncthreads();
#pragma unroll
        for (int u = 0; u < Keys::UNITS; ++u)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                my.write(s, u, e / 2 * 2, my.lane / 4 * 2 + e % 2,
                         __byte_perm(two[u][e / 2 * 2], two[u][e / 2 * 2 + 1], e % 2 ? 0x7531 : 0x6420));
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    quantize(const __grid_constant__ TensorMap Q, const __grid_constant__ TensorMap K, const __grid_constant__ TensorMap V,
             const __grid_constant__ TensorMap to_Q, const __grid_constant__ TensorMap to_K,
             const __grid_constant__ TensorMap to_V, const __grid_constant__ Sides sides) {
    Shared &s = *reinterpret_cast<Shared *>(shared_memory() + (0u - shared_address(shared_memory())) % 1024);
    Turns{s, {Q, K, V, to_Q, to_K, to_V}, sides}.run();
}
