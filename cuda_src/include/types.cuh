// Fixed-width names and the 16-bit element types. No CUDA toolkit header is included anywhere: NVRTC alone compiles this.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;
using u64 = unsigned long long;

constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000);
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

struct alignas(8) Float2 {
    float x, y;
};
// Eight 16-bit elements, which are stored together.
struct alignas(16) Packed8 {
    u32 value[4];
};

__device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__device__ constexpr int min_of(int a, int b) { return a < b ? a : b; }
__device__ constexpr int max_of(int a, int b) { return a > b ? a : b; }

// IEEE binary16, stored as its 16 bits.
struct Float16 {
    using Bits = u16;
    static __device__ __forceinline__ float to_float(u16 bits) {
        float value;
        asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
        return value;
    }
    static __device__ __forceinline__ u16 from_float(float value) {
        u16 bits;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
        return bits;
    }
#if __CUDA_ARCH__ >= 800
    static __device__ __forceinline__ u32 pack(float low, float high) {
        u32 bits;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
        return bits;
    }
    // A pair from two float16.
    static __device__ __forceinline__ u32 from_halves(u32 halves) { return halves; }
    static __device__ __forceinline__ u32 to_halves(u32 pair) { return pair; }
#endif
};

// bfloat16: the upper half of a binary32. Integer arithmetic, because sm_70 and sm_75 have no conversion.
struct BFloat16 {
    using Bits = u16;
    static __device__ __forceinline__ float to_float(u16 bits) { return __uint_as_float(u32(bits) << 16); }
    static __device__ __forceinline__ u16 from_float(float value) {
        const u32 bits = __float_as_uint(value);
        if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;  // NaN: the carry below could turn it into infinity
        return u16((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);  // round to nearest, ties to even
    }
#if __CUDA_ARCH__ >= 800
    static __device__ __forceinline__ u32 pack(float low, float high) {
        u32 bits;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
        return bits;
    }
    // A pair as two float16, the largest where they hold no more: exact from 2^-14 on, to 2^-25 below.
    static __device__ __forceinline__ u32 to_halves(u32 pair) {
        u32 halves;
        asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;"
            : "=r"(halves)
            : "f"(__uint_as_float(pair & 0xffff0000u)), "f"(__uint_as_float(pair << 16)));
        return halves;
    }
    static __device__ __forceinline__ u32 from_halves(u32 halves) {
        return pack(Float16::to_float(u16(halves)), Float16::to_float(u16(halves >> 16)));
    }
#endif
};
