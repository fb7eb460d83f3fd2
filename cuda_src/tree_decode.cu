// Grid (items * KV heads), block kWarps * 32 threads: one item of a DecodePlan for one KV head.
//
// One pass over everything that an item's rows attend to: ancestors' tokens, which all row warps share, then each row
// warp's own subtree, with a mask by row range. Row warps split the rows; token groups split the tokens, each with a
// softmax state of its own, and are merged once at the end.
#include "plan.cuh"
#include "warp_rows.cuh"

#if !defined(FT_BLOCK_WARPS) || !defined(FT_STAGES)
#error "FT_BLOCK_WARPS and FT_STAGES are given by kernels.py"
#endif

constexpr int kWarps = FT_BLOCK_WARPS;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kStages = FT_STAGES;
constexpr int kWarpTokens = 16;  // tokens that a warp gathers at a time
constexpr int kWarpTileBytes = kWarpTokens * kHeadDim * 2;
constexpr int kWarpStageBytes = 2 * kWarpTileBytes;  // K and V
constexpr int kRingBytes = kWarps * kStages * kWarpStageBytes;
constexpr int kOutputBytes = kWarps * 16 * kHeadDim * 4;
constexpr int kRowVectors = kHeadDim / 8;  // of 8 elements

static_assert(kOutputBytes + kWarps * 16 * 8 <= kRingBytes, "the merge reuses the ring's shared memory");
static_assert(kRingBytes == FT_SHARED_BYTES, "host and device agree on shared memory");
static_assert(kThreads == FT_THREADS, "host and device agree on a block's threads");
static_assert(kWarps <= 4, "as many warps and token groups as an Item has lists for");
static_assert(kStages >= 2, "one tile is worked on while others arrive");

// Who this warp is within its block, for an item's number of row warps.
struct WarpRole {
    int lane, row_warps, row_warp, group, groups;

    __device__ __forceinline__ explicit WarpRole(int row_warps)
        : lane(threadIdx.x % kWarpSize), row_warps(row_warps), row_warp(threadIdx.x / kWarpSize % row_warps),
          group(threadIdx.x / kWarpSize / row_warps), groups(kWarps / row_warps) {}

    // Waits for the other row warps of the token group.
    __device__ __forceinline__ void sync_group() const {
        if (row_warps == 1) {
            __syncwarp();
        } else {
            asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "r"(row_warps * kWarpSize) : "memory");
        }
    }
};

// Walks the tiles of a list of segments; a tile never crosses a segment's end. The segment after the current one is
// fetched ahead: walking never waits for memory.
struct TileCursor {
    const Segment* next;
    const Segment* end;
    Segment segment;
    Segment upcoming;
    int offset = 0;  // of the tile in its segment

    __device__ __forceinline__ TileCursor(const Segment* begin, const Segment* end)
        : next(begin), end(end), segment(fetch()), upcoming(fetch()) {}
    __device__ __forceinline__ Segment fetch() { return next < end ? *next++ : Segment{0, 0, 0, 0}; }
    __device__ __forceinline__ bool valid() const { return offset < segment.kv_len; }
    __device__ __forceinline__ void advance(int tokens) {
        offset += tokens;
        if (offset < segment.kv_len) return;
        offset = 0;
        segment = upcoming;
        upcoming = fetch();
    }
};

// The item's inputs, for one KV head.
struct Operands {
    const KVBits* k;
    const KVBits* v;
    int k_stride, v_stride;
    ScoreScale to_score;

    __device__ __forceinline__ Operands(const TreeDecodeParams& p, int kv_head)
        : k(p.k + kv_head * p.k_stride_head), v(p.v + kv_head * p.v_stride_head), k_stride(int(p.k_stride_token)),
          v_stride(int(p.v_stride_token)), to_score{p.sm_scale * key_scale(p, kv_head), p.logit_cap} {}

    // Starts the copy of the warp's share of a tile: 16 tokens from token `first` of the tile on.
    __device__ __forceinline__ void gather(const TileCursor& cursor, u32 k_share, u32 v_share, int first,
                                           int lane) const {
        using Gather = WarpGather<kWarpTokens, kHeadDim>;
        const int count = cursor.segment.kv_len - cursor.offset - first;
        const i64 token = cursor.segment.kv_begin + cursor.offset + first;
        Gather::copy_run(k_share, k + token * k_stride, k_stride, count, lane);
        Gather::copy_run(v_share, v + token * v_stride, v_stride, count, lane);
    }
};

// What of a tile is needed once it has arrived.
struct PendingTile {
    int tokens;  // 0: none
    int row_begin, row_end;
};

