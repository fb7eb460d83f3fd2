// A block attends 64 rows of a vnode and KV head together: products of the whole warpgroup with tiles of 64 tokens.
#pragma once
#include "stage1_vnode.cuh"

static_assert(kWarps * kChunkTokens == kTileTokens && kTileTokens == kGroupRows, "four warps gather a tile of 64 tokens");

struct alignas(1024) WideShared {
    alignas(1024) unsigned char k[kStages][kTileTokens * kHeadDim * 2];
    alignas(1024) unsigned char v[kStages][kTileTokens * kHeadDim * 2];
    Barrier k_full[kStages], v_full[kStages];
};

// Each warp gathers 16 tokens of every tile.
struct WideBlock {
    const Stage1Sm90Params& p;
    WideShared& s;
    const VnodeView& vnode;
    Source k, v;
    int lane, warp;
    int tile = 0;        // of all that the block has attended
    int asked = 0;       // tiles of these rows whose keys were asked for,
    Chunk last, coming;  // where this warp's part of the last of them lies, and that of the one that comes

    __device__ __forceinline__ WideBlock(const Stage1Sm90Params& p, WideShared& s, const VnodeView& vnode)
        : p(p), s(s), vnode(vnode), k(keys_of(p, vnode.kv_head)), v(values_of(p, vnode.kv_head)),
          lane(threadIdx.x % kWarpSize), warp(uniform(threadIdx.x / kWarpSize)), last(chunk(0)), coming(last) {}

    static __device__ __forceinline__ void init(WideShared& s) {
        barrier_init(s.k_full, kThreads);
        barrier_init(s.v_full, kThreads);
    }

    __device__ __forceinline__ void run(int row_block, int row_blocks) {
        for (int row = row_block * kGroupRows; row < vnode.num_rows; row += row_blocks * kGroupRows) {
            attend(row);
            __syncthreads();  // the next rows' tiles overwrite these
            asked = 0;
            coming = chunk(0);
        }
    }

    __device__ __forceinline__ Chunk chunk(int index) const {
        const int first = index * kTileTokens + warp * kChunkTokens;
        return Chunk(p.stage1.vnode_to_kv_entries + vnode.kv_off, first, vnode.kv_len, lane);
    }
    // Asks for the keys of the next tile, and for the values of the one before. first: the place of the rows' first tile.
    __device__ __forceinline__ void ask(int first, int tiles) {
        const int part = warp * kChunkTokens * kPanelRowBytes;
        if (asked > 0 && asked <= tiles) {
            const int place = (first + asked - 1) % kStages;
            last.copy(v, vnode.kv_head, shared_address(s.v[place]) + part, kPanelBytes, s.v_full[place], lane, false);
        }
        if (asked < tiles) {
            const int place = (first + asked) % kStages;
            coming.look(p.bulk, lane);
            coming.copy(k, vnode.kv_head, shared_address(s.k[place]) + part, kPanelBytes, s.k_full[place], lane, false);
        }
        last = coming;
        coming = chunk(++asked);
    }

    __device__ __forceinline__ void attend(int first_row) {
        const int first = tile, tiles = ceil_div(vnode.kv_len, kTileTokens);
        const ScoreScale to_score{p.stage1.sm_scale, p.stage1.logit_cap};
#pragma unroll
        for (int i = 0; i < kStages; ++i) ask(first, tiles);
        const VnodeRows own{vnode, first_row + warp * kChunkRows + lane / 4};
        Queries q;
        own.load(q, lane);
        WarpgroupRows rows(0);
        rows.reset();
#pragma unroll 1
        for (int left = vnode.kv_len; left > 0; left -= kTileTokens, ++tile) {
            const int stage = tile % kStages, parity = tile / kStages % 2;
            WarpgroupRows::Scores scores;
            barrier_wait(s.k_full[stage], parity);
            fence_shared_async();
            start_scores(scores, q, uniform(shared_address(s.k[stage])));
            products_wait<0>(scores);
            __syncthreads();  // nobody reads these keys, or the values before, any more
            ask(first, tiles);
            weigh(scores, left, rows, to_score);
            barrier_wait(s.v_full[stage], parity);
            fence_shared_async();
            rows.start_values(uniform(shared_address(s.v[stage])));
            products_wait<0>(rows.o);
        }
        rows.finish();
        own.write(rows, lane);
    }

    // Starts the products of queries, which are in registers, and keys.
    static __device__ __forceinline__ void start_scores(WarpgroupRows::Scores& s, const Queries& q, u32 k_tile) {
        const MatrixDescriptor keys(k_tile, 16);
        products_fence();
#pragma unroll
        for (int d = 0; d < kHeadDim / 16; ++d) {
            Wgmma<Element>::multiply_held(s, q[d], keys.at(d / 4 * kPanelBytes + d % 4 * 32), d > 0);
        }
        products_commit();
    }
    // Scores into weights, where the products are done that the outputs come from.
    __device__ __forceinline__ void weigh(WarpgroupRows::Scores& scores, int tokens, WarpgroupRows& rows,
                                          const ScoreScale& to_score) const {
        if (kSoftCap) {
#pragma unroll
            for (int j = 0; j < kTileTokens / 2; ++j) scores[j] = to_score.pass(scores[j]);
        }
        if (tokens < kTileTokens) hide_from(scores, tokens, lane);
        float factor[2];
        rows.exponentials(scores, factor, to_score);
        rows.rescale_outputs(factor);
#pragma unroll
        for (int j = 0; j < kTileTokens / 4; ++j) rows.weights[j] = Element::pack(scores[2 * j], scores[2 * j + 1]);
    }
};
