// The functions of ptx.cuh and wgmma.cuh on a CPU: Hopper kernels run here unchanged, small and exact, with no GPU.
//
// Every thread of a block is a fiber.  What hardware does some time between a request and the wait for it is done here
// either at once or when nobody else can go on: copies in are early or late arrivals, products and copies out early or late
// readers.  A kernel that reads what has not arrived is wrong with late arrivals, one that overwrites or releases what is
// still read with early arrivals and late readers: a thread that has arrived at a barrier, too, goes on after the others.
// Threads run in an order drawn from a seed.  Shared memory and registers hold NaN until written; what a thread stores to
// shared memory is seen by copies and products only after its async_fence.  A block in which nobody can go on is told as
// a deadlock, with what each warp waits for.
//
// Layouts follow the PTX ISA (wgmma: register fragments, matrix descriptors, swizzles of 128, 64 and 32 bytes; stmatrix;
// mbarrier), so that a kernel that is right here addresses the hardware's layouts.  Not modelled: clusters, the order of
// memory between blocks, time, the bits that the hardware's sums of e4m3 lose: here they are in float32.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define DEVICE inline

typedef unsigned int u32;
typedef unsigned long long u64;

struct Dim {
    u32 x, y, z;
};
inline Dim threadIdx, blockIdx, gridDim;
alignas(1024) inline unsigned char dynamic[232448];

using std::max;
using std::min;

// What the host fills in here in place of cuTensorMapEncodeTiled: dimensions from the fastest, strides in bytes.
struct TensorMap {
    unsigned char *data;
    u64 size[4], stride[4], box[4], element;
    u64 *moved;  // elements read, elements written
    u64 unused;
};
static_assert(sizeof(TensorMap) == 128, "as large as the driver's");

enum Type { HALF, BFLOAT, E4M3 };  // of what is multiplied

