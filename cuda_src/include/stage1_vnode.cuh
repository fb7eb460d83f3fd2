// What stage1_sm90.cu's two ways share: a vnode's tokens, 16 queries of a warp, and where their partial outputs go.
#pragma once
#include "bulk_copy.cuh"
#include "kv_tile.cuh"
#include "stage1_params.cuh"
#include "warpgroup_rows.cuh"

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kStages = 2;                  // places for tiles: one is worked on while another arrives
constexpr int kCopyVectors = kHeadDim / 8;  // of 16 bytes, in a row of K or V
static_assert(kThreads == FT_THREADS, "host and device agree on a block's threads");
static_assert(!kFloat8, "a bulk copy does not widen");
static_assert(kBoxTokens == kChunkTokens, "a warp gathers a box, or as many rows");

// The vnodes of a phase, in blocks of this launch.
struct Phase {
    int first_vnode;
    int vnodes;
    int row_blocks;  // of 64 rows a vnode and KV head; 0: a warp takes 16 rows at a time,
    int heads;       // of as many KV heads, which divide the number of all
    int blocks;
};

// Mirrored field by field in fasttree_cupy/execution/stages.py.
struct Stage1Sm90Params {
    Stage1Params stage1;     // whose first vnode does not count
    Phase phases[2];
    int stride;              // every stride-th block is of the first phase, until all of them are
    int read_once;           // whether vnodes of few requests are taken to be all that reads their tokens
    int bulk;                // whether there are tensor maps:
    int padding[7];
    TensorMap k_map, v_map;  // [tokens, kv_heads, head_dim], boxes of 16 tokens x 1 x 128 bytes
};
static_assert(sizeof(Stage1Sm90Params) == 512, "as STAGE1_SM90_PARAMS in stages.py");

// K or V of a vnode's head.
struct Source {
    const TensorMap& map;
    const u16* head;  // [tokens, head_dim]
    int stride;       // elements from row to row
};
__device__ __forceinline__ Source keys_of(const Stage1Sm90Params& p, int kv_head) {
    return {p.k_map, p.stage1.k + kv_head * p.stage1.k_stride_head, int(p.stage1.k_stride_token)};
}
__device__ __forceinline__ Source values_of(const Stage1Sm90Params& p, int kv_head) {
    return {p.v_map, p.stage1.v + kv_head * p.stage1.v_stride_head, int(p.stage1.v_stride_token)};
}

// Where a warp's 16 tokens of a tile lie. Lanes i and i + 16 know token i's row.
struct Chunk {
    int row;      // of K and V; -1: past the last token
    bool follow;  // set by look(): all rows follow one another, so that they can come as boxes

    // The chunk that begins with the vnode's token `first`.
    __device__ __forceinline__ Chunk(const int* entries, int first, int tokens, int lane) {
        const int token = first + lane % kChunkTokens;
        row = token < tokens ? entries[token] : -1;
    }
    // Looks at the rows, once they are there.
    __device__ __forceinline__ void look(bool bulk, int lane) {
        const int first = __shfl_sync(0xffffffffu, row, 0);
        follow = __all_sync(0xffffffffu, bulk && row >= 0 && row == first + lane % kChunkTokens);
    }

    // Starts copies to 16 rows of a tile, whose panels are panel_bytes apart, the rest of them zeros. Each lane arrives
    // when its own are there.
    __device__ __forceinline__ void copy(const Source& from, int kv_head, u32 to, int panel_bytes, Barrier& full,
                                         int lane, bool read_once) const {
        if (follow) {
            const int first = __shfl_sync(0xffffffffu, row, 0);
            if (elected()) {
                barrier_expect(full, kPanels * kBoxBytes);
#pragma unroll
                for (int panel = 0; panel < kPanels; ++panel) {
                    copy_box(to + panel * panel_bytes, from.map, panel * kPanelElements, kv_head, first, full, read_once);
                }
                barrier_arrive(full, kWarpSize);
            }
            return;
        }
        constexpr int kPassRows = kWarpSize / kCopyVectors;
        const int column = lane % kCopyVectors;
#pragma unroll 1
        for (int pass = 0; pass < kChunkTokens / kPassRows; ++pass) {
            const int token = pass * kPassRows + lane / kCopyVectors;
            const int own = __shfl_sync(0xffffffffu, row, token);
            const u32 place = column / 8 * panel_bytes + token * kPanelRowBytes + ((column ^ token) % 8) * 16;
            copy_async_16(to + place, from.head + i64(max(own, 0)) * from.stride + column * 8, own >= 0, read_once);
        }
        arrive_after_copies(shared_address(&full));
    }
};

// 16 of a vnode's rows, of which a lane knows `first`, that of lane / 4, and the one 8 further on.
struct VnodeRows {
    const VnodeView& vnode;
    int first;

    // As fragments of products, of the vnode's KV head or one further on; rows past the last are zero.
    __device__ __forceinline__ void load(Queries& q, int lane, int heads_on = 0) const {
        const i64 further = heads_on * vnode.p.group * vnode.p.q_stride_head;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const bool valid = first + half * 8 < vnode.num_rows;
            const u16* from = valid ? vnode.query(first + half * 8) + further + lane % 4 * 2 : nullptr;
#pragma unroll
            for (int d = 0; d < kHeadDim / 16; ++d) {
                q[d][half] = valid ? *reinterpret_cast<const u32*>(from + d * 16) : 0;
                q[d][half + 2] = valid ? *reinterpret_cast<const u32*>(from + d * 16 + 8) : 0;
            }
        }
    }
    __device__ __forceinline__ void write(const WarpgroupRows& rows, int lane) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (first + half * 8 >= vnode.num_rows) continue;
            const i64 partial = vnode.partial(first + half * 8);
            const float scale = rows.state[half].normaliser();
            float* to = vnode.p.mid_o + partial * kHeadDim + lane % 4 * 2;
#pragma unroll
            for (int j = 0; j < kHeadDim / 8; ++j) {
                *reinterpret_cast<Float2*>(to + j * 8) =
                    Float2{rows.o[4 * j + 2 * half] * scale, rows.o[4 * j + 2 * half + 1] * scale};
            }
            if (lane % 4 == 0) vnode.p.mid_lse[partial] = rows.state[half].natural_lse();
        }
    }
};

// Hides the tokens from `tokens` on in the scores that a thread holds of two rows.
template <int kScores>
__device__ __forceinline__ void hide_from(float (&s)[kScores], int tokens, int lane) {
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
        if (i / 4 * 8 + lane % 4 * 2 + i % 2 >= tokens) s[i] = -kInfinity;
    }
}
