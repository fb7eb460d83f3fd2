// The softmax state both stages share. Base 2 inside: scores are multiplied by log2(e) once, so that every exponential
// is one ex2 instruction. The natural-log LSE that leaves a kernel is (m + log2(l)) * ln 2.
#pragma once
#include "config.cuh"

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

__device__ __forceinline__ float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// A row's maximum may lag behind by this much, base 2: weights then reach 2^8, far from the end of float16, and the
// output gathered so far is rescaled only when the maximum has moved by more (as FlashAttention-4 does).
constexpr float kSlack = 8.0f;

// Running softmax of one row. Empty: nothing attended to yet.
struct SoftmaxState {
    float m = -kInfinity;  // reference score, base 2; no score so far exceeds it by more than kSlack
    float l = 0.0f;        // sum of 2^(score - m)

    // Makes `score` representable; returns the factor that l and the output gathered so far must take: 0 from the empty
    // state, where there is nothing to scale. No branches: several rows' chains of dependent instructions can overlap.
    __device__ __forceinline__ float raise(float score) {
        const bool moves = score > m + kSlack;
        const float factor = exp2_approx(moves ? m - score : 0.0f);
        m = moves ? score : m;
        l *= factor;
        return factor;
    }
    // 2^(score - m), and 0 (not NaN) for a score of -inf while the state is still empty.
    __device__ __forceinline__ float weight(float score) const { return exp2_approx(score - finite_base(m)); }
    // The factor that normalises the output; 0 for the empty state, whose output is defined as 0.
    __device__ __forceinline__ float normaliser() const { return l > 0.0f || l != l ? reciprocal_approx(l) : 0.0f; }
    __device__ __forceinline__ float natural_lse() const { return (m + log2_approx(l)) * kLn2; }

    static __device__ __forceinline__ float finite_base(float m) { return m == -kInfinity ? 0.0f : m; }
};

// Factors of a KV head's float8 keys and values; 1 for 16-bit ones.
template <typename Params>
__device__ __forceinline__ float key_scale(const Params& p, int kv_head) {
    return kFloat8 && p.k_scales != nullptr ? p.k_scales[kv_head] : 1.0f;
}
template <typename Params>
__device__ __forceinline__ float value_scale(const Params& p, int kv_head) {
    if constexpr (!kFloat8) return 1.0f;
    return p.v_scales != nullptr ? p.v_scales[kv_head] : p.v_scale;
}

// How a raw dot product becomes a base-2 score.
struct ScoreScale {
    float scale;  // softmax scale, natural units
    float cap;    // soft cap, natural units: cap * tanh(score / cap); only read where kSoftCap

    __device__ __forceinline__ float operator()(float dot) const {
        return kSoftCap ? capped(dot) : dot * (scale * kLog2e);
    }

    // The same in two steps: score = pass(dot) * factor(). Where scores are capped or the scale is negative the first one
    // does it all, and kSoftCap must be set; else it is left out. The factor is positive, so that the largest pass(dot)
    // has the largest score, and what is -inf stays so.
    __device__ __forceinline__ float pass(float dot) const { return cap > 0.0f ? capped(dot) : dot * (scale * kLog2e); }
    __device__ __forceinline__ float factor() const { return kSoftCap ? 1.0f : fmaxf(scale * kLog2e, 1e-30f); }

    __device__ __forceinline__ float capped(float dot) const {
        const float ratio = dot * (scale / cap);
        const float square = ratio * ratio;
        const float series = 1.0f + square * (-1.0f / 3 + square * (2.0f / 15 - square * (17.0f / 315)));
        const float small = dot * (scale * kLog2e) * series;
        const float large = cap * kLog2e * tanh_accurate(ratio);
        // For small ratios tanh's series, to r^7 / r: there the closed form cancels, and a large cap would magnify what
        // is lost. Both are computed: a branch in every score would cost more.
        return fabsf(ratio) < 0.25f ? small : large;
    }
    // tanh.approx is off by 5e-4, which a cap of 50 turns into 0.02 of a logit. This is good to 2e-7, for |x| >= 0.25.
    static __device__ __forceinline__ float tanh_accurate(float x) {
        return 1.0f - 2.0f * reciprocal_approx(1.0f + exp2_approx(2.0f * kLog2e * x));
    }
};
