// What a warpgroup does with a tile: 64 query rows against 64 or 128 tokens, with an online softmax.
#pragma once
#include "chunk_products.cuh"
#include "softmax.cuh"
#include "wgmma.cuh"

#if !defined(FT_TILE_TOKENS)
#error "FT_TILE_TOKENS (64 or 128) is given by kernels.py"
#endif

constexpr int kTileTokens = FT_TILE_TOKENS;
constexpr int kGroupRows = 64;                  // query rows of a warpgroup
constexpr int kPanels = kHeadDim / kPanelElements;
constexpr int kOutputs = kHeadDim / 2;          // accumulators of a thread: 64 rows x head_dim over 128 threads
constexpr int kPanelBytes = kTileTokens * kPanelRowBytes;
static_assert(kHeadDim == 64 || kHeadDim == 128, "whole panels, and accumulators that fit the registers");
static_assert(kTileTokens == 64 || kTileTokens == 128, "the shapes of products that wgmma.cuh has");

// 64 rows, and of each its softmax state and output over the tokens seen so far. A thread holds a part of two rows,
// those of lane / 4 and lane / 4 + 8 in the 16 rows of its warp.
struct WarpgroupRows {
    using Scores = float[kTileTokens / 2];
    float o[kOutputs];
    u32 weights[kTileTokens / 4];  // of the last tile, whose values are still to be added
    SoftmaxState state[2];
    int first_row;  // this thread's first row in the block; the other is first_row + 8

    __device__ __forceinline__ explicit WarpgroupRows(int group_row)
        : first_row(group_row + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4) {}

    __device__ __forceinline__ void reset() {
#pragma unroll
        for (int i = 0; i < kOutputs; ++i) o[i] = 0.0f;
        state[0] = state[1] = SoftmaxState{};
    }

    // Starts the products of queries and keys. q_tile: this warpgroup's rows in a tile with panels q_panel_bytes apart.
    static __device__ __forceinline__ void start_scores(Scores& s, u32 q_tile, int q_panel_bytes, u32 k_tile) {
        const MatrixDescriptor queries(q_tile, 16), keys(k_tile, 16);
        products_fence();
#pragma unroll
        for (int d = 0; d < kHeadDim / 16; ++d) {
            const int step = d % 4 * 32;
            Wgmma<ProductElement>::multiply(s, queries.at(d / 4 * q_panel_bytes + step), keys.at(d / 4 * kPanelBytes + step),
                                     d > 0);
        }
        products_commit();
    }

    // Starts the products of weights and values.
    __device__ __forceinline__ void start_values(u32 v_tile) {
        const MatrixDescriptor values(v_tile, kPanelBytes);
        products_fence();
#pragma unroll
        for (int t = 0; t < kTileTokens / 16; ++t) {
            Wgmma<ProductElement>::multiply_values(o, weights + 4 * t, values.at(t * 16 * kPanelRowBytes));
        }
        products_commit();
    }

    // Scores into the weights of the tile whose values are added next. whole: whether all of a warp's rows see all tokens.
    // visible: address of two bytes a token, the first row that sees it and, in the upper byte, how many do. after_values():
    // called when the values of the tile before have been added. A warp that sees nothing does as others do: they wait for
    // one another, and to leave it out would be two instructions for each weight.
    template <typename AfterValues>
    __device__ __forceinline__ void weigh(Scores& s, bool whole, u32 visible, const ScoreScale& to_score,
                                          const AfterValues& after_values) {
        float factor[2] = {1.0f, 1.0f};
        if (kSoftCap) {
#pragma unroll
            for (int i = 0; i < kTileTokens / 2; ++i) s[i] = to_score.pass(s[i]);
        }
        if (!whole) hide(s, visible);
        exponentials(s, factor, to_score);
        products_wait<0>(o);
        after_values();
#pragma unroll
        for (int i = 0; i < kTileTokens / 4; ++i) weights[i] = ProductElement::pack(s[2 * i], s[2 * i + 1]);
        rescale_outputs(factor);
    }

    // Turns kScores scores of a thread into weights, in place. `factor` is what outputs must take.
    template <int kScores>
    __device__ __forceinline__ void exponentials(float (&s)[kScores], float (&factor)[2], const ScoreScale& to_score) {
        const float scale = to_score.factor();
        float highest[2][2];  // of the row's even and odd columns: short chains of dependent instructions
#pragma unroll
        for (int i = 0; i < 4; ++i) highest[i / 2][i % 2] = s[i];
#pragma unroll
        for (int i = 4; i < kScores; ++i) {
            highest[i / 2 % 2][i % 2] = fmaxf(highest[i / 2 % 2][i % 2], s[i]);
        }
        float top[2] = {fmaxf(highest[0][0], highest[0][1]), fmaxf(highest[1][0], highest[1][1])};
#pragma unroll
        for (int distance = 1; distance < 4; distance *= 2) {  // a row's columns lie in four neighbouring lanes
            const float other[2] = {__shfl_xor_sync(0xffffffffu, top[0], distance),
                                    __shfl_xor_sync(0xffffffffu, top[1], distance)};
            top[0] = fmaxf(top[0], other[0]);
            top[1] = fmaxf(top[1], other[1]);
        }
        float base[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            factor[half] = state[half].raise(top[half] * scale);
            base[half] = SoftmaxState::finite_base(state[half].m);
        }
        float sum[2][2] = {};
#pragma unroll
        for (int i = 0; i < kScores; ++i) {
            s[i] = exp2_approx(s[i] * scale - base[i / 2 % 2]);
            sum[i / 2 % 2][i % 2] += s[i];
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) state[half].l += sum[half][0] + sum[half][1];  // see finish()
    }