// Attends to a list of segments. kShared: all row warps of the group gather tiles together, 16 tokens each; else the
// warp gathers its own.
template <bool kShared>
__device__ __forceinline__ void attend_list(WarpRows& rows, const Operands& operands, const WarpRole& role,
                                            const Segment* begin, const Segment* end, u32 ring) {
    const int sharers = kShared ? role.row_warps : 1;
    const int share = kShared ? role.row_warp : 0;
    const int first_row = role.row_warp * 16;
    const u32 tile_bytes = sharers * kWarpTileBytes;
    const u32 base = ring + (threadIdx.x / kWarpSize - share) * kStages * kWarpStageBytes;
    const auto sync = [&] { kShared ? role.sync_group() : __syncwarp(); };

    TileCursor ahead(begin, end);
    PendingTile pending[kStages - 1];
    int load_stage = 0;
    // Starts the next copy, and moves up the tiles under way.
    const auto start_copy = [&] {
#pragma unroll
        for (int i = 0; i < kStages - 2; ++i) pending[i] = pending[i + 1];
        PendingTile& newest = pending[kStages - 2];
        newest.tokens = 0;
        if (ahead.valid()) {
            newest = {ahead.segment.kv_len - ahead.offset, ahead.segment.row_begin, ahead.segment.row_end};
            const u32 stage = base + load_stage * 2 * tile_bytes + share * kWarpTileBytes;
            operands.gather(ahead, stage, stage + tile_bytes, share * kWarpTokens, role.lane);
            ahead.advance(sharers * kWarpTokens);
        }
        commit_copies();  // an empty group too: wait_copies counts groups
        load_stage = load_stage + 1 == kStages ? 0 : load_stage + 1;
    };
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) start_copy();

    int stage_index = 0;
#pragma unroll 1
    while (pending[0].tokens > 0) {
        const PendingTile tile = pending[0];
        wait_copies<kStages - 2>();
        sync();  // this tile has arrived, and nobody still reads the one that the next copy overwrites
        start_copy();
        const u32 stage = base + stage_index * 2 * tile_bytes;
        stage_index = stage_index + 1 == kStages ? 0 : stage_index + 1;
        if (tile.row_begin >= first_row + 16 || tile.row_end <= first_row) continue;
        const int row = first_row + role.lane / 4;
        Visible visible{tile.tokens,
                        {row >= tile.row_begin && row < tile.row_end,
                         row + 8 >= tile.row_begin && row + 8 < tile.row_end},
                        tile.row_begin > first_row || tile.row_end < first_row + 16};
        if constexpr (kShared) {
            const bool rows_hidden = visible.partly;
#pragma unroll 1
            for (int first = 0; first < sharers * kWarpTokens && visible.tokens > 0; first += 32) {
                visible.partly = rows_hidden || visible.tokens < 32;
                rows.attend<32>(stage, stage + tile_bytes, first, visible, operands.to_score, role.lane);
                visible.tokens -= 32;
            }
        } else {
            visible.partly |= visible.tokens < kWarpTokens;
            rows.attend<kWarpTokens>(stage, stage + tile_bytes, 0, visible, operands.to_score, role.lane);
        }
    }
    wait_copies<0>();
    sync();  // the ring is free
}

// Merges the token groups' softmax states: afterwards outputs are on one scale, normalised and multiplied by
// `value_scale`; `lse` is the rows'.
__device__ __forceinline__ void merge_token_groups(WarpRows& rows, float (&lse)[2], Float2* exchange, const WarpRole& role,
                                             float value_scale) {
    const int num_rows = role.row_warps * 16;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = role.row_warp * 16 + role.lane / 4 + half * 8;
        if (role.lane % 4 == 0) exchange[role.group * num_rows + row] = Float2{rows.state[half].m, rows.state[half].l};
    }
    __syncthreads();
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = role.row_warp * 16 + role.lane / 4 + half * 8;
        SoftmaxState total;
#pragma unroll 1
        for (int g = 0; g < role.groups; ++g) total.m = fmaxf(total.m, exchange[g * num_rows + row].x);
#pragma unroll 1
        for (int g = 0; g < role.groups; ++g) {
            const Float2 part = exchange[g * num_rows + row];
            total.l += part.y * total.weight(part.x);
        }
        factor[half] = total.weight(rows.state[half].m) * total.normaliser() * value_scale;
        lse[half] = total.natural_lse();
    }
#pragma unroll
    for (int d = 0; d < 2 * kDimSteps; ++d) {
#pragma unroll
        for (int i = 0; i < 4; ++i) rows.o[d][i] *= factor[i / 2];
    }
}

