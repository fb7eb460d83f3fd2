// The softmax state both stages share. Base 2 inside: scores are multiplied by log2(e) once, so that every exponential
// is one ex2 instruction. The natural-log LSE that leaves a kernel is (m + log2(l)) * ln 2.
#pragma once
#include "types.cuh"

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float log2_approx(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// A row's maximum may lag behind by this much, base 2: weights then reach 2^8, far from the end of float16, and the
// output gathered so far is rescaled only when the maximum has moved by more (as FlashAttention-4 does).
constexpr float kSlack = 8.0f;

// Running softmax of one row. Empty: nothing attended to yet.
struct SoftmaxState {
    float m = -kInfinity;  // reference score, base 2; no score so far exceeds it by more than kSlack
    float l = 0.0f;        // sum of 2^(score - m)

    // Makes `score` representable; returns the factor that l and the output gathered so far must take.
    __device__ __forceinline__ float raise(float score) {
        if (!(score > m + kSlack)) return 1.0f;
        const float factor = m == -kInfinity ? 1.0f : exp2_approx(m - score);  // empty: there is nothing to scale
        m = score;
        l *= factor;
        return factor;
    }
    // 2^(score - m), and 0 (not NaN) for a score of -inf while the state is still empty.
    __device__ __forceinline__ float weight(float score) const { return exp2_approx(score - finite_base(m)); }
    // The factor that normalises the output; 0 for the empty state, whose output is defined as 0.
    __device__ __forceinline__ float normaliser() const { return l > 0.0f || l != l ? 1.0f / l : 0.0f; }
    __device__ __forceinline__ float natural_lse() const { return (m + log2_approx(l)) * kLn2; }

    static __device__ __forceinline__ float finite_base(float m) { return m == -kInfinity ? 0.0f : m; }
};

// How a raw dot product becomes a base-2 score.
struct ScoreScale {
    float scale;  // softmax scale, natural units
    float cap;    // soft cap, natural units: cap * tanh(score / cap); <= 0: none

    __device__ __forceinline__ float operator()(float dot) const {
        if (cap <= 0.0f) return dot * (scale * kLog2e);
        const float ratio = dot * (scale / cap);
        if (fabsf(ratio) < 0.25f) {
            // tanh's series, to r^7 / r: the closed form cancels here, and a large cap would magnify what is lost.
            const float square = ratio * ratio;
            const float series = 1.0f + square * (-1.0f / 3 + square * (2.0f / 15 - square * (17.0f / 315)));
            return dot * (scale * kLog2e) * series;
        }
        return cap * kLog2e * tanh_accurate(ratio);
    }
    // tanh.approx is off by 5e-4, which a cap of 50 turns into 0.02 of a logit. This is good to 2e-7, for |x| >= 0.25.
    static __device__ __forceinline__ float tanh_accurate(float x) {
        return 1.0f - 2.0f / (1.0f + exp2_approx(2.0f * kLog2e * x));
    }
};
