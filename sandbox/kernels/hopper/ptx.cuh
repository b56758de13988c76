// One function, one instruction of PTX for sm_90a: barriers, the tensor copy engine, warpgroup bookkeeping, conversions.
// [PTX ISA 8.x and 9.0: mbarrier, cp.async.bulk.tensor, wgmma.fence/commit_group/wait_group, setmaxnreg, stmatrix]
//
// Addresses of shared memory are 32-bit, as `shared_address` gives them.  Products: wgmma.cuh.  On a CPU sandbox/emulator
// has a function for each.
#pragma once
#ifndef EMULATED

typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__

// What cuTensorMapEncodeTiled fills in; <cuda.h>, which declares it, needs headers that NVRTC lacks.
struct alignas(64) TensorMap {
    u64 opaque[16];
};

// The block's dynamic shared memory.
DEVICE unsigned char *shared_memory() {
    extern __shared__ unsigned char dynamic[];
    return dynamic;
}

DEVICE u32 shared_address(const void *p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// ---- mbarrier: a counter of arrivals and of bytes that the copy engine has yet to bring ----------------------------

DEVICE void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Makes barrier_init seen by the copy engine.
DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

DEVICE void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and announces bytes that copies will bring.
DEVICE void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits until the phase of this parity is complete.
DEVICE void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(barrier), "r"(parity) : "memory");
}

// ---- named barriers: some warps of the block meet ------------------------------------------------------------------

DEVICE void named_sync(u32 name, u32 threads) { asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory"); }

DEVICE void named_arrive(u32 name, u32 threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

// ---- tensor copies: a box of a tensor [batch, heads, rows, columns] and a tile in shared memory, 128-byte swizzled --

// L2 eviction policies, as createpolicy.fractional encodes them for all of an access.
constexpr u64 EVICT_FIRST = 0x12F0000000000000, EVICT_LAST = 0x14F0000000000000;

DEVICE void copy_in(u32 tile, const TensorMap &map, u32 barrier, int column, int row, int head, int batch, u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(tile),
        "l"(&map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch), "l"(policy)
        : "memory");
}

DEVICE void copy_out(const TensorMap &map, u32 tile, int column, int row, int head, int batch) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
                 "r"(tile), "r"(column), "r"(row), "r"(head), "r"(batch)
                 : "memory");
}

DEVICE void copies_out_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until this thread's copies out have read their tiles.
DEVICE void copies_out_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

DEVICE void prefetch(const TensorMap &map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }

// Orders this thread's stores to shared memory before what the copy engine and the tensor cores read.
DEVICE void async_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- warpgroups ----------------------------------------------------------------------------------------------------

template <int Registers>
DEVICE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

template <int Registers>
DEVICE void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

// x, which these lanes have in common, as the compiler cannot know: it goes to a uniform register (redux.sync).
DEVICE int uniform(u32 lanes, int x) { return __reduce_max_sync(lanes, x); }

// What lane 0, one of these, reads at x: for all of them, in a uniform register.
DEVICE int first_lane(u32 lanes, const int &x) {
    return uniform(lanes, lanes == 1 || threadIdx.x % 32 == 0 ? x : -0x7FFFFFFF);
}

// Before the first product of a batch: what was written to its registers is there.
DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// x is computed before whatever follows, not put off until it is used.
template <int Size>
DEVICE void settled(float (&x)[Size]) {
#pragma unroll
    for (int e = 0; e < Size; ++e) asm volatile("" : "+f"(x[e])::"memory");
}

// What x was is of no use to the first product: its registers are not carried along from there.  (So ptxas packs four
// numbers in e4m3 by two instructions; it takes three where they, as it believes, pass through a loop.)
template <int Size>
DEVICE void made_anew(float (&x)[Size]) {
#pragma unroll
    for (int e = 0; e < Size; ++e) asm volatile("" : "=f"(x[e]));
}

// x, from which nothing is computed before a loop to be kept through it: that costs registers.
DEVICE int anew(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// Waits until at most `Pending` batches are under way, the youngest ones; rC belongs to one that is done.
template <int Pending, int Size>
DEVICE void products_wait(float (&rC)[Size]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
    settled(rC);  // nobody reads rC before the wait
}

// ---- clocks --------------------------------------------------------------------------------------------------------

DEVICE u32 cycles() {  // of this multiprocessor
    u32 t;
    asm volatile("mov.u32 %0, %%clock;" : "=r"(t)::"memory");
    return t;
}

DEVICE u32 nanoseconds() {  // of the whole GPU
    u32 t;
    asm volatile("mov.u32 %0, %%globaltimer_lo;" : "=r"(t)::"memory");
    return t;
}

// ---- numbers -------------------------------------------------------------------------------------------------------

// One number from global memory, which nobody writes meanwhile; it is asked for here, and not where it is used.
DEVICE float load(const float *from) {
    float x;
    asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(x) : "l"(from));
    return x;
}

// One number to global memory.
DEVICE void store(float *to, float x) { *to = x; }

// Shared memory, 16 bytes or 4 at a time.
DEVICE void load_16_bytes(u32 address, u32 *to) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}

DEVICE void store_16_bytes(u32 address, const u32 (&x)[4]) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
                 : "memory");
}

DEVICE void store_4_bytes(u32 address, u32 x) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory"); }

// *to becomes x where that is larger.
DEVICE void raise(int *to, int x) { atomicMax(to, x); }

DEVICE float max_or_nan(float a, float b) {
    float most;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(a), "f"(b));
    return most;  // 0x7FFFFFFF where one is NaN
}

// Of the lanes of the warp.
DEVICE int largest(int x) { return __reduce_max_sync(~0u, x); }

DEVICE float exp2_approx(float x) {  // 2 ulp; one instruction
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE float log2_approx(float x) {  // off by 2⁻²² of the larger of 1 and log2 x; one instruction
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x to nearest, for 2⁻¹²⁶ < x < 2¹²⁵, without the branch for all other x.
DEVICE float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return fmaf(y, fmaf(-x, y, 1.f), y);
}

// Two numbers in the 16-bit format of the inputs, the first in the lower half.
template <bool Bf16>
DEVICE u32 pack(float low, float high) {
    u32 both;
    if constexpr (Bf16)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

// Two numbers of a 16-bit format, the first from the lower half.
template <bool Bf16>
DEVICE void unpack(u32 both, float &low, float &high) {
    if constexpr (Bf16)
        low = __int_as_float(both << 16), high = __int_as_float(both & 0xFFFF0000);
    else
        asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
            : "=f"(low), "=f"(high)
            : "r"(both));
}

// Four numbers in e4m3, the first in the lowest byte; what is larger than 448 becomes 448.
DEVICE u32 pack_e4m3(float a, float b, float c, float d) {
    u32 four;
    asm("{\n.reg .b16 low, high;\ncvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\ncvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
        "mov.b32 %0, {low, high};\n}"
        : "=r"(four)
        : "f"(a), "f"(b), "f"(c), "f"(d));
    return four;
}

// Four 8x8 tiles of 16-bit numbers, or their transposes; lane l gives the address of row l % 8 of tile l / 8.
template <bool Transposed = false>
DEVICE void load_matrices(u32 address, u32 *to) {
    if constexpr (Transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(address)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(address)
                     : "memory");
}

DEVICE void store_matrices(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
                 "r"(c), "r"(d)
                 : "memory");
}

#endif
