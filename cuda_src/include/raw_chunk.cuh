// Products of one warp with a chunk of 16 tokens of float8, as they came: widened between shared memory and the product.
// Where few rows see the tokens, shared memory moves less than half of what it does for tiles that are widened first.
//
// What ldmatrix takes for elements of 16 bits are pairs of float8 here, so columns are in another order, the same in all
// tiles that a worker multiplies. Of each 16, queries and keys have 0 1 4 5 8 9 12 13, then 2 3 6 7 10 11 14 15; values,
// and so outputs, 0 2 4 .. 14, then 1 3 5 .. 15.
#pragma once
#include "config.cuh"
#include "mma.cuh"

// Offset of a chunk of 16 float8 in a tile of rows as they come. ldmatrix reads one chunk of eight rows at a time, which
// the exclusive-or spreads over all banks; that of rows of 128 bytes is the bulk copies' own.
__device__ __forceinline__ u32 raw_offset(int row, int chunk) {
    return row * kHeadDim + (chunk ^ (kHeadDim == 128 ? row % 8 : row / 2 % 4)) * 16;
}
static_assert(kHeadDim == 64 || kHeadDim == 128, "the rows that raw_offset spreads");

// Two columns of two tokens, token by token, to the order of their products: column by column.
__device__ __forceinline__ u32 by_columns(u32 word) { return __byte_perm(word, 0, 0x3120); }

// A chunk of a tile of rows as they come.
struct RawChunk {
    using Values = u32[kHeadDim / 32][4];
    u32 keys, values;  // addresses of the chunk's rows, place() added

    // Offset of what a lane addresses for ldmatrix, row i % 8 of matrix i / 8: tokens 0 to 7, tokens 8 to 15, then the
    // same of the next 16 columns.
    static __device__ __forceinline__ u32 place(int lane) { return raw_offset(lane % 16, lane / 16); }

    // s = queries keys^T, as chunk_scores gives it.
    template <typename LoadQueries>
    __device__ __forceinline__ void scores(float (&s)[8], const LoadQueries& load_queries) const {
        float sums[2][2][4] = {};  // of even and odd steps: half as long a chain of dependent products
#pragma unroll
        for (int pair = 0; pair < kHeadDim / 32; ++pair) {
            u32 k[4];
            load_matrices(k, keys ^ pair * 32);
#pragma unroll
            for (int step = 0; step < 2; ++step) {
                u32 q[4];
                load_queries(q, 2 * pair + step);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const u32 word = k[2 * step + half];
                    Mma<Float16>::add(sums[step][half], q, KVElement::to_halves(word, 0), KVElement::to_halves(word, 1));
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) s[i] = sums[0][i / 4][i % 4] + sums[1][i / 4][i % 4];
    }
    __device__ __forceinline__ void load_values(Values& v) const {
#pragma unroll
        for (int pair = 0; pair < kHeadDim / 32; ++pair) load_matrices_transposed(v[pair], values ^ pair * 32);
    }
    // o += weights values; weights as a product takes them.
    static __device__ __forceinline__ void add_values(float (&o)[kHeadDim / 2], const u32 (&weights)[4], const Values& v) {
#pragma unroll
        for (int d = 0; d < kHeadDim / 16; ++d) {
            const u32 first = by_columns(v[d / 2][d % 2 * 2]), second = by_columns(v[d / 2][d % 2 * 2 + 1]);
#pragma unroll
            for (int odd = 0; odd < 2; ++odd) {
                Mma<Float16>::add(reinterpret_cast<float(&)[4]>(o[8 * d + 4 * odd]), weights,
                                  KVElement::to_halves(first, odd), KVElement::to_halves(second, odd));
            }
        }
    }
};
