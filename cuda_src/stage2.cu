// Grid (ceil(merges * qo_heads / kWarps)), block kWarps * 32 threads: one warp an output row.
//
// Stage 2: merges the partial outputs of one request and head by log-sum-exp. A request without partials gets 0.
#include "config.cuh"
#include "softmax.cuh"

constexpr int kWarps = 4;
constexpr int kLaneDims = max_of(1, kHeadDim / kWarpSize);  // lane i holds dimensions i * kLaneDims ...
constexpr int kActiveLanes = kHeadDim / kLaneDims;
constexpr int kUnroll = 8;                                  // partials in flight

static_assert(kActiveLanes <= kWarpSize, "a warp covers a row");

// A lane's share of a row. Rows of mid_o start at a multiple of its size, so it loads in the widest pieces there are.
struct alignas(4 * min_of(4, kLaneDims)) Partial {
    float value[kLaneDims];
};
struct alignas(2 * kLaneDims) Output {
    u16 value[kLaneDims];
};

// Mirrored field by field in fasttree_cupy/execution/cuda.py.
struct Stage2Params {
    const float* mid_o;               // [partials, qo_heads, head_dim], contiguous
    const float* mid_lse;             // [partials, qo_heads], contiguous: natural log
    const int* req_to_vnode_entries;  // [partials]: rows of mid_o, a request's together
    const int* req_to_vnode_offs;     // [merges]
    const int* req_to_vnode_lens;     // [merges]
    const int* requests;              // [merges]: whose outputs these are; null: request i is merge i
    u16* o;                           // [batch, qo_heads, head_dim], last axis contiguous
    float* lse;                       // [batch, qo_heads], contiguous: natural log; null: not wanted
    i64 o_stride_request, o_stride_head;
    int merges;
    int qo_heads;
    int o_aligned;                    // rows of o start at multiples of 16 bytes
    int padding;
};
static_assert(sizeof(Stage2Params) == 96, "as STAGE2_PARAMS in cuda.py");

extern "C" __global__ void __launch_bounds__(kWarps * kWarpSize)
stage2(const __grid_constant__ Stage2Params p) {
    const int lane = threadIdx.x % kWarpSize;
    const i64 output = i64(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
    if (output >= i64(p.merges) * p.qo_heads || lane >= kActiveLanes) return;
    const int merge = int(output / p.qo_heads);
    const int head = int(output % p.qo_heads);
    const int request = p.requests == nullptr ? merge : p.requests[merge];
    const int count = p.req_to_vnode_lens[merge];
    const int* entries = p.req_to_vnode_entries + p.req_to_vnode_offs[merge];

    SoftmaxState state;
    float o[kLaneDims] = {};
    for (int first = 0; first < count; first += kUnroll) {
        // All loads of a group are issued before the first use. Past the end there is zero: an infinity read again and
        // weighted by 0 would be NaN.
        Partial part[kUnroll];
        float score[kUnroll];
        float highest = -kInfinity;
#pragma unroll
        for (int t = 0; t < kUnroll; ++t) {
            const bool valid = first + t < count;
            const i64 row = i64(entries[valid ? first + t : first]) * p.qo_heads + head;
            score[t] = valid ? p.mid_lse[row] : -kInfinity;
            part[t] = valid ? reinterpret_cast<const Partial*>(p.mid_o + row * kHeadDim)[lane] : Partial{};
        }
#pragma unroll
        for (int t = 0; t < kUnroll; ++t) {
            score[t] *= kLog2e;
            highest = fmaxf(highest, score[t]);
        }
        const float factor = state.raise(highest);
#pragma unroll
        for (int i = 0; i < kLaneDims; ++i) o[i] *= factor;
#pragma unroll
        for (int t = 0; t < kUnroll; ++t) {
            const float weight = state.weight(score[t]);
            state.l += weight;
#pragma unroll
            for (int i = 0; i < kLaneDims; ++i) o[i] += weight * part[t].value[i];
        }
    }

    if (p.lse != nullptr && lane == 0) p.lse[i64(request) * p.qo_heads + head] = state.natural_lse();
    u16* out = p.o + request * p.o_stride_request + head * p.o_stride_head + lane * kLaneDims;
    Output result;
#pragma unroll
    for (int i = 0; i < kLaneDims; ++i) result.value[i] = Element::from_float(o[i] * state.normaliser());
    if (p.o_aligned) {
        *reinterpret_cast<Output*>(out) = result;
    } else {
#pragma unroll
        for (int i = 0; i < kLaneDims; ++i) out[i] = result.value[i];
    }
}
