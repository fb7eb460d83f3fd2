// Products of one warp with a chunk of 16 tokens, from the tiles and into the accumulators of its warpgroup. A product of
// the whole warpgroup computes 64 rows; for tokens that few rows see, only the warps with such rows need to compute.
#pragma once
#include "config.cuh"
#include "mma.cuh"
#include "wgmma.cuh"

constexpr int kChunkTokens = 16;
constexpr int kChunkRows = 16;  // of a warp

// Offsets of what a lane addresses for ldmatrix in 16 rows of a panel: row i % 8 of matrix i / 8.
struct ChunkPlace {
    u32 by_rows;     // matrices: rows 0 to 7, rows 8 to 15, then the same of the next 8 columns
    u32 by_columns;  // matrices: 8 columns, the next 8 columns, then the same of rows 8 to 15

    __device__ __forceinline__ explicit ChunkPlace(int lane)
        : by_rows((lane % 16) * kPanelRowBytes + ((lane / 16) ^ (lane % 8)) * 16),
          by_columns((lane / 16 * 8 + lane % 8) * kPanelRowBytes + ((lane / 8 % 2) ^ (lane % 8)) * 16) {}
};

// A warp's 16 rows of queries, as fragments of its products.
using Queries = u32[kHeadDim / 16][4];

// s = queries keys^T. Fragments as those of a warpgroup's product: s[4 j], s[4 j + 1] of row lane / 4, columns 8 j + ...
// load_queries(q, d): fragment d. keys: address of the chunk in its first panel, by_columns added.
template <typename LoadQueries>
__device__ __forceinline__ void chunk_scores(float (&s)[8], const LoadQueries& load_queries, u32 keys,
                                             int key_panel_bytes) {
    float sums[2][2][4] = {};  // of even and odd steps: half as long a chain of dependent products
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d) {
        u32 q[4], k[4];
        load_queries(q, d);
        load_matrices(k, (keys ^ d % 4 * 32) + d / 4 * key_panel_bytes);
        Mma<ProductElement>::add(sums[d % 2][0], q, k[0], k[1]);
        Mma<ProductElement>::add(sums[d % 2][1], q, k[2], k[3]);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) s[i] = sums[0][i / 4][i % 4] + sums[1][i / 4][i % 4];
}

// What a lane holds of a chunk's values. values: address of the chunk in its first panel, by_rows added.
using ChunkValues = u32[kHeadDim / 16][4];
__device__ __forceinline__ void load_chunk_values(ChunkValues& v, u32 values, int value_panel_bytes) {
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d) load_matrices_transposed(v[d], (values ^ d % 4 * 32) + d / 4 * value_panel_bytes);
}
// o += weights values; weights as a product takes them.
__device__ __forceinline__ void add_chunk_values(float (&o)[kHeadDim / 2], const u32 (&weights)[4], const ChunkValues& v) {
#pragma unroll
    for (int d = 0; d < kHeadDim / 16; ++d) {
        Mma<ProductElement>::add(reinterpret_cast<float(&)[4]>(o[8 * d]), weights, v[d][0], v[d][1]);
        Mma<ProductElement>::add(reinterpret_cast<float(&)[4]>(o[8 * d + 4]), weights, v[d][2], v[d][3]);
    }
}

// A chunk of tiles whose panels are kPanelBytes apart.
template <int kPanelBytes>
struct PanelChunk {
    using Values = ChunkValues;
    u32 keys, values;  // as chunk_scores and load_chunk_values take them

    template <typename LoadQueries>
    __device__ __forceinline__ void scores(float (&s)[8], const LoadQueries& load_queries) const {
        chunk_scores(s, load_queries, keys, kPanelBytes);
    }
    __device__ __forceinline__ void load_values(Values& v) const { load_chunk_values(v, values, kPanelBytes); }
    static __device__ __forceinline__ void add_values(float (&o)[kHeadDim / 2], const u32 (&weights)[4], const Values& v) {
        add_chunk_values(o, weights, v);
    }
};
