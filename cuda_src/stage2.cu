// Grid (ceil(merges * qo_heads / heads / kWarps)), block kWarps * 32 threads: a warp merges some heads of a request.
//
// Stage 2: merges the partial outputs of one request and head by log-sum-exp. A request without partials gets 0.
#include "dependent_launch.cuh"
#include "softmax.cuh"

constexpr int kWarps = 4;
constexpr int kLaneDims = max_of(1, kHeadDim / kWarpSize);  // lane i holds dimensions i * kLaneDims ...
constexpr int kActiveLanes = kHeadDim / kLaneDims;
// Partial outputs in flight: of one head, where there are few rows, or of several, which share their requests' lists.
constexpr int kHeads = kLaneDims <= 4 ? 4 : 2;
constexpr int kUnrollOne = 8, kUnrollHeads = 4;

static_assert(kActiveLanes <= kWarpSize, "a warp covers a row");
static_assert(kWarps * kWarpSize == FT_THREADS, "host and device agree on a block's threads");

// A lane's share of a row. Rows of mid_o start at a multiple of its size, so it loads in the widest pieces there are.
struct alignas(4 * min_of(4, kLaneDims)) Partial {
    float value[kLaneDims];
};
struct alignas(2 * kLaneDims) Output {
    u16 value[kLaneDims];
};

// Mirrored field by field in fasttree_cupy/execution/stages.py.
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
    int heads;                        // that a warp merges: kHeads, where that divides qo_heads, or 1
};
static_assert(sizeof(Stage2Params) == 96, "as STAGE2_PARAMS in stages.py");

// Writes a row, and its LSE where that is wanted.
__device__ __forceinline__ void write(const Stage2Params& p, int request, int head, int lane, const SoftmaxState& state,
                                      const float (&o)[kLaneDims]) {
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

// A warp's share: kRows heads of a request from `head` on, kUnroll partial outputs of each at a time.
template <int kRows, int kUnroll>
__device__ __forceinline__ void merge(const Stage2Params& p, int index, int head, int lane) {
    const int request = p.requests == nullptr ? index : p.requests[index];
    const int count = p.req_to_vnode_lens[index];
    const int* entries = p.req_to_vnode_entries + p.req_to_vnode_offs[index];
    int partials[kUnroll];
    const auto find = [&](int first) {
#pragma unroll
        for (int t = 0; t < kUnroll; ++t) partials[t] = first + t < count ? entries[first + t] : 0;
    };
    find(0);
    wait_for_launcher();  // stage 1: nothing so far was written by it

    SoftmaxState state[kRows];
    float o[kRows][kLaneDims] = {};
#pragma unroll 1
    for (int first = 0; first < count; first += kUnroll) {
        // All loads of a group are issued before the first use: scores, with which sums begin, are the last. Past the end
        // there is zero: an infinity read again and weighted by 0 would be NaN.
        Partial part[kRows][kUnroll];
        float score[kRows][kUnroll];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
            for (int t = 0; t < kUnroll; ++t) {
                const i64 row = i64(partials[t]) * p.qo_heads + head + r;
                part[r][t] = first + t < count ? reinterpret_cast<const Partial*>(p.mid_o + row * kHeadDim)[lane] : Partial{};
            }
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
            for (int t = 0; t < kUnroll; ++t) {
                const i64 row = i64(partials[t]) * p.qo_heads + head + r;
                score[r][t] = first + t < count ? p.mid_lse[row] : -kInfinity;
            }
        }
        find(first + kUnroll);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            float highest = -kInfinity;
#pragma unroll
            for (int t = 0; t < kUnroll; ++t) {
                score[r][t] *= kLog2e;
                highest = fmaxf(highest, score[r][t]);
            }
            const float factor = state[r].raise(highest);
#pragma unroll
            for (int i = 0; i < kLaneDims; ++i) o[r][i] *= factor;
#pragma unroll
            for (int t = 0; t < kUnroll; ++t) {
                const float weight = state[r].weight(score[r][t]);
                state[r].l += weight;
#pragma unroll
                for (int i = 0; i < kLaneDims; ++i) o[r][i] += weight * part[r][t].value[i];
            }
        }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        write(p, request, head + r, lane, state[r], o[r]);
    }
}

extern "C" __global__ void __launch_bounds__(kWarps * kWarpSize)
stage2(const __grid_constant__ Stage2Params p) {
    const int lane = threadIdx.x % kWarpSize;
    const i64 share = i64(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
    const int shares = p.qo_heads / p.heads;  // of a request
    if (share >= i64(p.merges) * shares || lane >= kActiveLanes) return;
    const int index = int(share / shares), head = int(share % shares) * p.heads;
    if (p.heads == 1) {
        merge<1, kUnrollOne>(p, index, head, lane);
    } else {
        merge<kHeads, kUnrollHeads>(p, index, head, lane);
    }
}
