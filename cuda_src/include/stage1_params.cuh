// What every stage-1 kernel takes, and how a vnode's rows map to requests and heads.
#pragma once
#include "config.cuh"

// Mirrored field by field in fasttree_cupy/execution/stages.py. Strides count elements; the last axis is contiguous.
struct Stage1Params {
    const u16* q;                    // [batch, qo_heads, head_dim]
    const KVBits* k;                 // [tokens, kv_heads, head_dim]
    const KVBits* v;                 // [tokens, kv_heads, head_dim]
    const int* vnode_to_kv_entries;  // [sum of distinct vnode KV]: rows of K and V
    const int* vnode_to_kv_offs;     // [vnodes]: first entry
    const int* vnode_to_kv_lens;     // [vnodes]
    const int* vnode_to_q_entries;   // [partials]: requests
    const int* vnode_to_q_offs;      // [vnodes]: first entry, also the first row of mid_o
    const int* vnode_to_q_lens;      // [vnodes]
    float* mid_o;                    // [partials, qo_heads, head_dim], contiguous: normalised partial outputs
    float* mid_lse;                  // [partials, qo_heads], contiguous: natural log
    i64 q_stride_request, q_stride_head;
    i64 k_stride_token, k_stride_head;  // token strides below 2^30 on tensor cores
    i64 v_stride_token, v_stride_head;
    int first_vnode;                 // of this launch's phase
    int group;                       // query heads a KV head
    float sm_scale;
    float logit_cap;                 // <= 0: none
    const float* k_scales;           // [kv_heads]: factors of float8 K; null: sm_scale has it
    const float* v_scales;           // [kv_heads]: factors of float8 V, or null
    float v_scale;                   // factor of float8 V where v_scales is null
    int kv_heads;                    // of K and V
};
static_assert(sizeof(Stage1Params) == 176, "as STAGE1_PARAMS in stages.py");

// One vnode seen from one KV head. A row is one query head of one request: row = request * group + head in group.
struct VnodeView {
    const Stage1Params& p;
    int kv_head;
    int q_off, num_rows;
    int kv_off, kv_len;

    __device__ __forceinline__ VnodeView(const Stage1Params& params, int vnode, int kv_head)
        : p(params), kv_head(kv_head),
          q_off(params.vnode_to_q_offs[vnode]), num_rows(params.vnode_to_q_lens[vnode] * params.group),
          kv_off(params.vnode_to_kv_offs[vnode]), kv_len(params.vnode_to_kv_lens[vnode]) {}

    __device__ __forceinline__ int qo_head(int row) const { return kv_head * p.group + row % p.group; }
    __device__ __forceinline__ int qo_heads() const { return p.kv_heads * p.group; }
    __device__ __forceinline__ const u16* query(int row) const {
        const i64 request = p.vnode_to_q_entries[q_off + row / p.group];
        return p.q + request * p.q_stride_request + qo_head(row) * p.q_stride_head;
    }
    // Row of mid_lse, and of mid_o in units of head_dim.
    __device__ __forceinline__ i64 partial(int row) const {
        return i64(q_off + row / p.group) * qo_heads() + qo_head(row);
    }
};
