// Grid (ceil(rows * heads / kWarps)), block kWarps * 32 threads: one warp an output row.
//
// Merges two attention states of the same queries over disjoint tokens, by log-sum-exp. A state whose LSE is -inf is
// empty: its output is not looked at.
#include "config.cuh"
#include "softmax.cuh"

constexpr int kWarps = 4;
static_assert(kWarps * kWarpSize == FT_THREADS, "host and device agree on a block's threads");

// Mirrored field by field in fasttree_cupy/execution/merge_kernel.py. Strides count elements; the last axis is contiguous.
struct MergeStatesParams {
    const u16* o_a;        // [rows, heads, head_dim]
    const u16* o_b;        // [rows, heads, head_dim]
    const float* lse_a;    // [rows, heads], contiguous: natural log
    const float* lse_b;    // [rows, heads], contiguous: natural log
    u16* o;                // [rows, heads, head_dim], contiguous
    float* lse;            // [rows, heads], contiguous: natural log
    i64 a_stride_row, a_stride_head;
    i64 b_stride_row, b_stride_head;
    i64 outputs;           // rows * heads
    int heads;
    int padding;
};
static_assert(sizeof(MergeStatesParams) == 96, "as MERGE_STATES_PARAMS in merge_kernel.py");

extern "C" __global__ void __launch_bounds__(kWarps * kWarpSize)
merge_states(const __grid_constant__ MergeStatesParams p) {
    const int lane = threadIdx.x % kWarpSize;
    const i64 output = i64(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
    if (output >= p.outputs) return;
    const i64 row = output / p.heads;
    const i64 head = output % p.heads;
    const float a = p.lse_a[output] * kLog2e, b = p.lse_b[output] * kLog2e;
    SoftmaxState state;
    state.m = a > b || a != a ? a : b;  // a NaN stays one
    const float weight_a = state.weight(a), weight_b = state.weight(b);
    state.l = weight_a + weight_b;
    // Shares first: outputs times weights could be more than a float32 holds.
    const float share_a = weight_a * state.normaliser(), share_b = weight_b * state.normaliser();
    const u16* from_a = p.o_a + row * p.a_stride_row + head * p.a_stride_head;
    const u16* from_b = p.o_b + row * p.b_stride_row + head * p.b_stride_head;
    for (int d = lane; d < kHeadDim; d += kWarpSize) {
        const float part_a = a == -kInfinity ? 0.0f : Element::to_float(from_a[d]) * share_a;
        const float part_b = b == -kInfinity ? 0.0f : Element::to_float(from_b[d]) * share_b;
        p.o[output * kHeadDim + d] = Element::from_float(part_a + part_b);
    }
    if (lane == 0) p.lse[output] = state.natural_lse();
}