namespace emulated {

struct Wgmma {  // one product of k = 16, of E4M3 32: A in shared memory or in registers
    float *c;
    u64 a, b;
    const u32 *registers;
    bool by_columns;  // B
    int N, type;
    bool add;
};

struct Thread {
    ucontext_t context;
    std::unique_ptr<unsigned char[]> stack;
    u32 x;
    bool done = false;
    std::string waits;
    std::vector<std::pair<u32, u32>> stores;                 // (address, word): not yet fenced
    std::vector<Wgmma> batch;                                // not yet committed
    std::deque<std::vector<Wgmma>> batches;                  // committed, not yet carried out
    std::vector<std::function<void()>> out, out_committed;   // copies out
};

struct Barrier {
    long arrivals, pending, bytes;
    u32 phase;
};

struct Meeting {  // of some threads: a named barrier, a warp, a warpgroup
    u32 arrived = 0, threads = 0;
    u64 generation = 0;
    u64 value[2][32];          // by lane
    bool any[2] = {};          // whether any value is not 0
};

struct Block {
    std::vector<Thread> threads;
    Thread *current = nullptr;
    ucontext_t hub;
    std::map<u32, Barrier> barriers;
    std::map<u32, std::vector<std::function<void()>>> copies;  // barrier -> copies that are on their way
    std::map<std::string, Meeting> meetings;
    std::string error;
    bool late_arrivals = false, late_readers = false;
    bool progress = false, idle = false;  // whether anybody went on in this round; nobody in the last one
    u32 shared_bytes = 0;
    std::function<void()> body;
};
inline Block *block;
inline u32 ticks;   // a clock of the order of things, not of time
inline u64 stored;  // numbers to global memory, by `store` and its like, since the launch began

[[noreturn]] inline void fail(const std::string &what) {
    throw std::runtime_error(what + ", thread " + std::to_string(threadIdx.x) + " of block " + std::to_string(blockIdx.x));
}

template <class Ready>
void until(const std::string &what, Ready ready) {
    Thread *me = block->current;
    while (!ready()) {
        me->waits = what;
        swapcontext(&me->context, &block->hub);
    }
    me->waits.clear();
    block->progress = true;
}

// Late readers: a thread that has let others go on does so itself after them, who may overwrite what it reads.
inline void after_others() {
    if (!block->late_readers) return;
    block->progress = true;
    swapcontext(&block->current->context, &block->hub);
}

// Whether what was asked for happens now: at once, or late, when nobody else can go on.
inline bool due(bool late) {
    if (late && !block->idle) return false;
    block->idle = false, block->progress = true;
    return true;
}

inline void entry() {
    try {
        block->body();
        Thread *me = block->current;
        if (!me->batch.empty() || !me->batches.empty()) fail("products were never waited for");
        if (!me->out.empty() || !me->out_committed.empty()) fail("copies out were never waited for");
    } catch (const std::exception &error) {
        if (block->error.empty()) block->error = error.what();
    }
    block->current->done = block->progress = true;
    swapcontext(&block->current->context, &block->hub);
}

inline std::string deadlock() {
    std::map<std::string, std::string> who;
    for (auto &t : block->threads)
        if (!t.done) {
            std::string &warps = who[t.waits], name = std::to_string(t.x / 32);
            if (warps.empty() || warps.substr(warps.rfind(' ') + 1) != name) warps += " " + name;
        }
    std::string text = "nobody can go on in block " + std::to_string(blockIdx.x);
    for (auto &[what, warps] : who) text += "; " + what + ": warps" + warps;
    return text;
}

constexpr size_t STACK = 128 << 10;

// Runs one block; returns what went wrong, or nothing.
inline std::string run_block(u32 threads, u32 shared_bytes, bool late_arrivals, bool late_readers, u32 seed,
                             std::function<void()> body) {
    Block b;
    block = &b;
    b.late_arrivals = late_arrivals, b.late_readers = late_readers;
    b.shared_bytes = shared_bytes, b.body = std::move(body);
    std::memset(dynamic, 0xFF, sizeof dynamic);
    b.threads.resize(threads);
    for (u32 x = 0; x < threads; ++x) {
        Thread &t = b.threads[x];
        t.x = x;
        t.stack.reset(new unsigned char[STACK]);
        std::memset(t.stack.get(), 0xFF, STACK);
        getcontext(&t.context);
        t.context.uc_stack.ss_sp = t.stack.get(), t.context.uc_stack.ss_size = STACK, t.context.uc_link = nullptr;
        makecontext(&t.context, entry, 0);
    }
    std::vector<u32> order(threads);
    for (u32 x = 0; x < threads; ++x) order[x] = x;
    for (bool left = true; left && b.error.empty();) {
        for (u32 x = threads; seed && x > 1; --x) {
            seed = seed * 1664525 + 1013904223;
            std::swap(order[x - 1], order[seed % 65521 % x]);
        }
        left = b.progress = false;
        for (u32 x : order) {
            Thread &t = b.threads[x];
            if (t.done) continue;
            left = true, b.current = &t, threadIdx.x = x;
            swapcontext(&b.hub, &t.context);
            if (!b.error.empty()) break;
        }
        if (left && !b.progress && b.idle && b.error.empty()) b.error = deadlock();
        b.idle = !b.progress;
    }
    if (b.error.empty())
        for (auto &[barrier, copies] : b.copies)
            if (!copies.empty()) b.error = "copies into shared memory were never waited for";
    return b.error;
}

// The threads of one meeting; each leaves `value` for the others.  Returns what they left, by lane.
inline const u64 *meet(const std::string &name, u32 threads, u64 value = 0) {
    Meeting &m = block->meetings[name];
    const u64 mine = m.generation;
    m.value[mine % 2][threadIdx.x % 32] = value;
    m.any[mine % 2] |= value != 0;
    m.threads = threads;
    if (++m.arrived == threads) m.arrived = 0, ++m.generation, m.any[m.generation % 2] = false, block->progress = true;
    until(name, [&] { return m.generation != mine; });
    return m.value[mine % 2];
}

inline std::string warp() { return "lanes of a warp " + std::to_string(threadIdx.x / 32); }

// ---- shared memory ------------------------------------------------------------------------------------------------

// 16-byte chunks change places within 8 rows, which are `width` bytes wide: 128, 64 or 32.
inline u32 swizzled(u32 address, u32 width) { return address ^ (address >> 7 & (width / 16 - 1)) << 4; }

inline unsigned char *at(u32 address, u32 bytes) {
    if (address + bytes > block->shared_bytes) fail("address " + std::to_string(address) + " is past shared memory");
    return dynamic + address;
}

constexpr int bytes_of(int type) { return type == E4M3 ? 1 : 2; }

inline float number(uint16_t bits, int type) {
    uint32_t word;
    if (type == E4M3) {
        const int exponent = bits >> 3 & 15, fraction = bits & 7;
        if (exponent == 15 && fraction == 7) return NAN;
        return std::ldexp(float(exponent ? 8 + fraction : fraction), max(exponent, 1) - 10) * (bits & 0x80 ? -1.f : 1.f);
    }
    if (type == BFLOAT) {
        word = uint32_t(bits) << 16;
    } else {
        const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
        if (exponent == 0) return std::ldexp(float(fraction), -24) * (sign ? -1.f : 1.f);
        word = sign | (exponent == 31 ? 0x7F800000 : (exponent + 112) << 23) | fraction << 13;
    }
    float x;
    std::memcpy(&x, &word, 4);
    return x;
}

inline uint16_t bits_of(float x, int type) {  // to nearest even; of E4M3 what is larger than 448 becomes 448
    uint32_t word;
    std::memcpy(&word, &x, 4);
    if (type == E4M3) {
        const uint32_t sign = word >> 24 & 0x80;
        if (std::isnan(x)) return 0x7F;
        const float size = std::fabs(x);
        if (size >= 448.f) return sign | 0x7E;
        if (size < 0.015625f) return sign | uint32_t(std::nearbyint(std::ldexp(size, 9)));
        word = (word & 0x7FFFFFFF) - (120u << 23);
        return sign | (word + 0x7FFFF + (word >> 20 & 1)) >> 20;
    }
    const uint32_t sign = word >> 16 & 0x8000;
    if (type == BFLOAT) return std::isnan(x) ? 0x7FFF : (word + 0x7FFF + (word >> 16 & 1)) >> 16;
    if (std::isnan(x)) return 0x7FFF;
    const float size = std::fabs(x);
    if (size >= 65520.f) return sign | 0x7C00;
    if (size < 6.103515625e-05f) return sign | uint32_t(std::nearbyint(std::ldexp(size, 24)));
    word = (word & 0x7FFFFFFF) - (112u << 23);
    return sign | (word + 0xFFF + (word >> 13 & 1)) >> 13;
}

inline float element(u32 address, u32 width, int type) {
    uint16_t bits = 0;
    std::memcpy(&bits, at(swizzled(address, width), bytes_of(type)), bytes_of(type));
    return number(bits, type);
}

// ---- products -----------------------------------------------------------------------------------------------------

inline u32 start_of(u64 d) { return (d & 0x3FFF) << 4; }
inline u32 leading_of(u64 d) { return (d >> 16 & 0x3FFF) << 4; }
inline u32 stride_of(u64 d) { return (d >> 32 & 0x3FFF) << 4; }

// The width of a panel: its swizzle.
inline u32 width_of(u64 d) {
    if (d >> 62 == 0) fail("a descriptor without swizzle");
    return 256 >> (d >> 62);
}

// Where row r of a tile by columns has its k-th byte.
inline u32 by_columns_at(u64 d, int r, int k) { return start_of(d) + r / 8 * stride_of(d) + r % 8 * width_of(d) + k; }

// rC of a warpgroup [64, N] += A [64, K] B [K, N], the i-th product of the oldest batch of all its threads.
inline void carry_out(Thread *group, size_t i) {
    const Wgmma &p = group[0].batches.front()[i];
    const int size = bytes_of(p.type), K = 32 / size, in_one = 4 / size;  // numbers in a register
    if (!p.by_columns && width_of(p.b) != 128) fail("a product by rows of panels that are not 128 bytes wide");
    std::vector<float> A(64 * K), B(K * p.N);
    for (int r = 0; r < 64; ++r)
        for (int k = 0; k < K; ++k) {
            if (p.registers) {  // lane 4 (r % 8) + k / in_one % 4 of warp r / 16; registers: rows r, r + 8, then k + K / 2
                const Thread &t = group[r / 16 * 32 + r % 8 * 4 + k / in_one % 4];
                const u32 some = t.batches.front()[i].registers[r / 8 % 2 + k / (K / 2) * 2];
                A[K * r + k] = number(some >> 8 * size * (k % in_one) & (size == 1 ? 0xFF : 0xFFFF), p.type);
            } else {
                A[K * r + k] = element(by_columns_at(p.a, r, k * size), width_of(p.a), p.type);
            }
        }
    for (int n = 0; n < p.N; ++n)
        for (int k = 0; k < K; ++k)
            B[K * n + k] = p.by_columns
                ? element(by_columns_at(p.b, n, k * size), width_of(p.b), p.type)
                : element(start_of(p.b) + n / 64 * leading_of(p.b) + k / 8 * stride_of(p.b) + k % 8 * 128 + n % 64 * 2, 128,
                          p.type);
    for (int x = 0; x < 128; ++x) {
        const Wgmma &mine = group[x].batches.front()[i];
        for (int e = 0; e < p.N / 2; ++e) {
            const int r = x / 32 * 16 + x % 32 / 4 + e / 2 % 2 * 8, n = e / 4 * 8 + x % 4 * 2 + e % 2;
            float sum = mine.add ? mine.c[e] : 0.f;
            for (int k = 0; k < K; ++k) sum += A[K * r + k] * B[K * n + k];
            mine.c[e] = sum;
        }
    }
}

// A thread waits until all but its youngest `pending` batches are carried out, each when the whole warpgroup has asked.
inline void products_until(size_t pending) {
    Thread *me = block->current, *group = &block->threads[threadIdx.x / 128 * 128];
    until("products of warpgroup " + std::to_string(threadIdx.x / 128), [&] {
        while (me->batches.size() > pending) {
            if (std::any_of(group, group + 128, [](const Thread &t) { return t.batches.empty(); })) return false;
            if (!due(block->late_readers)) return false;
            for (int x = 0; x < 128; ++x)
                if (group[x].batches.front().size() != group[0].batches.front().size())
                    fail("the threads of a warpgroup asked for different products");
            for (size_t i = 0; i < group[0].batches.front().size(); ++i) carry_out(group, i);
            for (int x = 0; x < 128; ++x) group[x].batches.pop_front();
        }
        return true;
    });
}

// ---- copies -------------------------------------------------------------------------------------------------------

template <class Visit>
void box(const TensorMap &map, u32 tile, const int (&from)[4], Visit visit) {
    const u64 width = map.box[0] * map.element;
    if ((width != 128 && width != 64 && width != 32) || map.box[2] != 1 || map.box[3] != 1) fail("a box that is no panel");
    if (from[1] + (long long)map.box[1] <= 0) fail("a box above the first row: an illegal instruction on a GPU");
    if (tile % (8 * width)) fail("a swizzled tile that does not start at a multiple of 8 rows");
    for (u64 r = 0; r < map.box[1]; ++r)
        for (u64 c = 0; c < map.box[0]; ++c) {
            const long long place[4] = {from[0] + (long long)c, from[1] + (long long)r, from[2], from[3]};
            unsigned char *there = map.data;
            for (int i = 0; i < 4; ++i) {
                if (place[i] < 0 || place[i] >= (long long)map.size[i]) there = nullptr;
                if (there) there += place[i] * map.stride[i];
            }
            visit(at(swizzled(tile + r * width + c * map.element, width), map.element), there);
        }
}

inline void arrive(u32 address, long count, long bytes) {
    auto found = block->barriers.find(address);
    if (found == block->barriers.end()) fail("a barrier that was not initialised");
    Barrier &b = found->second;
    b.pending -= count, b.bytes += bytes;
    if (b.pending < 0) fail("one arrival too many at a barrier");
    if (b.pending == 0 && b.bytes == 0) b.pending = b.arrivals, ++b.phase;
    block->progress = true;
}

}  // namespace emulated

