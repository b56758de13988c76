// What a thread of quantize.cu has of a tile, 64 numbers: how it reads them, rotates them, and writes them in e4m3.
//
// Tiles are rows of panels, each as wide as its swizzle, as the copy engine lays boxes down.
//
// Compile-time, by -D: see quantize.cu.
#pragma once

#include "ptx.cuh"

enum Step { BLOCKS, AMAX, GIVEN, TRANSPOSE };
constexpr int d = HEAD_DIM, NUMBERS = 64, LANES = d / NUMBERS;  // of a thread; threads to a row
constexpr int ROWS = Q_ROWS > KV_ROWS ? Q_ROWS : KV_ROWS;       // where a tile has fewer, some warps have none
constexpr int ROWS_A_WARP = 32 / LANES;
constexpr int BYTES = STEP == TRANSPOSE ? 1 : 2;  // of a number that comes

// Of a panel, in bytes: of what comes, of what leaves, and of what leaves as Vᵀ.
constexpr int WIDTH = d * BYTES == 64 ? 64 : 128, WIDE = d == 64 ? 64 : 128;
constexpr int DEEP = KV_ROWS % 128 == 0 ? 128 : KV_ROWS % 64 == 0 ? 64 : 32;

// Where byte b of row r of a panel lies.
template <int Width>
DEVICE u32 swizzled(int r, int b) {
    const u32 at = r * Width + b;
    return at ^ (at >> 3 & (Width - 16));
}

// A row of Q or K is in lanes that are ROWS_A_WARP apart, 64 columns each.
struct Numbers {
    float x[NUMBERS];

    DEVICE void take(const u32 (&two)[NUMBERS / 2]) {
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

// Q or K: columns 64 `part` and on of a row.  (Where a thread is, it finds anew: numbers take all registers.)
struct Part {
    int t = anew(threadIdx.x), row = t / 32 * ROWS_A_WARP + t % ROWS_A_WARP, part = t % 32 / ROWS_A_WARP;
};

struct OfRows : Numbers {
    static constexpr bool ROTATED = INCOHERENT, TRANSPOSED = false;

    DEVICE void read(u32 in, u32 (&two)[NUMBERS / 2]) const {
        const Part my;
        const u32 at = in + my.part * (ROWS * WIDTH) + swizzled<WIDTH>(my.row, 0);
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
    DEVICE void put(u32 out, float inverse) const {
        constexpr int PARTS = WIDE / NUMBERS;  // to a panel
        const Part my;
        const u32 panel = out + my.part / PARTS * (ROWS * WIDE);
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

    DEVICE void read(u32 in, int u, u32 *two) const {
        const u32 panels = in + across * 32 / WIDTH * (ROWS * WIDTH);
        const u32 at = panels + swizzled<WIDTH>(key + lane % 16, lane / 16 * 16);  // of the first unit
        const int byte = u % ACROSS * 32;
        load_matrices<true>((at ^ byte % WIDTH) + byte / WIDTH * (ROWS * WIDTH) + u / ACROSS * 16 * WIDTH, two);
    }

    // To column 8c + n of the unit's.
    DEVICE void write(u32 out, int u, int c, int n, u32 four) const {
        const int slot = key + lane % 4 * 4;
        const u32 panel = out + slot / DEEP * (d * DEEP);
        const u32 at = panel + (swizzled<DEEP>(across * (32 / BYTES) + n, slot % DEEP) ^ u / ACROSS * 16);
        store_4_bytes(at + (u % ACROSS * (32 / BYTES) + 8 * c) * DEEP, four);
    }
};

struct OfKeys : Numbers {
    static constexpr bool ROTATED = false, TRANSPOSED = true;

    DEVICE void read(u32 in, u32 (&two)[NUMBERS / 2]) const {
        const Keys my;
#pragma unroll
        for (int u = 0; u < Keys::UNITS; ++u) my.read(in, u, two + 4 * u);
    }

    DEVICE void change_signs(u32 (&)[NUMBERS / 2], const u32 *) const {}

    template <bool Finite>
    DEVICE void put(u32 out, float inverse) const {
        const Keys my;
#pragma unroll
        for (int e = 0; e < NUMBERS; e += 4) my.write(out, e / 8, e / 4 % 2, my.lane / 4, packed<Finite>(e, inverse));
    }
};

// V in e4m3, two columns of a unit at a time.
struct OfBytes {
    u32 four[Keys::UNITS][4];

    DEVICE void read(u32 in) {
        const Keys my;
#pragma unroll
        for (int u = 0; u < Keys::UNITS; ++u) my.read(in, u, four[u]);
    }

    DEVICE void put(u32 out) const {
        const Keys my;
#pragma unroll
        for (int u = 0; u < Keys::UNITS; ++u)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const u32 *keys = four[u] + e / 2 * 2;  // of columns 2n and 2n + 1: 2q and 2q + 1, and those 8 further
                my.write(out, u, e / 2 * 2, my.lane / 4 * 2 + e % 2, __byte_perm(keys[0], keys[1], e % 2 ? 0x7531 : 0x6420));
            }
    }
};
