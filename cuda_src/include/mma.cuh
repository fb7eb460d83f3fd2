// Tensor-core instructions (sm_80): m16n8k16 products with float32 accumulation, and ldmatrix.
//
// Fragments of a warp, lane = 4 * g + c (g = 0..7, c = 0..3):
//   A 16x16: a[0] rows g,   columns 2c..2c+1;  a[1] rows g+8;  a[2], a[3] the same at columns + 8
//   C 16x8:  c[0], c[1] row g, columns 2c, 2c+1;  c[2], c[3] row g+8
#pragma once
#include "types.cuh"

template <typename Element>
struct Mma;

template <>
struct Mma<Float16> {
    static __device__ __forceinline__ void add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};

template <>
struct Mma<BFloat16> {
    static __device__ __forceinline__ void add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
};

// Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(u32 (&m)[4], u32 shared_address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(shared_address)
                 : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(u32 (&m)[4], u32 shared_address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(shared_address)
                 : "memory");
}
