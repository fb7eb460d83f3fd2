// K and V tiles in shared memory: asynchronous gather of rows, and a swizzle that spares ldmatrix bank conflicts.
#pragma once
#include "cache_policy.cuh"

__device__ __forceinline__ void copy_async_16(u32 shared_address, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address), "l"(global) : "memory");
}
// 16 bytes from global to shared memory; zeros, and no read, where `valid` is false. read_once: nobody else reads them.
__device__ __forceinline__ void copy_async_16(u32 shared_address, const void* global, bool valid, bool read_once = false) {
    const int bytes = valid ? 16 : 0;
    if (read_once) {
        asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(shared_address), "l"(global),
                     "r"(bytes), "l"(kReadOncePolicy)
                     : "memory");
    } else {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address), "l"(global), "r"(bytes)
                     : "memory");
    }
}
// Lets the barrier in shared memory count one arrival when all copies that this thread has started are there.
__device__ __forceinline__ void arrive_after_copies(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#if defined(FT_KV_ELEMENT)
__device__ __forceinline__ void store_shared(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
// Stores 16 float8 as two vectors of eight elements.
__device__ __forceinline__ void store_widened(u32 first, u32 second, const u32 (&words)[4]) {
    u32 pairs[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) pairs[i] = Element::from_halves(KVElement::to_halves(words[i / 2], i % 2));
    store_shared(first, pairs[0], pairs[1], pairs[2], pairs[3]);
    store_shared(second, pairs[4], pairs[5], pairs[6], pairs[7]);
}
#endif

// A tile of rows of kDim 16-bit elements, cut into vectors of 16 bytes. It starts at a multiple of its row's size.
//
// ldmatrix reads one vector of eight consecutive rows at a time. Their bank is fixed by the vector's index and, in rows
// shorter than 128 bytes, by the row's place in a 128-byte line: exclusive-or spreads the eight over all banks. It also
// makes addresses cheap: what depends on the lane is one number, and a step to another vector or row is an exclusive-or
// or a sum with a constant.
template <int kDim>
struct TileLayout {
    static constexpr int kRowBytes = kDim * 2;
    static constexpr int kVectors = kDim / 8;
    static constexpr int kRowsPerLine = max_of(1, 8 / kVectors);
    static constexpr int kMask = min_of(8, kVectors) - 1;

    static __device__ constexpr u32 swizzle(int row) { return u32((row / kRowsPerLine) & kMask) << 4; }
    static __device__ __forceinline__ u32 offset(int row, int vector) {
        return (u32(row * kRowBytes + (vector << 4))) ^ swizzle(row);
    }
};

// The share of one warp in gathering a tile: 32 / kVectors rows a pass, one vector a lane.
template <int kRows, int kDim>
struct WarpGather {
    using Layout = TileLayout<kDim>;
    static constexpr int kRowsPerPass = kWarpSize / Layout::kVectors;
    static constexpr int kPasses = ceil_div(kRows, kRowsPerPass);
    static_assert(Layout::kVectors <= kWarpSize, "a warp copies at least one row a pass");
    static_assert(kRows <= kWarpSize, "each lane holds one entry");

    static __device__ __forceinline__ int row(int pass, int lane) {
        return pass * kRowsPerPass + lane / Layout::kVectors;
    }
    // Shared address of this lane's chunk in a pass, `first` being that of pass 0.
    static __device__ __forceinline__ u32 shared_address(u32 first, int pass) {
        return (first ^ Layout::swizzle(pass * kRowsPerPass)) + pass * kRowsPerPass * Layout::kRowBytes;
    }
    static __device__ __forceinline__ u32 first_address(u32 tile, int lane) {
        return tile + Layout::offset(lane / Layout::kVectors, lane % Layout::kVectors);
    }

    // Copies the rows that lane i's entry i names; a negative entry gives zeros.
    static __device__ __forceinline__ void copy_entries(u32 tile, const u16* base, int row_stride, int entry,
                                                        int lane) {
        const u32 first = first_address(tile, lane);
        base += lane % Layout::kVectors * 8;
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) {
            const int from = __shfl_sync(0xffffffffu, entry, row(pass, lane) % kWarpSize);
            if (kRows % kRowsPerPass == 0 || row(pass, lane) < kRows) {
                copy_async_16(shared_address(first, pass), base + i64(max(from, 0)) * row_stride, from >= 0);
            }
        }
    }
    // Copies `count` consecutive rows, the first at `base`; the rest of the tile becomes zeros.
    static __device__ __forceinline__ void copy_run(u32 tile, const u16* base, int row_stride, int count, int lane) {
        const u32 first = first_address(tile, lane);
        const i64 step = i64(kRowsPerPass) * row_stride;
        const u16* from = base + i64(lane / Layout::kVectors) * row_stride + lane % Layout::kVectors * 8;
        if (count >= kRows) {
#pragma unroll
            for (int pass = 0; pass < kPasses; ++pass, from += step) {
                if (kRows % kRowsPerPass == 0 || row(pass, lane) < kRows) {
                    copy_async_16(shared_address(first, pass), from);
                }
            }
            return;
        }
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass, from += step) {
            if (kRows % kRowsPerPass == 0 || row(pass, lane) < kRows) {
                const bool valid = row(pass, lane) < count;
                copy_async_16(shared_address(first, pass), valid ? from : base, valid);
            }
        }
    }
#if defined(FT_KV_ELEMENT)
    // The same for float8 rows, which are widened on the way: when it returns, this lane's part is in the tile.
    static __device__ __forceinline__ void copy_run(u32 tile, const u8* base, int row_stride, int count, int lane) {
        constexpr int kRawChunks = kDim / 16;
        constexpr int kRawRows = kWarpSize / kRawChunks;  // a pass
        constexpr int kRawPasses = ceil_div(kRows, kRawRows), kBatch = min_of(4, kRawPasses);
        static_assert(kRawPasses % kBatch == 0, "whole batches of reads that are under way together");
        const int chunk = lane % kRawChunks;
#pragma unroll 1
        for (int row = lane / kRawChunks; row < kRawPasses * kRawRows; row += kBatch * kRawRows) {
            u32 words[kBatch][4] = {};
#pragma unroll
            for (int pass = 0; pass < kBatch; ++pass) {
                const int from = row + pass * kRawRows;
                if (from < min(count, kRows)) load_16(words[pass], base + i64(from) * row_stride + chunk * 16);
            }
#pragma unroll
            for (int pass = 0; pass < kBatch; ++pass) {
                const int to = row + pass * kRawRows;
                if (to >= kRows) break;
                store_widened(tile + Layout::offset(to, chunk * 2), tile + Layout::offset(to, chunk * 2 + 1),
                                       words[pass]);
            }
        }
    }
    static __device__ __forceinline__ void load_16(u32 (&words)[4], const u8* from) {
        asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                     : "l"(from));
    }
#endif
};
