// The queries of a worker's items: their copies to shared memory.
#pragma once
#include "kv_tile.cuh"
#include "worker.cuh"

// Starts the copies of a warp's share of an item's queries, kShareRows rows, a row's place a lane. Of rows past the last
// nobody looks at what is computed. They get queries of the item's own: a row that all blocks asked for would keep its part
// of the L2 cache from everybody else. Mostly done once, when four passes at a time cost less than their code.
template <int kShareRows>
__device__ __forceinline__ void copy_queries(const WorkParams& p, Shared& s, const WorkItem& item, int slot, int share) {
    using Place = PanelPlace<kRows, kRowVectors>;
    static_assert(kShareRows <= kWarpSize, "a lane holds one row's place");
    const int first_row = share * kShareRows, lane = threadIdx.x % kWarpSize;
    const QueryRow own(p, item, first_row + lane % kShareRows);
    const Place to(first_row, lane);
    const u32 tile = shared_address(s.q[slot]);
    const i64 row = own.request >= 0 ? own.request * p.q_stride_request + own.head * p.q_stride_head : 0;
#pragma unroll 4
    for (int pass = 0; pass < kShareRows / Place::kRowsPerPass; ++pass) {
        const i64 from = __shfl_sync(0xffffffffu, row, pass * Place::kRowsPerPass + lane / kRowVectors);
        copy_async_16(tile + to.offset(pass), p.q + from + lane % kRowVectors * 8);
    }
}
