// What the warps of a worker of tree_decode_sm90.cu share: sizes, shared memory, rings of tiles, rows of queries.
#pragma once
#include "barrier.cuh"
#include "warpgroup_rows.cuh"
#include "work.cuh"

#if !defined(FT_ROW_GROUPS) || !defined(FT_KEY_STAGES) || !defined(FT_VALUE_STAGES)
#error "FT_ROW_GROUPS, FT_KEY_STAGES and FT_VALUE_STAGES are given by kernels.py"
#endif

constexpr int kRowGroups = FT_ROW_GROUPS;      // warpgroups that split an item's rows
constexpr int kTokenGroups = 2 / kRowGroups;   // warpgroups that take turns at its tiles
constexpr int kRows = kRowGroups * kGroupRows;
constexpr int kKeyStages = FT_KEY_STAGES;
constexpr int kValueStages = FT_VALUE_STAGES;
constexpr int kConsumerWarps = 8;
constexpr int kProducerWarps = 4;
constexpr int kThreads = (kConsumerWarps + kProducerWarps) * kWarpSize;
constexpr int kGroupThreads = 128;
constexpr int kProducerRegisters = 88;
constexpr int kConsumerRegisters = 208;
static_assert(kGroupThreads * (kProducerRegisters + 2 * kConsumerRegisters) <= 65536, "registers of a multiprocessor");
constexpr int kWarpTokens = kTileTokens / kProducerWarps;
constexpr int kWarpRows = kRows / kProducerWarps;
constexpr int kChunks = kHeadDim / 8;          // of 8 elements, 16 bytes
constexpr int kTileBytes = kTileTokens * kHeadDim * 2;
constexpr int kQueryBytes = kRows * kHeadDim * 2;

static_assert(kRowGroups == 1 || kRowGroups == 2, "two warpgroups split rows or tokens");
static_assert(kValueStages > kTokenGroups, "each warpgroup holds the values of a tile while it waits for the next one");
static_assert(kWarpTokens <= kWarpSize && kWarpRows <= kWarpSize, "a lane holds one row's place");

// Named barriers, one for each warpgroup.
constexpr int kExchange = 1, kOwnGroup = 3, kTurn = 5;

struct Shared {
    alignas(1024) unsigned char k[kKeyStages][kTileBytes];
    alignas(1024) unsigned char v[kValueStages][kTileBytes];
    alignas(1024) unsigned char q[2][kQueryBytes];
    float exchange[kTokenGroups == 2 ? kOutputs * kGroupThreads : 1];  // accumulators of the second token group
    SoftmaxState exchange_state[kTokenGroups == 2 ? kGroupRows : 1];
    // Twice as many: a tile's keys are done with before its view is.
    TileView view[2 * kKeyStages];
    u16 visible[2 * kKeyStages][kTileTokens];
    Barrier k_full[kKeyStages], k_empty[kKeyStages], v_full[kValueStages], v_empty[kValueStages], q_empty[2];
    int merge[2];  // what a warpgroup is to merge
};
static_assert(sizeof(Shared) == FT_SHARED_BYTES, "host and device agree on shared memory");

// A place in a ring of keys or values, and the parity of its barriers' phase.
template <int kStages>
struct Ring {
    int stage = 0;
    int parity = 0;
    // The place of the tile's view, of which there are twice as many.
    __device__ __forceinline__ int view() const { return stage + parity * kStages; }
    __device__ __forceinline__ void advance(int by) {
        stage += by;
        if (stage >= kStages) {
            stage -= kStages;
            parity ^= 1;
        }
    }
};

__device__ __forceinline__ void prefetch(const void* address) {
    asm volatile("prefetch.global.L1 [%0];" ::"l"(address));
}
// Brings an item near, whose 64 bytes are two sectors.
__device__ __forceinline__ void prefetch_item(const WorkItem* item) {
    prefetch(item);
    prefetch(&item->first);
}

// Where a row of an item's queries and outputs lies.
struct QueryRow {
    bool valid;  // whether there is such a row, and its request has not finished
    int head;
    i64 request;

    __device__ __forceinline__ QueryRow(const WorkParams& p, const WorkItem& item, int row)
        : valid(row < item.num_requests * p.group), head(item.kv_head * p.group + row % p.group) {
        const int in_item = valid ? row / p.group : 0;
        request = item.first_request >= 0 ? item.first_request + in_item : p.request_order[item.first_position + in_item];
        valid = valid && request >= 0;
    }
};
