// Copies by the bulk copy engine (sm_90): boxes of rows of K and V, which come swizzled as matrix products read them.
#pragma once
#include "barrier.cuh"
#include "cache_policy.cuh"
#include "wgmma.cuh"

constexpr int kBoxTokens = 16;
constexpr int kBoxBytes = kBoxTokens * kPanelRowBytes;
static_assert(kBoxTokens == 16 && kPanelRowBytes == 128, "as boxes are in tensor_map.py");

// Where a bulk copy finds K or V: made by cuTensorMapEncodeTiled in fasttree_cupy/execution/tensor_map.py.
struct alignas(64) TensorMap {
    unsigned long long opaque[16];
};

// Starts the copy of a box of K or V: 16 rows from `row` on, 128 bytes from `element` on. By one thread; the barrier's phase
// ends when the bytes that it expects are there. read_once: nobody else reads the rows.
__device__ __forceinline__ void copy_box(u32 to, const TensorMap& map, int element, int head, int row, Barrier& full,
                                         bool read_once) {
    const u64 policy = read_once ? kReadOncePolicy : kNormalPolicy;
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
                 "l"(&map), "r"(element), "r"(head), "r"(row), "r"(shared_address(&full)), "l"(policy)
                 : "memory");
}
__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// True in one lane of a warp.
__device__ __forceinline__ bool elected() {
    u32 yes;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(yes));
    return yes;
}
