// A .cu file of a Hopper kernel as a shared library of this machine: KERNEL is the file, ENTRY its kernel.
#include "emulated.h"

#include KERNEL

namespace {

template <class... Parameters, size_t... i>
void call(void (*kernel)(Parameters...), void **arguments, std::index_sequence<i...>) {
    kernel(*static_cast<std::remove_reference_t<Parameters> *>(arguments[i])...);
}

template <class... Parameters>
void call(void (*kernel)(Parameters...), void **arguments) {
    call(kernel, arguments, std::index_sequence_for<Parameters...>());
}

}  // namespace

// Arguments as cuLaunchKernel takes them.  Returns 0, or 1 and in `error` what went wrong.
extern "C" int launch(u32 grid, u32 threads, u32 shared_bytes, void **arguments, int late_arrivals,
                      int late_readers, u32 seed, u64 *stored, char *error, u32 room) {
    gridDim = {grid, 1, 1};
    emulated::stored = 0;
    for (u32 x = 0; x < grid; ++x) {
        blockIdx = {x, 0, 0};
        const std::string what = emulated::run_block(
            threads, shared_bytes, late_arrivals, late_readers, seed, [&] { call(ENTRY, arguments); });
        if (!what.empty()) {
            std::strncpy(error, what.c_str(), room - 1);
            return 1;
        }
    }
    *stored = emulated::stored;
    return 0;
}
