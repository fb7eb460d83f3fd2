// The two float8 types that K and V may have. Four of them, a 32-bit word, are widened to two pairs of 16-bit elements,
// exactly: float16 holds every value of both types, bfloat16 too.
#pragma once
#include "types.cuh"

// Sign, 5 bits of exponent, 2 of mantissa: the upper half of a float16.
struct Float8E5M2 {
    using Bits = u8;
    // Bytes 2 * pair and 2 * pair + 1 of the word, each as a float16.
    static __device__ __forceinline__ u32 to_halves(u32 word, int pair) {
        return __byte_perm(word, 0, pair == 0 ? 0x1404 : 0x3424);
    }
    static __device__ __forceinline__ float to_float(u8 bits) { return Float16::to_float(u16(bits << 8)); }
};

// Sign, 4 bits of exponent, 3 of mantissa; no infinity, and NaN only where all seven bits below the sign are set.
struct Float8E4M3 {
    using Bits = u8;
    static __device__ __forceinline__ u32 to_halves(u32 word, int pair) {
        u32 halves;
#if __CUDA_ARCH__ >= 890
        u16 bytes[2];  // so taken apart, the upper ones need no shift
        asm("mov.b32 {%0, %1}, %2;" : "=h"(bytes[0]), "=h"(bytes[1]) : "r"(word));
        asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(bytes[pair]));
#else
        const u32 bytes = Float8E5M2::to_halves(word, pair);
        // The exponent's bias is 7 and not 15: times 2^8, which also sets subnormals right.
        const u32 scaled = (bytes & 0x80008000u) | (bytes & 0x7f007f00u) >> 1;
        asm("mul.f16x2 %0, %1, %2;" : "=r"(halves) : "r"(scaled), "r"(0x5c005c00u));
        // What was NaN is 480 now.
        halves |= (((bytes & 0x7f007f00u) + 0x01000100u) >> 15 & 0x00010001u) * 0x7e00u;
#endif
        return halves;
    }
    static __device__ __forceinline__ float to_float(u8 bits) { return Float16::to_float(u16(to_halves(bits, 0))); }
};
