// K and V tiles in shared memory: asynchronous gather of rows, and a swizzle that keeps ldmatrix free of bank conflicts.
#pragma once
#include "config.cuh"

// 16 bytes from global to shared memory; zeros, and no read, where `valid` is false.
__device__ __forceinline__ void copy_async_16(u32 shared_address, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Where chunk `chunk` (16 bytes) of row `row` lies in a tile of rows of kDim 16-bit elements.
//
// ldmatrix reads one chunk of eight consecutive rows at a time. Their bank is fixed by the chunk's index and, in rows
// shorter than 128 bytes, by the row's place in a 128-byte line: exclusive-or spreads the eight over all banks.
template <int kDim>
__device__ __forceinline__ u32 tile_offset(int row, int chunk) {
    constexpr int kChunks = kDim / 8;
    constexpr int kRowsPerLine = max_of(1, 8 / kChunks);
    constexpr int kMask = min_of(8, kChunks) - 1;
    return u32(row * (kDim * 2) + ((chunk ^ ((row / kRowsPerLine) & kMask)) << 4));
}

// The share of one warp in gathering a tile: kRows rows in a row. Lane i holds the entry of row i and hands it round, so
// that a thread keeps one index, whatever the tile.
template <int kRows, int kDim>
struct WarpGather {
    static constexpr int kChunks = kDim / 8;
    static constexpr int kRowsPerPass = kWarpSize / kChunks;
    static constexpr int kPasses = ceil_div(kRows, kRowsPerPass);
    static_assert(kChunks <= kWarpSize, "a warp copies at least one row a pass");
    static_assert(kRows <= kWarpSize, "each lane holds one entry");

    int entry;  // row of K and V; -1 past the end

    // entries[0 .. count) are the warp's rows; count may be zero or less.
    __device__ __forceinline__ void fetch(const int* entries, int count, int lane) {
        entry = lane < min(count, kRows) ? entries[lane] : -1;
    }
    __device__ __forceinline__ void copy(u32 tile, int first_row, const u16* base, i64 row_stride, int lane) const {
        const int chunk = lane % kChunks;
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) {
            const int row = pass * kRowsPerPass + lane / kChunks;
            const int from = __shfl_sync(0xffffffffu, entry, row % kWarpSize);
            if (kRows % kRowsPerPass == 0 || row < kRows) {
                const bool valid = from >= 0;
                copy_async_16(tile + tile_offset<kDim>(first_row + row, chunk),
                              base + (valid ? from : 0) * row_stride + chunk * 8, valid);
            }
        }
    }
};
