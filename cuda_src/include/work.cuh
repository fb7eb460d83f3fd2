// The schedule of tree_decode_sm90.cu: each worker's list of items, and the runs of tokens that these attend to.
#pragma once
#include "bulk_copy.cuh"
#include "plan.cuh"

// Rows of one KV head of consecutive requests (in plan order), against a stretch of the tokens on their paths.
// A row is one query head of one request: row = request in item * group + head in group.
// Mirrored by ITEM_FIELDS in fasttree_cupy/planning/balanced.py.
struct alignas(16) WorkItem {
    int first_position;  // first request, an index into request_order
    int num_requests;
    int kv_head;
    int tokens;          // may be 0: then the output is 0
    int next;            // the worker's next item; -1: none
    int next_segment;    // segments[next_segment] follows the first one
    int piece, pieces;   // this is piece `piece` of `pieces` of the rows' tokens; pieces > 1: outputs are partial
    int first_partial;   // block of mid_o of piece 0; its pieces follow one another
    int counter;         // counters[counter] counts the pieces that are done; together: a word for each piece
    int first_request;   // where its requests follow one another in Q and O: the first; else -1
    int together;        // whether the pieces' workers merge together, or the one whose piece is done last
    Segment first;       // without what earlier pieces attend to
};
static_assert(sizeof(WorkItem) == 64, "as ITEM_FIELDS in balanced.py");

// Mirrored field by field in fasttree_cupy/execution/plan_kernels.py. Strides count elements; the last axis is contiguous.
struct WorkParams {
    const u16* q;              // [batch, qo_heads, head_dim]
    const KVBits* k;           // [tokens, kv_heads, head_dim]
    const KVBits* v;           // [tokens, kv_heads, head_dim]
    u16* o;                    // [batch, qo_heads, head_dim]
    float* mid_o;              // [partials, row groups, head_dim / 2, 128]: normalised, in the accumulators' order
    float* mid_lse;            // [partials, row groups, 64]: base 2
    float* lse;                // [batch, qo_heads], contiguous: natural log; null: not wanted
    // 0 before the first launch, then left as the next one needs them. Of an item, from counter * row groups on: a number
    // for each row group, or, where its pieces are merged together, words [row groups, pieces].
    int* counters;
    const WorkItem* items;     // [items]: worker w begins with items[w]
    const Segment* segments;   // [segments]
    const int* request_order;  // [batch]: requests in plan order; -1: one that has finished
    i64 q_stride_request, q_stride_head;
    i64 k_stride_token, k_stride_head;  // token strides below 2^30
    i64 v_stride_token, v_stride_head;
    i64 o_stride_request, o_stride_head;
    int num_segments;
    int group;                 // query heads a KV head
    float sm_scale;
    float logit_cap;           // <= 0: none
    int o_aligned;             // rows of o start at multiples of 16 bytes
    int qo_heads;
    int polls;                 // how often a worker looks whether all pieces of its rows are done
    float v_scale;             // factor of float8 V where v_scales is null
    const float* k_scales;     // [kv_heads]: factors of float8 K; null: sm_scale has it
    const float* v_scales;     // [kv_heads]: factors of float8 V, or null
    int bulk;                  // whether there are tensor maps:
    TensorMap k_map, v_map;    // [tokens, kv_heads, head_dim], boxes of 16 tokens x 1 x 128 bytes
};
static_assert(sizeof(WorkParams) == 512, "as WORK_PARAMS in plan_kernels.py");