// Puts a warp's outputs into shared memory, [token group][row][head_dim]. Permuting the chunks of a row by its number
// keeps the eight rows of a store in different banks.
__device__ __forceinline__ void stage_outputs(const WarpRows& rows, float* shared, const WarpRole& role) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = role.row_warp * 16 + role.lane / 4 + half * 8;
        float* to = shared + (role.group * role.row_warps * 16 + row) * kHeadDim + role.lane % 4 * 2;
#pragma unroll
        for (int d = 0; d < 2 * kDimSteps; ++d) {
            *reinterpret_cast<Float2*>(to + ((d ^ row) % kRowVectors) * 8) =
                Float2{rows.o[d][half * 2], rows.o[d][half * 2 + 1]};
        }
    }
}

struct alignas(16) Float4 {
    float value[4];
};

// Adds the token groups' outputs up and writes them: to o, or to mid_o where the requests' tokens are cut.
__device__ __forceinline__ void write_outputs(const float* shared, const TreeDecodeParams& p, const Item& item,
                                              int kv_head, const WarpRole& role) {
    const int num_rows = item.num_requests * p.group;
#pragma unroll 1
    for (int i = threadIdx.x; i < num_rows * kRowVectors; i += kThreads) {
        const int row = i / kRowVectors;
        const int chunk = i % kRowVectors;
        float sum[8] = {};
#pragma unroll 1
        for (int g = 0; g < role.groups; ++g) {
            const Float4* from = reinterpret_cast<const Float4*>(
                shared + (g * role.row_warps * 16 + row) * kHeadDim + ((chunk ^ row) % kRowVectors) * 8);
#pragma unroll
            for (int e = 0; e < 8; ++e) sum[e] += from[e / 4].value[e % 4];
        }
        const int head = kv_head * p.group + row % p.group;
        if (item.partial >= 0) {
            const i64 partial = i64(item.partial + row / p.group) * (p.kv_heads * p.group) + head;
            Float4* to = reinterpret_cast<Float4*>(p.mid_o + partial * kHeadDim + chunk * 8);
            to[0] = Float4{sum[0], sum[1], sum[2], sum[3]};
            to[1] = Float4{sum[4], sum[5], sum[6], sum[7]};
            continue;
        }
        const i64 request = p.request_order[item.first_position + row / p.group];
        u16* to = p.o + request * p.o_stride_request + head * p.o_stride_head + chunk * 8;
        if (p.o_aligned) {
            *reinterpret_cast<Packed8*>(to) =
                Packed8{Element::pack(sum[0], sum[1]), Element::pack(sum[2], sum[3]), Element::pack(sum[4], sum[5]),
                        Element::pack(sum[6], sum[7])};
        } else {
#pragma unroll
            for (int e = 0; e < 8; ++e) to[e] = Element::from_float(sum[e]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, min_blocks(kThreads))
tree_decode(const __grid_constant__ TreeDecodeParams p) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const Item& item = p.items[blockIdx.x / p.kv_heads];
    const int kv_head = blockIdx.x % p.kv_heads;
    const WarpRole role(item.row_warps);
    const Operands operands(p, kv_head);
    const u32 ring = u32(__cvta_generic_to_shared(shared));
    const int num_rows = item.num_requests * p.group;

    WarpRows rows;
    const auto query = [&](int row) {
        const i64 request = p.request_order[item.first_position + row / p.group];
        return p.q + request * p.q_stride_request + (kv_head * p.group + row % p.group) * p.q_stride_head;
    };
    rows.load_queries(query, role.row_warp * 16, num_rows, role.lane);

    if (kWarps > 1 && role.row_warps > 1) {
        const int* bounds = item.shared + role.group;
        attend_list<true>(rows, operands, role, p.segments + bounds[0], p.segments + bounds[1], ring);
    }
    const int* bounds = item.own + threadIdx.x / kWarpSize;
    attend_list<false>(rows, operands, role, p.segments + bounds[0], p.segments + bounds[1], ring);

    rows.finish();
    __syncthreads();  // the rings of all warps are free
    float* outputs = reinterpret_cast<float*>(shared);
    float lse[2];
    merge_token_groups(rows, lse, reinterpret_cast<Float2*>(shared + kOutputBytes), role, value_scale(p, kv_head));
    stage_outputs(rows, outputs, role);
    __syncthreads();
    write_outputs(outputs, p, item, kv_head, role);
    float* const to = item.partial >= 0 ? p.mid_lse : p.lse;
    if (to != nullptr && role.group == 0 && role.lane % 4 == 0) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = role.row_warp * 16 + role.lane / 4 + half * 8;
            if (row < num_rows) {
                const int i = row / p.group;
                const i64 place = item.partial >= 0 ? item.partial + i : p.request_order[item.first_position + i];
                to[place * (p.kv_heads * p.group) + kv_head * p.group + row % p.group] = lse[half];
            }
        }
    }
}