// ---- ptx.cuh --------------------------------------------------------------------------------------------------------

inline unsigned char *shared_memory() { return dynamic; }
inline u32 shared_address(const void *p) { return static_cast<const unsigned char *>(p) - dynamic; }

inline void barrier_init(u32 barrier, u32 arrivals) {
    emulated::block->barriers[barrier] = {long(arrivals), long(arrivals), 0, 0};
}
inline void barrier_init_fence() {}
inline void barrier_arrive(u32 barrier) { emulated::arrive(barrier, 1, 0), emulated::after_others(); }
inline void barrier_expect(u32 barrier, u32 bytes) { emulated::arrive(barrier, 1, bytes); }

inline void barrier_wait(u32 barrier, u32 parity) {
    emulated::until("barrier at " + std::to_string(barrier) + " of parity " + std::to_string(parity), [&] {
        auto &copies = emulated::block->copies[barrier];
        if (!copies.empty() && emulated::due(true)) {
            for (auto &copy : copies) copy();
            copies.clear();
        }
        return emulated::block->barriers.at(barrier).phase % 2 != parity;
    });
}

inline void named_sync(u32 name, u32 threads) { emulated::meet("named barrier " + std::to_string(name), threads); }

inline void named_arrive(u32 name, u32 threads) {
    emulated::Meeting &m = emulated::block->meetings["named barrier " + std::to_string(name)];
    if (++m.arrived == threads) m.arrived = 0, ++m.generation;
    emulated::block->progress = true;
}

