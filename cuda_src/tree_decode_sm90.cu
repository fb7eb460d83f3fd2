// Grid (workers), block 384 threads (512 where K and V are float8), one a multiprocessor: a worker's items of a balanced
// plan, one after the other.
//
// Four producer warps gather the tokens of item after item into rings of tiles; two warpgroups attend them, 64 query
// rows each. The rings run ahead over the ends of items, so that these cost no bandwidth. With one row group the
// warpgroups take turns at the tiles and are added up at the item's end; with two, each has its own rows of every tile.
// Tokens that few rows see are attended by the warps of these rows alone. Four more warps widen the float8 tiles that
// warpgroups attend; what warps attend alone they widen themselves, with one row group.
// The worker that finishes the last piece of some rows merges their pieces, or all that end with it do so together.
#include "worker_consumer.cuh"
#include "worker_producer.cuh"

#if defined(FT_KV_ELEMENT)
#include "worker_float8.cuh"
using GatherRings = RawRings;
#else
using GatherRings = TileRings;
#endif

extern "C" __global__ void __launch_bounds__(kThreads, 1) tree_decode_sm90(const __grid_constant__ WorkParams p) {
    extern __shared__ __align__(1024) unsigned char memory[];
    Shared& s = *reinterpret_cast<Shared*>(memory);
    // By a thread whose warp is not the first to be waited for. Meanwhile producers ask for their item.
    if (threadIdx.x == kThreads - kWarpSize) {
        GatherRings::init(s);
        barrier_init(s.k_empty, kConsumerWarps / kTokenGroups * kWarpArrivals);
        barrier_init(s.v_empty, kConsumerWarps / kTokenGroups * kWarpArrivals);
        barrier_init(s.q_full, kQueryArrivals);
        barrier_init(s.q_empty, kConsumerWarps * kWarpArrivals);
        barrier_init(s.given, kConsumerWarps / 2 * kWarpArrivals);
        fence_shared_async();  // the bulk copy engine, too, is to find them set up
    }
    // Where consumers take more registers than an equal share, the others leave theirs.
    if (uniform(threadIdx.x / kWarpSize) < kConsumerWarps) {
        if (!kSharesRegisters) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kConsumerRegisters));
        Consumer(p, s).run();
    } else {
        if (!kSharesRegisters) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kProducerRegisters));
#if defined(FT_KV_ELEMENT)
        if (threadIdx.x >= (kConsumerWarps + kProducerWarps) * kWarpSize) {
            Widener(p, s).run();
            return;
        }
#endif
        Producer<GatherRings>(p, s).run();
    }
}
