// What a warp does with a tile: 16 query rows against some tokens, on tensor cores, with an online softmax.
#pragma once
#include "config.cuh"
#include "kv_tile.cuh"
#include "mma.cuh"
#include "softmax.cuh"

constexpr int kDimSteps = kHeadDim / 16;
using Layout = TileLayout<kHeadDim>;

// Registers that a thread's rows take at least, rounded up to what buys another block on a multiprocessor.
constexpr int kRegisters = kHeadDim <= 64 ? 128 : kHeadDim == 128 ? 168 : 255;
__device__ constexpr int min_blocks(int threads) { return 65536 / kRegisters / threads; }

// Which scores of 16 rows x kTokens tokens count.
struct Visible {
    int tokens;    // tokens [0, tokens)
    bool rows[2];  // this lane's rows g and g + 8
    bool partly;   // something is hidden; the same in every lane
};

// 16 query rows, and of each row its softmax state and output over the tokens seen so far.
struct WarpRows {
    u32 q[kDimSteps][4];
    float o[2 * kDimSteps][4];
    SoftmaxState state[2];  // rows g and g + 8 of lane 4 * g + c

    // query(row) points at row `row` of Q; rows from num_rows on are zero.
    template <typename Query>
    __device__ __forceinline__ void load_queries(const Query& query, int first_row, int num_rows, int lane) {
        const int column = lane % 4 * 2;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_row + lane / 4 + half * 8;
            const bool valid = row < num_rows;
            const u16* from = valid ? query(row) + column : nullptr;
#pragma unroll
            for (int d = 0; d < kDimSteps; ++d) {
                q[d][half] = valid ? *reinterpret_cast<const u32*>(from + d * 16) : 0;
                q[d][half + 2] = valid ? *reinterpret_cast<const u32*>(from + d * 16 + 8) : 0;
            }
        }
#pragma unroll
        for (int d = 0; d < 2 * kDimSteps; ++d) {
#pragma unroll
            for (int i = 0; i < 4; ++i) o[d][i] = 0.0f;
        }
    }

    // Attends kTokens tokens, which start at row `first` of the K and V tiles.
    template <int kTokens>
    __device__ __forceinline__ void attend(u32 k_tile, u32 v_tile, int first, const Visible& visible,
                                           const ScoreScale& to_score, int lane) {
        // Lane i addresses row i % 8 of matrix i / 8: of K, two blocks of eight tokens times two chunks; of V, whose
        // matrices are transposed on the way, two chunks times two blocks of eight tokens.
        const int row = lane % 8;
        const u32 k_lane = k_tile + first * Layout::kRowBytes + Layout::offset(lane / 16 * 8 + row, lane / 8 % 2);
        const u32 v_lane = v_tile + first * Layout::kRowBytes + Layout::offset(lane / 8 % 2 * 8 + row, lane / 16);
        float s[kTokens / 8][4];
        scores<kTokens>(s, k_lane);
        softmax<kTokens>(s, visible, to_score, lane);
        values<kTokens>(s, v_lane);
    }

    // Few tokens: two sums a score, of even and odd steps, for half as long a chain of dependent products.
    template <int kTokens>
    __device__ __forceinline__ void scores(float (&s)[kTokens / 8][4], u32 k_lane) const {
        constexpr int kSums = kTokens == 16 && kDimSteps > 1 ? 2 : 1;
        float sums[kSums][kTokens / 8][4] = {};
#pragma unroll
        for (int d = 0; d < kDimSteps; ++d) {
#pragma unroll
            for (int t = 0; t < kTokens / 16; ++t) {
                u32 k[4];
                load_matrices(k, (k_lane ^ (d * 32)) + t * 16 * Layout::kRowBytes);
                Mma<Element>::add(sums[d % kSums][2 * t], q[d], k[0], k[1]);
                Mma<Element>::add(sums[d % kSums][2 * t + 1], q[d], k[2], k[3]);
            }
        }
#pragma unroll
        for (int n = 0; n < kTokens / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) s[n][i] = kSums == 2 ? sums[0][n][i] + sums[kSums - 1][n][i] : sums[0][n][i];
        }
    }

    // Turns dot products into weights, in place.
    template <int kTokens>
    __device__ __forceinline__ void softmax(float (&s)[kTokens / 8][4], const Visible& visible,
                                            const ScoreScale& to_score, int lane) {
#pragma unroll
        for (int n = 0; n < kTokens / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) s[n][i] = to_score(s[n][i]);
        }
        if (visible.partly) {
#pragma unroll
            for (int n = 0; n < kTokens / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const bool seen = n * 8 + lane % 4 * 2 + i % 2 < visible.tokens && visible.rows[i / 2];
                    if (!seen) s[n][i] = -kInfinity;
                }
            }
        }
        float highest[2] = {-kInfinity, -kInfinity};
#pragma unroll
        for (int n = 0; n < kTokens / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) highest[i / 2] = fmaxf(highest[i / 2], s[n][i]);
        }
        float factor[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // a row's columns lie in four neighbouring lanes
            highest[half] = fmaxf(highest[half], __shfl_xor_sync(0xffffffffu, highest[half], 1));
            highest[half] = fmaxf(highest[half], __shfl_xor_sync(0xffffffffu, highest[half], 2));
            factor[half] = state[half].raise(highest[half]);
        }
#pragma unroll
        for (int n = 0; n < kTokens / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                s[n][i] = state[i / 2].weight(s[n][i]);
                state[i / 2].l += s[n][i];  // of this lane's columns; finish() adds the four lanes up
            }
        }
        // The maximum rarely moves by more than the slack: then there is nothing to rescale.
        if (__any_sync(0xffffffffu, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
            for (int d = 0; d < 2 * kDimSteps; ++d) {
#pragma unroll
                for (int i = 0; i < 4; ++i) o[d][i] *= factor[i / 2];
            }
        }
    }

    template <int kTokens>
    __device__ __forceinline__ void values(const float (&s)[kTokens / 8][4], u32 v_lane) {
#pragma unroll
        for (int t = 0; t < kTokens / 16; ++t) {
            const u32 weights[4] = {
                Element::pack(s[2 * t][0], s[2 * t][1]), Element::pack(s[2 * t][2], s[2 * t][3]),
                Element::pack(s[2 * t + 1][0], s[2 * t + 1][1]), Element::pack(s[2 * t + 1][2], s[2 * t + 1][3])};
#pragma unroll
            for (int d = 0; d < kDimSteps; ++d) {
                u32 v[4];
                load_matrices_transposed(v, (v_lane ^ (d * 32)) + t * 16 * Layout::kRowBytes);
                Mma<Element>::add(o[2 * d], weights, v[0], v[1]);
                Mma<Element>::add(o[2 * d + 1], weights, v[2], v[3]);
            }
        }
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