inline void __syncthreads() { emulated::meet("__syncthreads", emulated::block->threads.size()); }
inline bool __syncthreads_or(bool mine) {
    const emulated::Meeting &m = emulated::block->meetings["__syncthreads"];
    const u64 generation = m.generation;
    emulated::meet("__syncthreads", emulated::block->threads.size(), mine);
    return m.any[generation % 2];
}
inline void __syncwarp(u32 lanes) {
    if (lanes == ~0u) emulated::meet(emulated::warp(), 32);
    else if (lanes != 1u << threadIdx.x % 32) emulated::fail("lanes that are neither a warp nor this one");
}

template <class Number>  // of 4 bytes
Number __shfl_sync(u32, Number x, int lane) {
    return __builtin_bit_cast(Number, u32(emulated::meet(emulated::warp(), 32, __builtin_bit_cast(u32, x))[lane % 32]));
}

template <class Number>
Number __shfl_xor_sync(u32 lanes, Number x, int lane) {
    return __shfl_sync(lanes, x, threadIdx.x % 32 ^ lane);
}

inline bool __any_sync(u32, bool mine) {
    const u64 *all = emulated::meet(emulated::warp(), 32, mine);
    return std::any_of(all, all + 32, [](u64 one) { return one != 0; });
}

inline int atomicAdd(int *to, int x) { return std::exchange(*to, *to + x); }

