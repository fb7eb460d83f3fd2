// Grid (workers), block 384 threads, one a multiprocessor: a worker's items of a balanced plan, one after the other.
//
// Four producer warps gather the tokens of item after item into rings of tiles; two warpgroups attend them, 64 query
// rows each. The rings run ahead over the ends of items, so that these cost no bandwidth. With one row group the
// warpgroups take turns at the tiles and are merged at the item's end; with two, each has its own rows of every tile.
// The worker that finishes the last piece of some rows merges their pieces, or all that end with it do so together.
#include "worker_consumer.cuh"
#include "worker_producer.cuh"

#if defined(FT_KV_ELEMENT)
#include "worker_float8.cuh"
using ProducerWarp = Float8Producer;
#else
using ProducerWarp = Producer;
#endif

extern "C" __global__ void __launch_bounds__(kThreads, 1) tree_decode_sm90(const __grid_constant__ WorkParams p) {
    extern __shared__ __align__(1024) unsigned char memory[];
    Shared& s = *reinterpret_cast<Shared*>(memory);
    if (threadIdx.x == 0) {
        prefetch_item(p.items + blockIdx.x);
        for (Barrier& barrier : s.k_full) barrier_init(barrier, ProducerWarp::kKeyArrivals);
        for (Barrier& barrier : s.v_full) barrier_init(barrier, ProducerWarp::kValueArrivals);
        for (Barrier& barrier : s.q_full) barrier_init(barrier, kProducerWarps * kWarpSize);
        for (Barrier& barrier : s.k_empty) barrier_init(barrier, kConsumerWarps / kTokenGroups);
        for (Barrier& barrier : s.v_empty) barrier_init(barrier, kConsumerWarps / kTokenGroups);
        for (Barrier& barrier : s.q_empty) barrier_init(barrier, kConsumerWarps);
    }
    __syncthreads();
    // Tiles of 128 tokens take more registers than an equal share: the producers leave theirs.
    if (threadIdx.x < kConsumerWarps * kWarpSize) {
        if (kTileTokens > 64) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kConsumerRegisters));
        Consumer(p, s).run();
    } else {
        if (kTileTokens > 64) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kProducerRegisters));
        ProducerWarp(p, s).run();
    }
}