    // Hides from each row what it does not see. Lane l takes tokens 2 l and 2 l + 1 (of each 64) and finds the warp's rows
    // that see them, 16 bits a token; a lane then gets those of its own columns by shuffles.
    __device__ __forceinline__ void hide(Scores& s, u32 visible) const {
        const int lane = threadIdx.x % 32;
        u32 seen_by[kTileTokens / 64];
#pragma unroll
        for (int k = 0; k < kTileTokens / 64; ++k) seen_by[k] = rows_of_pair(load_shared(visible + lane * 4 + k * 128));
#pragma unroll
        for (int j = 0; j < kTileTokens / 8; ++j) {
            const u32 rows = __shfl_sync(0xffffffffu, seen_by[j / 8], j % 8 * 4 + lane % 4) >> (lane / 4);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (!(rows & 1u << (i / 2 * 8 + i % 2 * 16))) s[4 * j + i] = -kInfinity;
            }
        }
    }
    // Which of the warp's 16 rows see a token, for a token in each half.
    __device__ __forceinline__ u32 rows_of_pair(u32 visible) const {
        const int warp_row = first_row / 16 * 16;
        u32 rows = 0;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int begin = int(visible >> (i * 16) & 0xff) - warp_row;
            const int end = begin + int(visible >> (i * 16 + 8) & 0xff);
            const u32 below_end = (1u << min(max(end, 0), 16)) - 1, below_begin = (1u << min(max(begin, 0), 16)) - 1;
            rows |= (below_end & ~below_begin) << (i * 16);
        }
        return rows;
    }

    // A chunk of a tile, for attend_chunk.
    static __device__ __forceinline__ PanelChunk<kPanelBytes> chunk_of(int chunk, u32 keys, u32 values) {
        const ChunkPlace place(threadIdx.x % 32);
        const u32 tokens = chunk * kChunkTokens * kPanelRowBytes;
        return {keys + tokens + place.by_columns, values + tokens + place.by_rows};
    }
    // Attends this warp's rows to a chunk, when no products are under way. queries: as start_scores takes them. visible: of
    // the chunk, as weigh takes it. before_values(): called between the chunk's keys and its values.
    template <typename Chunk, typename BeforeValues>
    __device__ __forceinline__ void attend_chunk(const Chunk& chunk, u32 queries, int query_panel_bytes, u32 visible,
                                                 const ScoreScale& to_score, const BeforeValues& before_values) {
        const int lane = threadIdx.x % 32;
        const u32 warp_rows = threadIdx.x % 128 / 32 * kChunkRows * kPanelRowBytes;
        float s[8];
        const u32 own_queries = queries + warp_rows + ChunkPlace(lane).by_rows;
        const auto load_queries = [&](u32 (&q)[4], int d) {
            load_matrices(q, (own_queries ^ d % 4 * 32) + d / 4 * query_panel_bytes);
        };
        chunk.scores(s, load_queries);
        if (kSoftCap) {
#pragma unroll
            for (int i = 0; i < 8; ++i) s[i] = to_score.pass(s[i]);
        }
        before_values();
        typename Chunk::Values v;  // on their way during the softmax
        chunk.load_values(v);
        hide_in_chunk(s, visible + lane % 4 * 4);
        float factor[2];
        exponentials(s, factor, to_score);
        rescale_outputs(factor);
        const u32 packed[4] = {ProductElement::pack(s[0], s[1]), ProductElement::pack(s[2], s[3]),
                               ProductElement::pack(s[4], s[5]), ProductElement::pack(s[6], s[7])};
        chunk.add_values(o, packed, v);
    }
    // Hides from each row what it does not see. visible: address of two bytes for each of this lane's two first tokens.
    __device__ __forceinline__ void hide_in_chunk(float (&s)[8], u32 visible) const {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const u32 pair = load_shared(visible + j * 16);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const u32 begin = pair >> (i % 2 * 16) & 0xff, count = pair >> (i % 2 * 16 + 8) & 0xff;
                if (u32(first_row + i / 2 * 8) - begin >= count) s[4 * j + i] = -kInfinity;
            }
        }
    }

    // The maximum rarely moves by more than the slack: then there is nothing to rescale.
    __device__ __forceinline__ void rescale_outputs(const float (&factor)[2]) {
        if (__any_sync(0xffffffffu, factor[0] != 1.0f || factor[1] != 1.0f)) scale_outputs(factor);
    }
    __device__ __forceinline__ void scale_outputs(const float (&factor)[2]) {
#pragma unroll
        for (int i = 0; i < kOutputs; ++i) o[i] *= factor[i / 2 % 2];
    }

    // Completes the row sums, which every lane has gathered for its own columns.
    __device__ __forceinline__ void finish() {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            state[half].l += __shfl_xor_sync(0xffffffffu, state[half].l, 1);
            state[half].l += __shfl_xor_sync(0xffffffffu, state[half].l, 2);
        }
    }
};