constexpr u64 EVICT_FIRST = 0, EVICT_LAST = 0;

inline void copy_in(u32 tile, const TensorMap &map, u32 barrier, int column, int row, int head, int batch, u64) {
    auto copy = [=, &map] {
        const int from[4] = {column, row, head, batch};
        emulated::box(map, tile, from, [&](unsigned char *here, const unsigned char *there) {
            if (there) std::memcpy(here, there, map.element), ++map.moved[0];
            else std::memset(here, 0, map.element);
        });
        emulated::arrive(barrier, 0, -long(map.box[0] * map.box[1] * map.element));
    };
    if (emulated::block->late_arrivals) emulated::block->copies[barrier].push_back(copy);
    else copy(), emulated::after_others();
}

inline void copy_out(const TensorMap &map, u32 tile, int column, int row, int head, int batch) {
    emulated::block->current->out.push_back([=, &map] {
        const int from[4] = {column, row, head, batch};
        emulated::box(map, tile, from, [&](const unsigned char *here, unsigned char *there) {
            if (there) std::memcpy(there, here, map.element), ++map.moved[1];
        });
    });
}

inline void copies_out_commit() {
    auto &t = *emulated::block->current;
    for (auto &copy : t.out)
        if (emulated::block->late_readers) t.out_committed.push_back(copy);
        else copy();
    t.out.clear();
}

inline void copies_out_read() {
    auto &t = *emulated::block->current;
    if (!t.out_committed.empty()) emulated::until("copies out", [] { return emulated::due(true); });
    for (auto &copy : t.out_committed) copy();
    t.out_committed.clear();
}

inline void prefetch(const TensorMap &) {}

inline void async_fence() {
    auto &stores = emulated::block->current->stores;
    for (auto &[address, word] : stores) std::memcpy(emulated::at(address, 4), &word, 4);
    stores.clear();
}

template <int Registers>
void take_registers() {}
template <int Registers>
void give_registers() {}

inline int uniform(u32, int x) { return x; }
inline int first_lane(u32 lanes, const int &x) {
    if (lanes != ~0u) return x;
    return emulated::meet(emulated::warp(), 32, threadIdx.x % 32 == 0 ? x : 0)[0];
}

inline u32 cycles() { return ++emulated::ticks; }
inline u32 nanoseconds() { return emulated::ticks; }

template <int Size>
void settled(float (&)[Size]) {}

inline int anew(int x) { return x; }

template <int Size>
void made_anew(float (&x)[Size]) {
    std::fill(x, x + Size, std::nanf(""));  // who needs what was there will see
}

// These wait for all lanes of the warp, as their .sync says.
inline void products_begin() { emulated::meet(emulated::warp(), 32); }

inline void products_commit() {
    emulated::meet(emulated::warp(), 32);
    auto &t = *emulated::block->current;
    t.batches.push_back(std::move(t.batch));
    t.batch.clear();
    if (!emulated::block->late_readers) emulated::products_until(0);
}

template <int Pending, int Size>
void products_wait(float (&)[Size]) {
    emulated::meet(emulated::warp(), 32);
    emulated::products_until(Pending);
}

