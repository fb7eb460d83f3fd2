// A warp attends 16 rows of a vnode, KV head after KV head, 16 tokens at a time.
#pragma once
#include "stage1_vnode.cuh"

constexpr int kChunkPanelBytes = kChunkTokens * kPanelRowBytes;

struct alignas(1024) NarrowShared {
    alignas(1024) unsigned char k[kWarps][kStages][kChunkTokens * kHeadDim * 2];
    alignas(1024) unsigned char v[kWarps][kStages][kChunkTokens * kHeadDim * 2];
    Barrier k_full[kWarps][kStages], v_full[kWarps][kStages];
};

// The tokens of each head are one chunk after another; the next two, be they of the next head, are on their way.
struct NarrowWarp {
    const Stage1Sm90Params& p;
    NarrowShared& s;
    VnodeView vnode;  // at the head that is attended
    int end_head;
    int lane, warp;
    int place = 0;           // of the next chunk to attend, counted on
    int copied = 0;          // the same of the next chunk to copy,
    int copy_head, copy_at;  // its head and its number among the head's,
    Chunk coming;            // and where it lies

    __device__ __forceinline__ NarrowWarp(const Stage1Sm90Params& p, NarrowShared& s, const VnodeView& vnode, int heads)
        : p(p), s(s), vnode(vnode), end_head(vnode.kv_head + heads), lane(threadIdx.x % kWarpSize),
          warp(uniform(threadIdx.x / kWarpSize)), copy_head(vnode.kv_head), copy_at(0), coming(chunk(0)) {}

    static __device__ __forceinline__ void init(NarrowShared& s) {
        for (int warp = 0; warp < kWarps; ++warp) {
            barrier_init(s.k_full[warp], kWarpSize);
            barrier_init(s.v_full[warp], kWarpSize);
        }
    }

    __device__ __forceinline__ void run() {
        const int first_head = vnode.kv_head;
        for (int row = 0; row < vnode.num_rows; row += kChunkRows) {
            vnode.kv_head = copy_head = first_head;
            attend(row);
        }
    }

    __device__ __forceinline__ Chunk chunk(int index) const {
        return Chunk(p.stage1.vnode_to_kv_entries + vnode.kv_off, index * kChunkTokens, vnode.kv_len, lane);
    }
    // Starts the copies of the next chunk, if there is one.
    __device__ __forceinline__ void copy(int chunks) {
        if (chunks == 0 || copy_head == end_head) return;
        const int stage = copied % kStages;
        coming.look(p.bulk, lane);
        const u32 keys = shared_address(s.k[warp][stage]), values = shared_address(s.v[warp][stage]);
        const bool read_once = p.read_once;
        coming.copy(keys_of(p, copy_head), copy_head, keys, kChunkPanelBytes, s.k_full[warp][stage], lane, read_once);
        coming.copy(values_of(p, copy_head), copy_head, values, kChunkPanelBytes, s.v_full[warp][stage], lane, read_once);
        ++copied;
        if (++copy_at == chunks) {
            copy_at = 0;
            ++copy_head;
        }
        coming = chunk(copy_at);
    }

    // Attends 16 rows, head after head. A head's queries are asked for during the last softmax of the one before.
    __device__ __forceinline__ void attend(int first_row) {
        const int chunks = ceil_div(vnode.kv_len, kChunkTokens);
        const VnodeRows own{vnode, first_row + lane / 4};
        WarpgroupRows rows(0);
        Queries q;
        for (int i = 0; i < kStages; ++i) copy(chunks);
        own.load(q, lane);
        for (; vnode.kv_head < end_head; ++vnode.kv_head) {
            rows.reset();
#pragma unroll 1
            for (int i = 0; i < chunks; ++i, ++place) {
                attend_chunk(rows, q, vnode.kv_len - i * kChunkTokens, [&] {
                    if (i == chunks - 1 && vnode.kv_head + 1 < end_head) own.load(q, lane, 1);
                });
                __syncwarp();  // nobody reads this place any more
                copy(chunks);
            }
            rows.finish();
            own.write(rows, lane);
        }
    }

    // Attends the next chunk. after_scores(): called when its queries are not needed any more.
    template <typename AfterScores>
    __device__ __forceinline__ void attend_chunk(WarpgroupRows& rows, const Queries& q, int tokens,
                                                 const AfterScores& after_scores) {
        const int stage = place % kStages, parity = place / kStages % 2;
        const ScoreScale to_score{p.stage1.sm_scale, p.stage1.logit_cap};
        const ChunkPlace at(lane);
        float scores[8];
        barrier_wait(s.k_full[warp][stage], parity);
        const auto load_queries = [&](u32 (&fragment)[4], int d) {
#pragma unroll
            for (int i = 0; i < 4; ++i) fragment[i] = q[d][i];
        };
        chunk_scores(scores, load_queries, shared_address(s.k[warp][stage]) + at.by_columns, kChunkPanelBytes);
        after_scores();
        if (kSoftCap) {
#pragma unroll
            for (int j = 0; j < 8; ++j) scores[j] = to_score.pass(scores[j]);
        }
        ChunkValues values;  // on their way during the softmax
        barrier_wait(s.v_full[warp][stage], parity);
        load_chunk_values(values, shared_address(s.v[warp][stage]) + at.by_rows, kChunkPanelBytes);
        if (tokens < kChunkTokens) hide_from(scores, tokens, lane);
        float factor[2];
        rows.exponentials(scores, factor, to_score);
        rows.rescale_outputs(factor);
        const u32 weights[4] = {Element::pack(scores[0], scores[1]), Element::pack(scores[2], scores[3]),
                                Element::pack(scores[4], scores[5]), Element::pack(scores[6], scores[7])};
        add_chunk_values(rows.o, weights, values);
    }
};
