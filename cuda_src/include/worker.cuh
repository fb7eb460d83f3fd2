// What the warps of a worker of tree_decode_sm90.cu share: sizes, shared memory, rings of tiles, rows of queries.
#pragma once
#include "barrier.cuh"
#include "warpgroup_rows.cuh"
#include "work.cuh"
#if defined(FT_KV_ELEMENT)
#include "raw_chunk.cuh"
#endif

#if defined(FT_KV_ELEMENT) && !defined(FT_RAW_STAGES)
#error "FT_RAW_STAGES is given by kernels.py where K and V are float8"
#endif
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
constexpr int kWidenWarps = kFloat8 ? 4 : 0;
// Whether consumers read float8 tiles that they attend warp by warp as they came. With two row groups, which attend every
// tile together, all are widened: that was up to a tenth faster (bench/NOTES.md).
constexpr bool kReadsRaw = kFloat8 && kRowGroups == 1;
constexpr int kThreads = (kConsumerWarps + kProducerWarps + kWidenWarps) * kWarpSize;
constexpr int kGroupThreads = 128;
constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;  // of a thread; what a block begins with is all that it gets
constexpr int kProducerRegisters = 88;
constexpr int kConsumerRegisters = kFloat8 ? 168 : 208;
static_assert(kWarpSize * ((kProducerWarps + kWidenWarps) * kProducerRegisters + kConsumerWarps * kConsumerRegisters) <=
                  kThreads * kLaunchRegisters,
              "or the consumers wait for registers for ever");
// Consumers need more than an equal share with tiles of 128 tokens, and where further warps widen float8.
constexpr bool kSharesRegisters = kTileTokens == 64 && !kFloat8;
constexpr int kTileWarps = kRowGroups == 1 ? 1 : kFloat8 ? 2 : 4;  // producer warps that gather a tile together
constexpr int kTilesAtATime = kProducerWarps / kTileWarps;
constexpr int kWarpTokens = kTileTokens / kTileWarps;
constexpr int kLaneTokens = kWarpTokens / kWarpSize;
constexpr int kPartChunks = kWarpTokens / kChunkTokens;
constexpr u32 kAllChunks = (1u << kPartChunks) - 1;  // of a part, a bit for each
// The last producer warps copy an item's queries: where the first gather a tile of their own, these have it sooner.
constexpr int kQueryWarps = kTilesAtATime == 1 ? kProducerWarps : kRows / kWarpSize;
constexpr int kQueryRowsOfWarp = kRows / kQueryWarps;  // of queries
constexpr int kRowVectors = kHeadDim / 8;          // of 8 elements, 16 bytes
constexpr int kTileChunks = kTileTokens / kChunkTokens;  // as warps attend them alone
constexpr int kTileBytes = kTileTokens * kHeadDim * 2;
constexpr int kQueryBytes = kRows * kHeadDim * 2;
// Items whose queries are there at a time. Where all producer warps gather a tile together, one is enough: the next item's
// come after its first tile, which leaves more room for tiles.
constexpr int kQuerySlots = kTilesAtATime == 1 ? 1 : 2;
// There the consumers, who have nothing else to do yet, copy those of a worker's first item.
constexpr bool kConsumersCopyFirst = kQuerySlots == 1;
constexpr int kQueryArrivals = (kConsumersCopyFirst ? kConsumerWarps : kQueryWarps) * kWarpSize;
static_assert(kQueryArrivals % (kQueryWarps * kWarpSize) == 0, "each producer arrives for as many consumers");

static_assert(kThreads == FT_THREADS, "host and device agree on a block's threads");
static_assert(kRows / kChunkRows <= 8, "a bit of a byte for each 16 rows, see TileView");
static_assert(kRowGroups == 1 || kRowGroups == 2, "two warpgroups split rows or tokens");
static_assert(kValueStages > kTokenGroups, "each warpgroup holds the values of a tile while it waits for the next one");
static_assert(kQueryWarps <= kProducerWarps && kQueryRowsOfWarp <= kWarpSize, "a lane holds one row's place");
static_assert(kLaneTokens == 1 || kLaneTokens == 2, "see Producer::row_of");
// A barrier's parity does not tell a phase from the one after the next. Float8 keys and values are widened tile by tile, by
// all of who widen together.
static_assert(kFloat8 || (kTilesAtATime <= kKeyStages && kTilesAtATime <= kValueStages),
              "who waits for a phase has seen the one before");
static_assert(kKeyStages % kTokenGroups == 0 && kValueStages % kTokenGroups == 0,
              "a tile takes the place of one of the same warpgroup, which is at its tiles in their order");

// Tokens that few rows see are attended warp by warp: where no warp of a warpgroup sees more chunks than these.
constexpr int kMostApart = kTileChunks / 2;
static_assert(kMostApart < 7 && kTileChunks + 7 - kMostApart < 16, "four bits hold a sum, see warps_with_many");

// Named barriers: of all threads, and one for each warpgroup.
constexpr int kEveryone = 0;
constexpr int kOwnGroup = 1;

// Which of the block's rows see a tile's tokens. A bit stands for 16 rows, and is set where
struct alignas(8) TileView {
    u32 chunks_seen[kTileWarps];         // here four bits stand for them: the chunks of a producer warp's part that they see
    unsigned char seen_by[kTileChunks];  // some row sees some token of the chunk
    unsigned char whole[kTileWarps];     // every row sees every token of a producer warp's part
};