inline float load(const float *from) { return *static_cast<const volatile float *>(from); }  // even if nobody uses it

inline void store(float *to, float x) { *to = x, ++emulated::stored; }

inline void load_16_bytes(u32 address, u32 *to) {
    if (address % 16) emulated::fail("a load of 16 bytes that is not aligned");
    std::memcpy(to, emulated::at(address, 16), 16);
}
inline void store_4_bytes(u32 address, u32 x) {
    if (address % 4) emulated::fail("a store of 4 bytes that is not aligned");
    emulated::block->current->stores.push_back({address, x});
}
inline void store_16_bytes(u32 address, const u32 (&x)[4]) {
    if (address % 16) emulated::fail("a store of 16 bytes that is not aligned");
    for (int n = 0; n < 4; ++n) store_4_bytes(address + 4 * n, x[n]);
}

inline void raise(int *to, int x) { *to = max(*to, x); }

inline float max_or_nan(float a, float b) {
    return std::isnan(a) || std::isnan(b) ? __builtin_bit_cast(float, 0x7FFFFFFF) : max(a, b);
}

inline int largest(int x) {  // of x >= 0
    const u64 *all = emulated::meet(emulated::warp(), 32, x);
    return int(*std::max_element(all, all + 32));
}

inline u32 __byte_perm(u32 a, u32 b, u32 selector) {
    const u64 both = a | u64(b) << 32;
    u32 chosen = 0;
    for (int n = 0; n < 4; ++n) chosen |= u32(both >> 8 * (selector >> 4 * n & 7) & 0xFF) << 8 * n;
    return chosen;
}

inline float exp2_approx(float x) { return exp2f(x); }

inline float log2_approx(float x) { return log2f(x); }

inline float __fdividef(float x, float y) { return x / y; }

inline float reciprocal(float x) { return 1.f / x; }

template <bool Bf16>
u32 pack(float low, float high) {
    return emulated::bits_of(low, Bf16) | u32(emulated::bits_of(high, Bf16)) << 16;
}

template <bool Bf16>
void unpack(u32 both, float &low, float &high) {
    low = emulated::number(both & 0xFFFF, Bf16), high = emulated::number(both >> 16, Bf16);
}

inline u32 pack_e4m3(float a, float b, float c, float d) {
    const auto bits = [](float x) { return u32(emulated::bits_of(x, E4M3)); };
    return bits(a) | bits(b) << 8 | bits(c) << 16 | bits(d) << 24;
}

template <bool Transposed = false>
void load_matrices(u32 address, u32 *to) {
    const u32 lane = threadIdx.x % 32;
    const u64 *addresses = emulated::meet(emulated::warp(), 32, address);
    for (int i = 0; i < 4; ++i)
        for (u32 e = 0; e < 2; ++e) {  // a lane has two neighbours of row lane / 4, or of that column
            const u32 row = Transposed ? lane % 4 * 2 + e : lane / 4, column = Transposed ? lane / 4 : lane % 4 * 2 + e;
            std::memcpy(reinterpret_cast<unsigned char *>(to + i) + 2 * e,
                        emulated::at(u32(addresses[8 * i + row]) + 2 * column, 2), 2);
        }
}

inline void store_matrices(u32 address, u32 a, u32 b, u32 c, u32 d) {
    const u32 words[4] = {a, b, c, d}, lane = threadIdx.x % 32;
    const u64 *addresses = emulated::meet(emulated::warp(), 32, address);
    for (int i = 0; i < 4; ++i)
        emulated::block->current->stores.push_back({u32(addresses[8 * i + lane / 4]) + lane % 4 * 4, words[i]});
}

// ---- wgmma.cuh ------------------------------------------------------------------------------------------------------

template <int N, int Type>
struct Product {
    static void tiles(float (&c)[N / 2], u64 a, int a_on, u64 b, int b_on, int add) {
        emulated::block->current->batch.push_back({c, a + a_on, b + b_on, nullptr, true, N, Type, add != 0});
    }
    static void columns(float (&c)[N / 2], const u32 *a, u64 b, int b_on, int add) {
        emulated::block->current->batch.push_back({c, 0, b + b_on, a, true, N, Type, add != 0});
    }
    static void rows(float (&c)[N / 2], const u32 *a, u64 b, int b_on) {
        static_assert(Type != E4M3, "the hardware has none");
        emulated::block->current->batch.push_back({c, 0, b + b_on, a, false, N, Type, true});
    }
};
