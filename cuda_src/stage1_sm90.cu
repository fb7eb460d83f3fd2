// Grid (blocks of both phases), block 128 threads, three a multiprocessor: 64 query rows of a vnode and KV head together, or
// 16 rows of a vnode a warp.
//
// Stage 1 for compute capability 9.0, both phases in one launch. Blocks of the first phase, whose vnodes have many rows and
// so many products, lie among those of the second, which mostly wait for memory.
#include "dependent_launch.cuh"
#include "stage1_narrow.cuh"
#include "stage1_wide.cuh"

constexpr int kBlocks = 3;  // of a multiprocessor
static_assert(max_of(sizeof(WideShared), sizeof(NarrowShared)) == FT_SHARED_BYTES, "host and device agree on shared memory");

// The place of a block among those of its phase.
struct BlockPlace {
    int phase, block;
    __device__ __forceinline__ explicit BlockPlace(const Stage1Sm90Params& p) {
        const int first_blocks = p.phases[0].blocks, turn = blockIdx.x / p.stride;
        phase = blockIdx.x % p.stride != 0 || turn >= first_blocks;
        block = phase == 0 ? turn : int(blockIdx.x) - min(turn + (blockIdx.x % p.stride != 0), first_blocks);
    }
};

extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
stage1_sm90(const __grid_constant__ Stage1Sm90Params p) {
    extern __shared__ __align__(1024) unsigned char memory[];
    launch_dependents();  // stage 2 waits for this one's end all the same
    const BlockPlace place(p);
    const Phase& phase = p.phases[place.phase];
    if (phase.row_blocks > 0) {
        WideShared& s = *reinterpret_cast<WideShared*>(memory);
        if (threadIdx.x == 0) {
            WideBlock::init(s);
            fence_shared_async();
        }
        const int index = place.block / phase.row_blocks;
        const VnodeView vnode(p.stage1, phase.first_vnode + index % phase.vnodes, index / phase.vnodes);
        __syncthreads();  // the barriers are set up
        WideBlock(p, s, vnode).run(place.block % phase.row_blocks, phase.row_blocks);
    } else {
        NarrowShared& s = *reinterpret_cast<NarrowShared*>(memory);
        if (threadIdx.x == 0) {
            NarrowWarp::init(s);
            fence_shared_async();
        }
        __syncthreads();
        const int unit = place.block * kWarps + uniform(threadIdx.x / kWarpSize);
        const int parts = p.stage1.kv_heads / phase.heads;
        if (unit >= phase.vnodes * parts) return;
        const VnodeView vnode(p.stage1, phase.first_vnode + unit / parts, unit % parts * phase.heads);
        NarrowWarp(p, s, vnode, phase.heads).run();
    }
}