#if defined(FT_KV_ELEMENT)
constexpr int kRawStages = FT_RAW_STAGES;  // tiles of float8 rows, keys and values
constexpr int kRawBytes = kTileTokens * kHeadDim;
static_assert(kTilesAtATime <= kRawStages, "who waits for a phase has seen the one before");
// What consumers read as it came is not given back in the tiles' order.
static_assert(!kReadsRaw || (kTilesAtATime % kTokenGroups == 0 && kRawStages % kTilesAtATime == 0),
              "a raw place has tiles of one warpgroup, and the same producers");
// Arrivals that free a raw place: those of who widens, and of the consumers that read it. Of a tile that is widened the
// former arrive for both. Of one that is read both arrive at its keys' place, but only its readers, for both, at its
// values': who widens knows by the view that the keys before have been given back, not the values.
constexpr int kRawReaders = kReadsRaw ? kConsumerWarps / kTokenGroups : 0;
constexpr int kRawArrivals = kWidenWarps + kRawReaders;
static_assert(kRawArrivals % kWidenWarps == 0 && (!kReadsRaw || kRawArrivals % kRawReaders == 0), "each arrives for as many");
// When a tile's view is written, its raw place is free: the tile kRawStages before, of the same warpgroup, is done with or
// has been widened. Then the one before that, if it was widened too, had the place of one whose keys were done with,
// kKeyStages earlier. Its view was not, but those of the warpgroup's earlier tiles.
constexpr int kViewPlaces = kRawStages + kKeyStages + 2 * kTokenGroups;
static_assert(kViewPlaces % kTokenGroups == 0, "the place of a view is one of the same warpgroup's");
#else
// A tile's keys are done with before its view is, but after the views of its warpgroup's earlier tiles.
constexpr int kViewPlaces = 2 * kKeyStages;
static_assert(kTokenGroups <= kKeyStages, "a lap more is enough");
#endif

// Of each 16 rows the highest of four bits is set where they see many of a tile's chunks: then products of their warpgroup
// are worth it.
__device__ __forceinline__ u32 warps_with_many(const TileView& view) {
    u32 chunks_seen = 0;
#pragma unroll
    for (int part = 0; part < kTileWarps; ++part) chunks_seen += view.chunks_seen[part];
    return (chunks_seen + 0x11111111u * (7 - kMostApart)) & 0x88888888u;
}

struct Shared {
    alignas(1024) unsigned char k[kKeyStages][kTileBytes];
    alignas(1024) unsigned char v[kValueStages][kTileBytes];
    alignas(1024) unsigned char q[kQuerySlots][kQueryBytes];
#if defined(FT_KV_ELEMENT)
    alignas(1024) unsigned char raw_k[kRawStages][kRawBytes];  // float8 rows, as they come
    alignas(1024) unsigned char raw_v[kRawStages][kRawBytes];
#endif
    float exchange[kTokenGroups == 2 ? kOutputs * kGroupThreads : 1];  // accumulators that one group hands over
    SoftmaxState exchange_state[kTokenGroups == 2 ? kGroupRows : 1];
    TileView view[kViewPlaces];
    u16 visible[kViewPlaces][kTileTokens];
    Barrier k_full[kKeyStages], k_empty[kKeyStages], v_full[kValueStages], v_empty[kValueStages];
    Barrier q_full[kQuerySlots], q_empty[kQuerySlots];
#if defined(FT_KV_ELEMENT)
    Barrier q_ordered[kQuerySlots];
    Barrier view_full[kViewPlaces];
    Barrier raw_k_full[kRawStages], raw_k_empty[kRawStages], raw_v_full[kRawStages], raw_v_empty[kRawStages];
#endif
    Barrier given[2];  // each warpgroup's accumulators, with one row group
    int merge_work[2];  // whether a warpgroup is to merge, or which slices
};
static_assert(sizeof(Shared) == FT_SHARED_BYTES, "host and device agree on shared memory");

// What tells consumers that an item's queries are there as they multiply them.
__device__ __forceinline__ Barrier& queries_ready(Shared& s, int slot) {
#if defined(FT_KV_ELEMENT)
    return s.q_ordered[slot];
#else
    return s.q_full[slot];
#endif
}

// A place in a ring, and the parity of its barriers' phase.
template <int kStages>
struct Ring {
    int stage = 0;
    int parity = 0;
    // The place in a ring of two laps, as views have them for 16-bit keys.
    __device__ __forceinline__ int of_two_laps() const { return stage + parity * kStages; }
    // The place so many steps before, by no more than a lap.
    __device__ __forceinline__ Ring before(int by) const {
        return stage < by ? Ring{stage - by + kStages, parity ^ 1} : Ring{stage - by, parity};
    }
    // By no more than a lap.
    __device__ __forceinline__ void advance(int by) {
        stage += by;
        if (stage < kStages) return;
        stage -= kStages;
        parity ^= 1;
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
    i64 request;  // of rows past the last, the item's first; -1: it has finished

    // A division by way of a product, which is right for the few rows of a block: the quotient of row + 0.5 is further
    // from whole numbers than its error.
    __device__ __forceinline__ QueryRow(const WorkParams& p, const WorkItem& item, int row)
        : valid(row < item.num_requests * p.group) {
        const int quotient = int((float(row) + 0.5f) * reciprocal_approx(float(p.group)));
        const int in_item = valid ? quotient : 0;
        head = item.kv_head * p.group + row - quotient * p.group;
        request = item.first_request >= 0 ? item.first_request + in_item : p.request_order[item.first_position + in_item];
        valid = valid && request >= 0;
    }
};
