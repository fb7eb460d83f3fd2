// Grid (vnodes of the phase, KV heads, row blocks), block kWarps * 32 threads: kRows query rows against a vnode.
//
// Stage 1 on tensor cores (sm_80 and later). K and V rows are gathered into a ring of shared-memory tiles by cp.async
// while the warps work on an earlier tile. kRowWarps warps split the rows; kTokenWarps split a tile's tokens, each with
// a softmax state of its own, and are merged once at the end: few rows still keep every warp busy.
#include "stage1_params.cuh"
#include "warp_rows.cuh"

#if !defined(FT_ROW_WARPS) || !defined(FT_TOKEN_WARPS) || !defined(FT_WARP_TOKENS) || !defined(FT_STAGES)
#error "FT_ROW_WARPS, FT_TOKEN_WARPS, FT_WARP_TOKENS and FT_STAGES are given by kernels.py"
#endif

constexpr int kRowWarps = FT_ROW_WARPS;
constexpr int kTokenWarps = FT_TOKEN_WARPS;
constexpr int kWarpTokens = FT_WARP_TOKENS;
constexpr int kStages = FT_STAGES;
constexpr int kRows = kRowWarps * 16;
constexpr int kKvTile = kTokenWarps * kWarpTokens;
constexpr int kWarps = kRowWarps * kTokenWarps;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kTileBytes = kKvTile * kHeadDim * 2;
constexpr int kStageBytes = 2 * kTileBytes;  // K, then V

static_assert(kWarpTokens % 16 == 0, "the second product takes 16 tokens at a time");
static_assert(kKvTile / kWarps % 8 == 0, "warps share the copying evenly, in whole swizzle patterns");
static_assert(kStages >= 2, "one tile is worked on while others arrive");
static_assert(kTokenWarps == 1 || kTokenWarps * kRows * kHeadDim * 4 <= kStages * kStageBytes,
              "the merge reuses the tiles' shared memory");
// kernels.py computes the same number.
static_assert(kStages * kStageBytes == FT_SHARED_BYTES, "host and device agree on shared memory");
static_assert(kThreads == FT_THREADS, "host and device agree on a block's threads");

// Merges the softmax states of the warps that shared these rows; afterwards every warp's outputs are on one scale and
// its states hold the sum over all. `exchange` holds two floats a row and token warp.
__device__ __forceinline__ void merge_token_warps(WarpRows& rows, float* exchange, int row_warp, int token_warp, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = row_warp * 16 + lane / 4 + half * 8;
        if (lane % 4 == 0) {
            exchange[(token_warp * kRows + row) * 2] = rows.state[half].m;
            exchange[(token_warp * kRows + row) * 2 + 1] = rows.state[half].l;
        }
    }
    __syncthreads();
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = row_warp * 16 + lane / 4 + half * 8;
        SoftmaxState total;
#pragma unroll
        for (int w = 0; w < kTokenWarps; ++w) total.m = fmaxf(total.m, exchange[(w * kRows + row) * 2]);
#pragma unroll
        for (int w = 0; w < kTokenWarps; ++w) {
            total.l += exchange[(w * kRows + row) * 2 + 1] * total.weight(exchange[(w * kRows + row) * 2]);
        }
        factor[half] = total.weight(rows.state[half].m);
        rows.state[half] = total;
    }
#pragma unroll
    for (int d = 0; d < 2 * kDimSteps; ++d) {
#pragma unroll
        for (int i = 0; i < 4; ++i) rows.o[d][i] *= factor[i / 2];
    }
    __syncthreads();  // the outputs overwrite the exchange
}

// Adds up the token warps' outputs through shared memory and writes whole rows.
__device__ __forceinline__ void write_merged(const WarpRows& rows, float* shared, const VnodeView& vnode,
                                             int first_row, int row_warp, int token_warp, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = row_warp * 16 + lane / 4 + half * 8;
        const float scale = rows.state[half].normaliser();
        float* to = shared + (token_warp * kRows + row) * kHeadDim;
#pragma unroll
        for (int d = 0; d < 2 * kDimSteps; ++d) {
            // Rotating the column blocks by the row keeps the eight rows of a store in different banks.
            const int column = (d * 8 + row * 8) % kHeadDim + lane % 4 * 2;
            *reinterpret_cast<Float2*>(to + column) =
                Float2{rows.o[d][half * 2] * scale, rows.o[d][half * 2 + 1] * scale};
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kRows * kHeadDim / 2; i += kThreads) {
        const int row = i / (kHeadDim / 2);
        const int column = i % (kHeadDim / 2) * 2;
        if (first_row + row >= vnode.num_rows) break;
        Float2 sum{0.0f, 0.0f};
#pragma unroll
        for (int w = 0; w < kTokenWarps; ++w) {
            const Float2 part = *reinterpret_cast<const Float2*>(
                shared + (w * kRows + row) * kHeadDim + (column + row * 8) % kHeadDim);
            sum.x += part.x;
            sum.y += part.y;
        }
        *reinterpret_cast<Float2*>(vnode.p.mid_o + vnode.partial(first_row + row) * kHeadDim + column) = sum;
    }
}

