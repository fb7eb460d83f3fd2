// Warpgroup matrix products (sm_90a): 64 rows x N columns x 16, float32 accumulation, B from shared memory.
//
// Fragments of a warpgroup, warp w of four, lane = 4 * g + c (g = 0..7, c = 0..3):
//   A 64x16 in registers: a[0] row 16w + g, columns 2c, 2c+1;  a[1] row + 8;  a[2], a[3] the same at columns + 8
//   D 64xN:  d[4j], d[4j+1] row 16w + g, columns 8j + 2c, 8j + 2c + 1;  d[4j+2], d[4j+3] row + 8
#pragma once
#include "types.cuh"

// Tiles in shared memory are panels of 64 elements (128 bytes) a row, vectors of 16 bytes swizzled by the row's number
// modulo 8. A panel starts at a multiple of 1024 bytes.
constexpr int kPanelElements = 64;
constexpr int kPanelRowBytes = 128;

// Where a lane writes when a warp copies rows of kVectors times 16 bytes into a tile of kRows rows, as many rows a
// pass as it has lanes for. The lane's vector stays, so that a pass is an exclusive-or and a sum with constants.
template <int kRows, int kVectors>
struct PanelPlace {
    static constexpr int kRowsPerPass = 32 / kVectors;
    static_assert(8 % kRowsPerPass == 0, "passes start at different rows of the swizzle's eight");
    u32 lane_offset;

    // first_row: of the warp's rows, a multiple of 8.
    __device__ __forceinline__ PanelPlace(int first_row, int lane)
        : lane_offset(lane % kVectors / 8 * kRows * kPanelRowBytes + (first_row + lane / kVectors) * kPanelRowBytes +
                      ((lane % 8) ^ (lane / kVectors)) * 16) {}

    __device__ __forceinline__ u32 offset(int pass) const {
        const int row = pass * kRowsPerPass;
        return (lane_offset ^ (row % 8 * 16)) + row * kPanelRowBytes;
    }
};

__device__ __forceinline__ u32 load_shared(u32 address) {
    u32 value;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address));
    return value;
}

// A value that is the same in all lanes, which the compiler then knows: what follows from it is computed once for the
// warp, where the descriptors of products are wanted.
__device__ __forceinline__ int uniform(int value) { return __reduce_or_sync(0xffffffffu, value); }

// Matrix descriptors with the 128-byte swizzle, for tiles at `shared_address`. `panel_stride` separates panels where
// the product's N axis runs along them; it is ignored where K does.
struct MatrixDescriptor {
    // The swizzle, and the bytes from eight rows to the next eight, in units of 16.
    static constexpr u32 kHigh = u32(1) << 30 | 8 * kPanelRowBytes >> 4;
    u32 low;

    __device__ __forceinline__ MatrixDescriptor(u32 shared_address, int panel_stride)
        : low(u32(panel_stride >> 4) << 16 | shared_address >> 4) {}

    // Of what lies `bytes` further on.
    __device__ __forceinline__ u64 at(int bytes) const {
        u64 descriptor;
        asm("mov.b64 %0, {%1, %2};" : "=l"(descriptor) : "r"(low + (bytes >> 4)), "r"(kHigh));
        return descriptor;
    }
};

__device__ __forceinline__ void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

#define FT_IO8(d, i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define FT_IO32(d, i) FT_IO8(d, i), FT_IO8(d, i + 8), FT_IO8(d, i + 16), FT_IO8(d, i + 24)
#define FT_IO64(d) FT_IO32(d, 0), FT_IO32(d, 32)

// Waits until at most kPending of the groups that were committed are under way. The accumulators named here are read
// after it, not before.
template <int kPending>
__device__ __forceinline__ void products_wait(float (&d)[32]) {
    asm volatile("wgmma.wait_group.sync.aligned %32;" : FT_IO32(d, 0) : "n"(kPending) : "memory");
}
template <int kPending>
__device__ __forceinline__ void products_wait(float (&d)[64]) {
    asm volatile("wgmma.wait_group.sync.aligned %64;" : FT_IO64(d) : "n"(kPending) : "memory");
}

#define FT_D32 \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31}"
#define FT_D64 \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, " \
    "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"

template <typename Element>
struct Wgmma;

// multiply: d = A B^T (+ d), A and B with K along their panels; multiply_held: the same, A in registers. multiply_values:
// d += A B, A in registers, B with N along its panels.
#define FT_WGMMA(ELEMENT, TYPE) \
    template <> \
    struct Wgmma<ELEMENT> { \
        static __device__ __forceinline__ void multiply(float (&d)[32], u64 a, u64 b, int accumulate) { \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n" \
                         "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " " FT_D32 \
                         ", %32, %33, p, 1, 1, 0, 0;\n}" \
                         : FT_IO32(d, 0) \
                         : "l"(a), "l"(b), "r"(accumulate)); \
        } \
        static __device__ __forceinline__ void multiply(float (&d)[64], u64 a, u64 b, int accumulate) { \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n" \
                         "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " " FT_D64 \
                         ", %64, %65, p, 1, 1, 0, 0;\n}" \
                         : FT_IO64(d) \
                         : "l"(a), "l"(b), "r"(accumulate)); \
        } \
        static __device__ __forceinline__ void multiply_held(float (&d)[32], const u32 (&a)[4], u64 b, int accumulate) { \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n" \
                         "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " " FT_D32 \
                         ", {%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}" \
                         : FT_IO32(d, 0) \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate)); \
        } \
        static __device__ __forceinline__ void multiply_values(float (&d)[32], const u32* a, u64 b) { \
            asm volatile("{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n" \
                         "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " " FT_D32 \
                         ", {%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}" \
                         : FT_IO32(d, 0) \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)); \
        } \
        static __device__ __forceinline__ void multiply_values(float (&d)[64], const u32* a, u64 b) { \
            asm volatile("{\n.reg .pred p;\nsetp.eq.b32 p, 0, 0;\n" \
                         "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " " FT_D64 \
                         ", {%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}" \
                         : FT_IO64(d) \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)); \
        } \
    }
FT_WGMMA(Float16, "f16");
FT_WGMMA(BFloat16, "bf16");
#undef FT_WGMMA
#undef FT_D32
#undef FT_D64
#undef FT_IO8
#undef FT_IO32
#undef FT_IO64
