// What CUDA C++ offers without a header, for the machine of machine.h.
#pragma once
#include <cmath>

#include "machine.h"

#define threadIdx (gpu::lane().thread)
#define blockIdx (gpu::block().index)
#define gridDim (gpu::machine.grid)

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }

inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __ffsll(long long bits) { return __builtin_ffsll(bits); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline float __uint_as_float(unsigned bits) { return __builtin_bit_cast(float, bits); }
inline unsigned __float_as_uint(float value) { return __builtin_bit_cast(unsigned, value); }
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const unsigned long long bytes = (unsigned long long)(high) << 32 | low;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= unsigned(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return result;
}
template <typename T>
T __ldcg(const T* from) {
    return *from;
}
template <typename T>
void __stcg(T* to, T value) {
    *to = value;
}
inline size_t __cvta_generic_to_shared(const void* pointer) {
    return size_t(static_cast<const unsigned char*>(pointer) - gpu::block().shared);
}

// Instructions of a warp. The mask is always that of all lanes.
template <typename T>
struct Exchange {
    T value;
    int argument;
    T result;
};
template <typename T, typename From>
T exchange(const char* instruction, T value, int argument, const From& from) {
    Exchange<T> own{value, argument, value};
    gpu::together(instruction, own, [&](Exchange<T>** lanes) {
        for (int i = 0; i < gpu::kLanes; ++i) lanes[i]->result = lanes[from(i, lanes[i]->argument)]->value;
    });
    return own.result;
}
template <typename T>
T __shfl_sync(unsigned, T value, int from) {
    return exchange("shfl", value, from, [](int, int from) { return from & 31; });
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return exchange("shfl.xor", value, mask, [](int lane, int mask) { return lane ^ mask; });
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int distance) {
    return exchange("shfl.up", value, distance, [](int lane, int by) { return lane < by ? lane : lane - by; });
}
template <typename T, typename Combine>
T reduce(const char* instruction, T value, const Combine& combine) {
    Exchange<T> own{value, 0, value};
    gpu::together(instruction, own, [&](Exchange<T>** lanes) {
        T all = lanes[0]->value;
        for (int i = 1; i < gpu::kLanes; ++i) all = combine(all, lanes[i]->value);
        for (int i = 0; i < gpu::kLanes; ++i) lanes[i]->result = all;
    });
    return own.result;
}
template <typename T>
T __reduce_or_sync(unsigned, T value) {
    return reduce("redux.or", value, [](T a, T b) { return a | b; });
}
template <typename T>
T __reduce_and_sync(unsigned, T value) {
    return reduce("redux.and", value, [](T a, T b) { return a & b; });
}
inline unsigned __ballot_sync(unsigned, bool holds) {
    return reduce("vote.ballot", unsigned(holds) << gpu::lane().number, [](unsigned a, unsigned b) { return a | b; });
}
inline bool __any_sync(unsigned, bool holds) {
    return reduce("vote.any", holds, [](bool a, bool b) { return a || b; });
}
inline bool __all_sync(unsigned, bool holds) {
    return reduce("vote.all", holds, [](bool a, bool b) { return a && b; });
}
inline void __syncwarp() {
    int nothing = 0;
    gpu::together("syncwarp", nothing, [](int**) {});
}
inline void sync_named(int id, int threads) {
    gpu::NamedBarrier& barrier = gpu::block().named[id];
    if (++barrier.arrived == threads) {
        barrier.arrived = 0;
        ++barrier.over;
        return;
    }
    gpu::check(barrier.arrived < threads, "more threads than a named barrier is for");
    const int phase = barrier.over;
    gpu::wait_until([&barrier, phase] { return barrier.over != phase; }, "named barrier " + std::to_string(id));
}
inline void __syncthreads() { sync_named(0, gpu::machine.threads); }