__device__ __forceinline__ void write_rows(const WarpRows& rows, const VnodeView& vnode, int first_row, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = first_row + lane / 4 + half * 8;
        if (row >= vnode.num_rows) continue;
        const float scale = rows.state[half].normaliser();
        float* to = vnode.p.mid_o + vnode.partial(row) * kHeadDim + lane % 4 * 2;
#pragma unroll
        for (int d = 0; d < 2 * kDimSteps; ++d) {
            *reinterpret_cast<Float2*>(to + d * 8) =
                Float2{rows.o[d][half * 2] * scale, rows.o[d][half * 2 + 1] * scale};
        }
    }
}

__device__ __forceinline__ void write_lse(const WarpRows& rows, const VnodeView& vnode, int first_row, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = first_row + lane / 4 + half * 8;
        if (lane % 4 == 0 && row < vnode.num_rows) {
            vnode.p.mid_lse[vnode.partial(row)] = rows.state[half].natural_lse();
        }
    }
}

// Waits for the warps that read what this warp copies. Where each warp copies just its own tokens, that is itself.
__device__ __forceinline__ void sync_readers() {
    if constexpr (kRowWarps == 1) {
        __syncwarp();
    } else {
        __syncthreads();
    }
}

__device__ __forceinline__ void attend_block(const VnodeView& vnode, int first_row, unsigned char* shared) {
    const int lane = threadIdx.x % kWarpSize;
    const int row_warp = threadIdx.x / kWarpSize % kRowWarps;
    const int token_warp = threadIdx.x / kWarpSize / kRowWarps;
    const ScoreScale to_score{vnode.p.sm_scale, vnode.p.logit_cap};
    const int* entries = vnode.p.vnode_to_kv_entries + vnode.kv_off;
    const u16* k = vnode.p.k + vnode.kv_head * vnode.p.k_stride_head;
    const u16* v = vnode.p.v + vnode.kv_head * vnode.p.v_stride_head;
    const u32 ring = u32(__cvta_generic_to_shared(shared));
    const int tiles = ceil_div(vnode.kv_len, kKvTile);

    // Each warp gathers kGatheredRows rows of a tile. Their entries are fetched one tile ahead of the rows themselves: a
    // copy never waits for its own addresses.
    constexpr int kGatheredRows = kKvTile / kWarps;
    const int copy_row = threadIdx.x / kWarpSize * kGatheredRows;
    using Gather = WarpGather<kGatheredRows, kHeadDim>;
    int entry;  // lane i's: row i of the warp's share; -1 past the end
    const auto fetch = [&](int tile) {
        const int token = tile * kKvTile + copy_row + lane;
        entry = lane < kGatheredRows && token < vnode.kv_len ? entries[token] : -1;
    };
    const auto start_copy = [&](int tile) {
        if (tile < tiles) {
            const u32 share = ring + tile % kStages * kStageBytes + copy_row * Layout::kRowBytes;
            Gather::copy_entries(share, k, int(vnode.p.k_stride_token), entry, lane);
            Gather::copy_entries(share + kTileBytes, v, int(vnode.p.v_stride_token), entry, lane);
        }
        commit_copies();  // an empty group too: wait_copies counts groups
        fetch(tile + 1);
    };
    fetch(0);
    for (int tile = 0; tile < kStages - 1; ++tile) start_copy(tile);

    const bool has_rows = first_row + row_warp * 16 < vnode.num_rows;
    WarpRows rows;
    const auto query = [&](int row) { return vnode.query(row); };
    rows.load_queries(query, first_row + row_warp * 16, vnode.num_rows, lane);
    for (int tile = 0; tile < tiles; ++tile) {
        wait_copies<kStages - 2>();
        sync_readers();  // this tile has arrived, and nobody still reads the one that the next copy overwrites
        start_copy(tile + kStages - 1);
        const int valid = vnode.kv_len - tile * kKvTile - token_warp * kWarpTokens;
        if (valid > 0 && has_rows) {
            const u32 stage = ring + tile % kStages * kStageBytes;
            const Visible visible{valid, {true, true}, valid < kWarpTokens};
            rows.attend<kWarpTokens>(stage, stage + kTileBytes, token_warp * kWarpTokens, visible, to_score, lane);
        }
    }

    rows.finish();
    if constexpr (kTokenWarps > 1) {
        wait_copies<0>();
        __syncthreads();  // the tiles' memory is free
        float* exchange = reinterpret_cast<float*>(shared);
        merge_token_warps(rows, exchange, row_warp, token_warp, lane);
        write_merged(rows, exchange, vnode, first_row, row_warp, token_warp, lane);
        if (token_warp == 0) write_lse(rows, vnode, first_row + row_warp * 16, lane);
    } else {
        write_rows(rows, vnode, first_row + row_warp * 16, lane);
        write_lse(rows, vnode, first_row + row_warp * 16, lane);
    }
}

extern "C" __global__ void __launch_bounds__(kThreads, min_blocks(kThreads))
stage1_mma(const __grid_constant__ Stage1Params p) {
    extern __shared__ __align__(1024) unsigned char shared[];
    const VnodeView vnode(p, p.first_vnode + blockIdx.x, blockIdx.y);
    for (int row = blockIdx.z * kRows; row < vnode.num_rows; row += gridDim.z * kRows) {
        attend_block(vnode, row, shared);
        __syncthreads();  // the next block of rows reuses shared memory
    }
}
