// What each warpgroup is at, and since when: for `python -m sandbox trace`.
//
// Compile-time, by -D: TRACE, how many marks a warpgroup may leave.  By default none, and then all of this is nothing.
// A mark is two numbers: a reading of the multiprocessor's clock, and the state that begins there.
#pragma once

#include "ptx.cuh"

#ifndef TRACE
#define TRACE 0
#endif

// FOR_x: waits for x.  The order is that of sandbox/measure/trace.py.
enum State {
    NONE, NANOSECONDS, FOR_WORK, FOR_Q, FOR_K, FOR_TURN, QK, FOR_V, PV, FOR_S, SOFTMAX, FOR_O, PACK, FINISH, END
};

struct Trace {
    u32 *to, *end;

    // One thread of each warpgroup leaves marks, and first what ties the clock to time: `track` counts warpgroups of all
    // blocks.
    DEVICE Trace(u32 *marks, int track) : to(marks + 2 * TRACE * track), end(to) {
        if (TRACE && threadIdx.x % 128 == 0) end += 2 * TRACE, tie();
    }

    DEVICE void enter(State state) {
        if (TRACE) mark(cycles(), state);
    }

    DEVICE void leave() {
        if (TRACE) enter(END), tie();
    }

    DEVICE void tie() {
        mark(cycles(), NANOSECONDS);
        mark(nanoseconds(), NANOSECONDS);
    }

    DEVICE void mark(u32 when, State state) {
        if (to < end) to[0] = when, to[1] = state, to += 2;
    }
};
