// Barriers between the warps of a block: transaction barriers in shared memory, and the hardware's named ones.
#pragma once
#include "config.cuh"

using Barrier = unsigned long long;

__device__ __forceinline__ u32 shared_address(const void* pointer) { return u32(__cvta_generic_to_shared(pointer)); }

// The barrier's phase ends after `arrivals` arrivals; phases are told apart by their parity, the first is 0.
__device__ __forceinline__ void barrier_init(Barrier& barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}
template <int kCount>
__device__ __forceinline__ void barrier_init(Barrier (&barriers)[kCount], int arrivals) {
    for (Barrier& barrier : barriers) barrier_init(barrier, arrivals);
}
__device__ __forceinline__ void barrier_arrive(Barrier& barrier, int count = 1) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(count) : "memory");
}

#if !defined(FT_EVERY_LANE_ARRIVES)
#define FT_EVERY_LANE_ARRIVES 0
#endif
// A warp's sign that all its lanes are done. One lane arrives for all: what the others did comes before, by __syncwarp or
// a product of the whole warp. compute-sanitizer's racecheck does not follow that; a build for it lets each lane arrive.
constexpr int kWarpArrivals = FT_EVERY_LANE_ARRIVES ? kWarpSize : 1;
__device__ __forceinline__ void barrier_arrive_warp(Barrier& barrier, int count = 1) {
    if (int(threadIdx.x) % kWarpSize < kWarpArrivals) barrier_arrive(barrier, count);
}
// Whether the phase of this parity has ended; may wait for it a while.
__device__ __forceinline__ bool barrier_try_wait(Barrier& barrier, int parity) {
    u32 done;
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done)
                 : "r"(shared_address(&barrier)), "r"(parity)
                 : "memory");
    return done;
}
__device__ __forceinline__ void barrier_wait(Barrier& barrier, int parity) {
    while (!barrier_try_wait(barrier, parity)) {
    }
}

// The barrier's phase does not end before copies that report to it have brought so many bytes more.
__device__ __forceinline__ void barrier_expect(Barrier& barrier, int bytes) {
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
                 : "memory");
}

// Named barriers 0 to 15, 0 that of __syncthreads, for `threads` threads in all.
__device__ __forceinline__ void named_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Orders what this thread knows to be in shared memory before what matrix products and bulk copies do there next.
__device__ __forceinline__ void fence_shared_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
