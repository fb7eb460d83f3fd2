// Grid (vnodes of the phase, KV heads, row blocks), block kWarps * 32 threads: one warp a query row.
//
// Stage 1, the plain way: right on every GPU from sm_70, any element alignment, no tensor cores. Each warp walks the
// vnode's tokens; its lanes hold one query row and the running output, and a dot product is a warp-wide sum.
#include "config.cuh"
#include "softmax.cuh"
#include "stage1_params.cuh"

constexpr int kWarps = 4;
static_assert(kWarps * kWarpSize == FT_THREADS, "host and device agree on a block's threads");
constexpr int kLaneDims = max_of(1, kHeadDim / kWarpSize);  // lane i holds dimensions i, i + 32, ...
constexpr int kUnroll = 4;                                  // tokens in flight, to hide the latency of their loads

extern "C" __global__ void __launch_bounds__(kWarps * kWarpSize)
stage1_plain(const __grid_constant__ Stage1Params p) {
    const int lane = threadIdx.x % kWarpSize;
    const bool active = lane < kHeadDim;  // head_dim 16 leaves half a warp idle
    const VnodeView vnode(p, p.first_vnode + blockIdx.x, blockIdx.y);
    const ScoreScale to_score{p.sm_scale * key_scale(p, vnode.kv_head), p.logit_cap};
    const float v_scale = value_scale(p, vnode.kv_head);
    const int* entries = p.vnode_to_kv_entries + vnode.kv_off;
    const KVBits* k = p.k + vnode.kv_head * p.k_stride_head + lane;
    const KVBits* v = p.v + vnode.kv_head * p.v_stride_head + lane;

    const int first_row = blockIdx.z * kWarps + threadIdx.x / kWarpSize;
    for (int row = first_row; row < vnode.num_rows; row += gridDim.z * kWarps) {
        float q[kLaneDims], o[kLaneDims];
        const u16* query = vnode.query(row) + lane;
#pragma unroll
        for (int i = 0; i < kLaneDims; ++i) {
            q[i] = active ? Element::to_float(query[i * kWarpSize]) : 0.0f;
            o[i] = 0.0f;
        }

        SoftmaxState state;
        for (int token = 0; token < vnode.kv_len; token += kUnroll) {
            float score[kUnroll], value[kUnroll][kLaneDims];
            float highest = -kInfinity;
#pragma unroll
            for (int t = 0; t < kUnroll; ++t) {
                const bool valid = token + t < vnode.kv_len;
                const i64 entry = valid ? entries[token + t] : 0;
                float dot = 0.0f;
#pragma unroll
                for (int i = 0; i < kLaneDims; ++i) {
                    const bool load = valid && active;
                    dot += load ? q[i] * KVElement::to_float(k[entry * p.k_stride_token + i * kWarpSize]) : 0.0f;
                    value[t][i] = load ? KVElement::to_float(v[entry * p.v_stride_token + i * kWarpSize]) : 0.0f;
                }
#pragma unroll
                for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
                    dot += __shfl_xor_sync(0xffffffffu, dot, offset);
                }
                score[t] = valid ? to_score(dot) : -kInfinity;
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
                for (int i = 0; i < kLaneDims; ++i) o[i] += weight * value[t][i];
            }
        }

        const i64 partial = vnode.partial(row);
        if (lane == 0) p.mid_lse[partial] = state.natural_lse();
#pragma unroll
        for (int i = 0; i < kLaneDims; ++i) {
            if (active) p.mid_o[partial * kHeadDim + lane + i * kWarpSize] = o[i] * state.normaliser() * v_scale;
        }
    }
}
