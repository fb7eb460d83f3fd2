// The schedule that DecodePlan hands to tree_decode.cu: items, and the runs of tokens that each attends to.
#pragma once
#include "config.cuh"

// A run of consecutive rows of K and V, and which rows of its item may see it. Ranges are half-open.
struct alignas(16) Segment {
    int kv_begin;
    int kv_len;  // positive; in tree_decode_sm90's plans it may be 0
    int row_begin;
    int row_end;  // in tree_decode_sm90's plans plus kReadOnce where nobody else reads these tokens
};
constexpr int kReadOnce = 0x10000;  // READ_ONCE in row_tiles.py

// One block's work for one KV head: the query rows of consecutive requests (in plan order) against lists of segments.
// A row is one query head of one request: row = request in item * group + head in group. Row warp w holds the rows
// [16 w, 16 w + 16); the warps of a block form token groups of row_warps warps each, every group with its own tokens.
// Mirrored by ITEM_FIELDS in fasttree_cupy/planning/subtree.py.
struct Item {
    int first_position;  // first request, an index into request_order
    int num_requests;
    int partial;         // first row of mid_o, in requests; -1: the item writes o
    int row_warps;       // 1, 2 or 4
    int shared[3];       // segments [shared[g], shared[g + 1]): what token group g's row warps gather together
    int own[5];          // segments [own[w], own[w + 1]): what warp w, row warp w % row_warps, gathers for itself
};
static_assert(sizeof(Item) == 48, "as ITEM_FIELDS in subtree.py");

// Mirrored field by field in fasttree_cupy/execution/plan_kernels.py. Strides count elements; the last axis is contiguous.
struct TreeDecodeParams {
    const u16* q;               // [batch, qo_heads, head_dim]
    const KVBits* k;            // [tokens, kv_heads, head_dim]
    const KVBits* v;            // [tokens, kv_heads, head_dim]
    u16* o;                     // [batch, qo_heads, head_dim]
    float* mid_o;               // [partials, qo_heads, head_dim], contiguous: normalised partial outputs
    float* mid_lse;             // [partials, qo_heads], contiguous: natural log
    float* lse;                 // [batch, qo_heads], contiguous: natural log; null: not wanted
    const Item* items;          // [items], the longest first
    const Segment* segments;    // [segments]
    const int* request_order;   // [batch]: requests in plan order
    i64 q_stride_request, q_stride_head;
    i64 k_stride_token, k_stride_head;  // token strides below 2^30
    i64 v_stride_token, v_stride_head;
    i64 o_stride_request, o_stride_head;
    int kv_heads;
    int group;                  // query heads a KV head
    float sm_scale;
    float logit_cap;            // <= 0: none
    int o_aligned;              // rows of o start at multiples of 16 bytes
    float v_scale;              // factor of float8 V where v_scales is null
    const float* k_scales;      // [kv_heads]: factors of float8 K; null: sm_scale has it
    const float* v_scales;      // [kv_heads]: factors of float8 V, or null
};
static_assert(sizeof(TreeDecodeParams) == 184, "as TREE_DECODE_PARAMS in plan_kernels.py");
