// The tensor cores' products of one warpgroup, 64 rows: rC [64, N] += A [64, 16] · B [16, N], C in float32.
// [PTX ISA: wgmma.mma_async.m64nNk16; matrix descriptors, 128-byte swizzle]
//
// A tile of shared memory is a row of panels, each 64 columns (128 bytes) wide and 128-byte swizzled, as the copy engine
// lays a box down.  A thread's rC: rows 16·warp + lane/4 and + 8, of each 8 columns 2·(lane%4) and + 1:
//
//     rC[4c + 0], rC[4c + 1]   row lane/4      columns 8c + 2·(lane%4), + 1
//     rC[4c + 2], rC[4c + 3]   row lane/4 + 8  the same columns
//
// which, packed in pairs, is just how a product wants its A in registers: P needs no exchange between lanes.
#pragma once

#include "ptx.cuh"

// The descriptor of a tile of shared memory: where it starts, how far its 8-row groups are apart, and its swizzle, which
// is as wide as a panel: 128, 64 or 32 bytes.
DEVICE u64 descriptor(u32 address, u32 leading, u32 stride, u64 width = 128) {
    return (address & 0x3FFFF) >> 4 | static_cast<u64>(leading >> 4) << 16 | static_cast<u64>(stride >> 4) << 32 |
           (width == 128 ? 1ull : width == 64 ? 2ull : 3ull) << 62;
}

// [rows, width bytes] whose columns are multiplied away (Q, K): what a product takes, 32 bytes, further.
DEVICE u64 by_columns(u32 panel, u32 width = 128) { return descriptor(panel, 16, 8 * width, width); }
constexpr int NEXT_COLUMNS = 32 >> 4;

// [keys, panels of 64 columns] whose keys are multiplied away (V): 16 keys further is 2,048 bytes further.
DEVICE u64 by_rows(u32 panels, u32 panel_bytes) { return descriptor(panels, panel_bytes, 1024); }

// The descriptor of what lies so many 16 bytes further: of its low word only, where the address is.
DEVICE u64 further(u64 descriptor, u32 by) { return descriptor >> 32 << 32 | static_cast<u32>(descriptor) + by; }
constexpr int NEXT_ROWS = 2048 >> 4;

#ifndef EMULATED

// Operands of the instruction, eight at a time.

#define NAMES_0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define NAMES_1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define NAMES_3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define NAMES_5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define NAMES_6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define NAMES_7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define NAMES_9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define NAMES_10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define NAMES_11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define NAMES_12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define NAMES_13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define NAMES_14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define NAMES_15 "%120, %121, %122, %123, %124, %125, %126, %127"

#define NAMES_TO_8 NAMES_0
#define NAMES_TO_16 NAMES_TO_8 ", " NAMES_1
#define NAMES_TO_24 NAMES_TO_16 ", " NAMES_2
#define NAMES_TO_32 NAMES_TO_24 ", " NAMES_3
#define NAMES_TO_40 NAMES_TO_32 ", " NAMES_4
#define NAMES_TO_48 NAMES_TO_40 ", " NAMES_5
#define NAMES_TO_56 NAMES_TO_48 ", " NAMES_6
#define NAMES_TO_64 NAMES_TO_56 ", " NAMES_7
#define NAMES_TO_72 NAMES_TO_64 ", " NAMES_8
#define NAMES_TO_80 NAMES_TO_72 ", " NAMES_9
#define NAMES_TO_88 NAMES_TO_80 ", " NAMES_10
#define NAMES_TO_96 NAMES_TO_88 ", " NAMES_11
#define NAMES_TO_104 NAMES_TO_96 ", " NAMES_12
#define NAMES_TO_112 NAMES_TO_104 ", " NAMES_13
#define NAMES_TO_120 NAMES_TO_112 ", " NAMES_14
#define NAMES_TO_128 NAMES_TO_120 ", " NAMES_15

#define EIGHT(c, i) \
    "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])
#define OPERANDS_TO_8(c) EIGHT(c, 0)
#define OPERANDS_TO_16(c) OPERANDS_TO_8(c), EIGHT(c, 8)
#define OPERANDS_TO_24(c) OPERANDS_TO_16(c), EIGHT(c, 16)
#define OPERANDS_TO_32(c) OPERANDS_TO_24(c), EIGHT(c, 24)
#define OPERANDS_TO_40(c) OPERANDS_TO_32(c), EIGHT(c, 32)
#define OPERANDS_TO_48(c) OPERANDS_TO_40(c), EIGHT(c, 40)
#define OPERANDS_TO_56(c) OPERANDS_TO_48(c), EIGHT(c, 48)
#define OPERANDS_TO_64(c) OPERANDS_TO_56(c), EIGHT(c, 56)
#define OPERANDS_TO_72(c) OPERANDS_TO_64(c), EIGHT(c, 64)
#define OPERANDS_TO_80(c) OPERANDS_TO_72(c), EIGHT(c, 72)
#define OPERANDS_TO_88(c) OPERANDS_TO_80(c), EIGHT(c, 80)
#define OPERANDS_TO_96(c) OPERANDS_TO_88(c), EIGHT(c, 88)
#define OPERANDS_TO_104(c) OPERANDS_TO_96(c), EIGHT(c, 96)
#define OPERANDS_TO_112(c) OPERANDS_TO_104(c), EIGHT(c, 104)
#define OPERANDS_TO_120(c) OPERANDS_TO_112(c), EIGHT(c, 112)
#define OPERANDS_TO_128(c) OPERANDS_TO_120(c), EIGHT(c, 120)

