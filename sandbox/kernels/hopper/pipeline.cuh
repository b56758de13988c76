// Who may use which tile of shared memory: a ring of stages between the copy engine and the warpgroups that multiply.
// [FA3, 2407.08608, Algorithm 1: the circular buffer of a producer and its consumers]
#pragma once

#include "ptx.cuh"

// One side's place in a ring of Size stages.  Each stage has two barriers: full, when its bytes have arrived; empty, when
// every consumer has released it.
template <int Size>
struct Ring {
    u32 barriers;  // Size of them full, Size empty, 8 bytes each
    int stage = 0;
    u32 parity = 0;  // of the phase that this side waits for

    DEVICE Ring(u64 *barriers) : barriers(shared_address(barriers)) {}

    static DEVICE void init(u64 *barriers, u32 consumers) {
        for (int s = 0; s < Size; ++s) {
            barrier_init(shared_address(barriers + s), 1);
            barrier_init(shared_address(barriers + Size + s), consumers);
        }
    }

    DEVICE u32 full() const { return barriers + 8 * stage; }
    DEVICE u32 empty() const { return full() + 8 * Size; }

    // The producer: waits for the stage to be free (all are at first), and announces the bytes that copies bring there,
    // or says that what it wrote there itself is complete.
    DEVICE void acquire() const { barrier_wait(empty(), parity ^ 1); }
    DEVICE void announce(u32 bytes) const { barrier_expect(full(), bytes); }
    DEVICE void publish() const { barrier_arrive(full()); }

    // A consumer: waits for the stage's bytes; later, one lane of each warp releases it.
    DEVICE void wait() const { barrier_wait(full(), parity); }

    DEVICE void release() const {
        if (threadIdx.x % 32 == 0) barrier_arrive(empty());
    }

    // What this consumer does not use.
    DEVICE void skip() {
        wait();
        __syncwarp(~0u);  // all lanes have waited: after the release the next phase may come, and go
        release();
        next();
    }

    // The same stage at its next use: with it a consumer that is the producer, too, asks for tiles.
    DEVICE Ring again() const {
        Ring ring = *this;
        ring.parity ^= 1;
        return ring;
    }

    DEVICE void next() {
        if (++stage == Size) stage = 0, parity ^= 1;
    }
};

// Ping-pong: warpgroups take turns at the tensor cores, so that one's softmax runs under another's products.  [FA3 §3.1]
template <int Warpgroups, bool On>
struct Turns {
    int mine, next;  // names of barriers

    DEVICE Turns(int warpgroup) : mine(FIRST_NAME + warpgroup), next(FIRST_NAME + (warpgroup + 1) % Warpgroups) {
        if (On && warpgroup == 0) named_arrive(mine, 256);  // the first turn is the first warpgroup's
    }

    DEVICE void wait() const {
        if (On) named_sync(mine, 256);
    }

    DEVICE void pass() const {
        if (On) named_arrive(next, 256);
    }

    static constexpr int FIRST_NAME = 1;  // 0 is __syncthreads
};
