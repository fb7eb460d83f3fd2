// Two probes of the benchmark, in one module: neither needs a header of the CUDA toolkit.

__device__ unsigned long long mixed(unsigned long long x)
{
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;  // the finaliser of splitmix64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

// Grid: any. Writes `count` standard normal values as float16, or as bfloat16 where `bfloat` is set.
extern "C" __global__ void normal16(unsigned short* out, long long count, unsigned long long seed, int bfloat)
{
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step) {
        const unsigned long long bits = mixed(mixed(seed + 1) + 0x9E3779B97F4A7C15ull * (i + 1));
        const float u = ((unsigned)(bits >> 40) + 1) * 0x1p-24f;  // (0, 1]: its logarithm is finite
        const float angle = (unsigned)(bits & 0xFFFFFF) * 0x1p-23f;
        const float value = sqrtf(-2.0f * logf(u)) * cospif(angle);  // Box-Muller
        if (bfloat) {
            const unsigned word = __float_as_uint(value);
            out[i] = (unsigned short)((word + 0x7FFFu + ((word >> 16) & 1u)) >> 16);  // to nearest, ties to even
        } else {
            asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out[i]) : "f"(value));
        }
    }
}

// Grid: any. Reads `count` pieces of 16 bytes, a multiple of four times the number of threads, and keeps none.
extern "C" __global__ void read_all(const uint4* data, long long count, unsigned* sink)
{
    const long long step = (long long)gridDim.x * blockDim.x;
    unsigned seen = 0;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += 4 * step) {
        // Four loads in flight a thread: fewer leave bandwidth unused.
        const uint4 a = data[i], b = data[i + step], c = data[i + 2 * step], d = data[i + 3 * step];
        seen ^= a.x ^ a.y ^ a.z ^ a.w ^ b.x ^ b.y ^ b.z ^ b.w ^ c.x ^ c.y ^ c.z ^ c.w ^ d.x ^ d.y ^ d.z ^ d.w;
    }
    if (seen == 0xFFFFFFFFu) *sink = seen;  // never for zeros, but the compiler cannot know
}