// Product<N, Type>::tiles(rC, A, a, B, b, add): A and B in shared memory, both by columns; rC = A Bᵀ, or += where add.
//     They start at the descriptors A + a and B + b.  Sums that the compiler sees it takes out of loops, and at d = 256 those
//     of Q alone are more than uniform registers hold: a move into one would stand before each product.
// Product<N, Type>::columns(rC, rA, B, b, add): A in registers, B in shared memory by columns; the same.
// Product<N, Type>::rows(rC, rA, B, b): A in registers, B in shared memory by rows; rC += A B.  Not of E4M3.
//     a and b are added to low words alone, where addresses are: 64-bit sums take three uniform instructions each.
enum Type { HALF, BFLOAT, E4M3 };  // of A and B
template <int N, int Type>
struct Product;

// After N: the number of accumulators, then those of the operands behind them.
#define PRODUCT(N, R, R1, R2, R3, R4, R5, R6) \
    template <> \
    struct Product<N, HALF> { \
        TILES(N, "k16", "f16", ", 0, 0", R, R1, R2, R3, R4) \
        COLUMNS(N, "k16", "f16", ", 0", R, R1, R2, R3, R4, R5, R6) \
        ROWS(N, "f16", R, R1, R2, R3, R4, R5) \
    }; \
    template <> \
    struct Product<N, BFLOAT> { \
        TILES(N, "k16", "bf16", ", 0, 0", R, R1, R2, R3, R4) \
        COLUMNS(N, "k16", "bf16", ", 0", R, R1, R2, R3, R4, R5, R6) \
        ROWS(N, "bf16", R, R1, R2, R3, R4, R5) \
    }; \
    template <> \
    struct Product<N, E4M3> { \
        TILES(N, "k32", "e4m3", "", R, R1, R2, R3, R4) \
        COLUMNS(N, "k32", "e4m3", "", R, R1, R2, R3, R4, R5, R6) \
    };
#define TILES(N, K, TYPE, BY, R, R1, R2, R3, R4) \
    static DEVICE void tiles(float (&c)[R], u64 a, int a_on, u64 b, int b_on, int add) { \
        asm volatile( \
            "{\n.reg .pred add;\n.reg .b32 low, high;\n.reg .b64 a, b;\nsetp.ne.b32 add, %" #R4 ", 0;\n" \
            "mov.b64 {low, high}, %" #R ";\nadd.u32 low, low, %" #R2 ";\nmov.b64 a, {low, high};\n" \
            "mov.b64 {low, high}, %" #R1 ";\nadd.u32 low, low, %" #R3 ";\nmov.b64 b, {low, high};\n" \
            "wgmma.mma_async.sync.aligned.m64n" #N K ".f32." TYPE "." TYPE " {" NAMES_TO_##R "}, a, b" \
            ", add, 1, 1" BY ";\n}" \
            : OPERANDS_TO_##R(c) \
            : "l"(a), "l"(b), "r"(a_on), "r"(b_on), "r"(add)); \
    }
#define COLUMNS(N, K, TYPE, BY, R, R1, R2, R3, R4, R5, R6) \
    static DEVICE void columns(float (&c)[R], const u32 *a, u64 b, int b_on, int add) { \
        asm volatile( \
            "{\n.reg .pred add;\n.reg .b32 low, high;\n.reg .b64 b;\nsetp.ne.b32 add, %" #R6 ", 0;\n" \
            "mov.b64 {low, high}, %" #R4 ";\nadd.u32 low, low, %" #R5 ";\nmov.b64 b, {low, high};\n" \
            "wgmma.mma_async.sync.aligned.m64n" #N K ".f32." TYPE "." TYPE " {" NAMES_TO_##R "}, {%" #R ", %" #R1 \
            ", %" #R2 ", %" #R3 "}, b, add, 1, 1" BY ";\n}" \
            : OPERANDS_TO_##R(c) \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(b_on), "r"(add)); \
    }
#define ROWS(N, TYPE, R, R1, R2, R3, R4, R5) \
    static DEVICE void rows(float (&c)[R], const u32 *a, u64 b, int b_on) { \
        asm volatile( \
            "{\n.reg .pred add;\n.reg .b32 low, high;\n.reg .b64 b;\nsetp.eq.b32 add, 0, 0;\n" \
            "mov.b64 {low, high}, %" #R4 ";\nadd.u32 low, low, %" #R5 ";\nmov.b64 b, {low, high};\n" \
            "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" NAMES_TO_##R "}, {%" #R ", %" #R1 \
            ", %" #R2 ", %" #R3 "}, b, add, 1, 1, 1;\n}" \
            : OPERANDS_TO_##R(c) \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(b_on)); \
    }

PRODUCT(16, 8, 9, 10, 11, 12, 13, 14)
PRODUCT(32, 16, 17, 18, 19, 20, 21, 22)
PRODUCT(48, 24, 25, 26, 27, 28, 29, 30)
PRODUCT(64, 32, 33, 34, 35, 36, 37, 38)
PRODUCT(80, 40, 41, 42, 43, 44, 45, 46)
PRODUCT(96, 48, 49, 50, 51, 52, 53, 54)
PRODUCT(112, 56, 57, 58, 59, 60, 61, 62)
PRODUCT(128, 64, 65, 66, 67, 68, 69, 70)
PRODUCT(144, 72, 73, 74, 75, 76, 77, 78)
PRODUCT(160, 80, 81, 82, 83, 84, 85, 86)
PRODUCT(176, 88, 89, 90, 91, 92, 93, 94)
PRODUCT(192, 96, 97, 98, 99, 100, 101, 102)
PRODUCT(208, 104, 105, 106, 107, 108, 109, 110)
PRODUCT(224, 112, 113, 114, 115, 116, 117, 118)
PRODUCT(240, 120, 121, 122, 123, 124, 125, 126)
PRODUCT(256, 128, 129, 130, 131, 132, 133, 134)

#endif
