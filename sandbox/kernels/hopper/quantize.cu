// Q, K, V from 16 bits to e4m3 in one pass: read once, rotated, scaled, V transposed.  [FA3, 2407.08608, §3.3]
//
// sandbox/quantize.py is the same in torch, bit for bit, and says what and why.  A thread block takes some rows of a head
// of Q, K or V at a time, a thread 64 numbers: of Q and K 64 columns of a row, of V pairs of keys, which ldmatrix turns on
// their way (numbers.cuh).  The copy engine brings and takes tiles: while one is worked on in registers, the next one is on
// its way to where it was, and what became of the one before is on its way out.
//
// Compile-time, by -D: HEAD_DIM, Q_ROWS and KV_ROWS (of a thread block), Q_BLOCK and KV_BLOCK (that share a scale, and
// divide them), BF16, INCOHERENT (Q and K are rotated), RESIDENT (thread blocks of a multiprocessor), STEP:
//
//     BLOCKS     a scale for each block, from the block itself
//     AMAX       only the largest number of each head, for a scale that more than a block share
//     GIVEN      by the scales that are there
//     TRANSPOSE  no scales: V, which is in e4m3, to Vᵀ
#include "numbers.cuh"

constexpr int THREADS = ROWS * LANES;
constexpr int MOST_IN_A_BOX = 256;    // rows
constexpr int INFINITE = 0x7F800000;  // as an integer; NaN is more

// [B, H, blocks] scales of Q, K or V [B, N, H, d], and tiles to a head.
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

// The index-th, those of all heads side by side, as their rows are in memory; `of` is below 0 where there is none.
DEVICE Tile tile_at(const Sides &sides, int index) {
    const int of_Q = sides.heads_q * sides.Q.tiles, of_KV = sides.heads_kv * sides.K.tiles;
    Tile tile{-1};
    if (index < of_Q) tile.of = 0;
    else if ((index -= of_Q) < of_KV) tile.of = 1;
    else if ((index -= of_KV) < sides.heads_kv * sides.V.tiles) tile.of = 2;
    else return tile;
    const int heads = tile.of == 0 ? sides.heads_q : sides.heads_kv, bh = index % heads, H = tile.side(sides).H;
    tile.i0 = index / heads * tile.rows(), tile.b = bh / H, tile.h = bh % H;
    return tile;
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

// ---- the copy engine, which one warp asks -----------------------------------------------------------------------------

// A tile as one warp, all its lanes, reads it.
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

    // Of this turn, or of one before or after it; found anew each time, to take no registers between.
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
        mine.read(shared_address(s.in), two);
        meet();
#pragma unroll
        for (int w = 0; w < NUMBERS / 2; ++w) two[w] = anew(two[w]);  // not unpacked before: room for who asks and sends
        if (Of::ROTATED) mine.change_signs(two, sides.flip);
        mine.take(two);
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
        if (there<Rows>() && all_finite) mine.template put<true>(shared_address(s.out), reciprocal(scale));
        else if (there<Rows>()) mine.template put<false>(shared_address(s.out), reciprocal(scale));
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

    // V in e4m3.
    DEVICE void transpose() {
        OfBytes mine;
        mine.read(shared_address(s.in));
        meet();
        if (threadIdx.x == 0) copies_out_read();
        __syncthreads();
        mine.put(shared_address(s.out));
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    quantize(const __grid_constant__ TensorMap Q, const __grid_constant__ TensorMap K, const __grid_constant__ TensorMap V,
             const __grid_constant__ TensorMap to_Q, const __grid_constant__ TensorMap to_K,
             const __grid_constant__ TensorMap to_V, const __grid_constant__ Sides sides) {
    Shared &s = *reinterpret_cast<Shared *>(shared_memory() + (0u - shared_address(shared_memory())) % 1024);
    Turns{s, {Q, K, V, to_Q, to_K, to_V}, sides}.run();
}
