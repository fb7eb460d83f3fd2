// The rows of K and V of a worker where they are float8: producer warps gather them as they come into rings of their
// own, and further warps widen those into tiles that products of a warpgroup take.
#pragma once
#include "worker_producer.cuh"

// Where a lane writes when a warp copies float8 rows of kCopyVectors times 16 bytes, 512 bytes a pass.
struct RawPlace {
    static constexpr int kRowsPerPass = kWarpSize / kCopyVectors;
    u32 lane_offset;

    // first_row: of the warp's rows in the tile, a multiple of 8.
    __device__ __forceinline__ RawPlace(int first_row, int lane)
        : lane_offset(raw_offset(first_row + lane / kCopyVectors, lane % kCopyVectors)) {}

    __device__ __forceinline__ u32 offset(int pass) const {
        return (lane_offset ^ pass * kRowsPerPass % 8 * 16) + pass * kWarpSize * 16;
    }
};

// The rings that producer warps gather float8 rows into.
struct RawRings {
    using Place = RawPlace;
    static constexpr int kRowBytes = kHeadDim;
    static constexpr int kBoxes = kHeadDim == kPanelRowBytes ? 1 : 0;  // for 16 tokens; rows of 64 bytes come without
    Shared& s;
    Ring<kRawStages> raw;
    Ring<kViewPlaces> views;

    static __device__ __forceinline__ void init(Shared& s) {
        barrier_init(s.raw_k_full, kCopyArrivals);
        barrier_init(s.raw_v_full, kCopyArrivals);
        barrier_init(s.view_full, kViewArrivals);
        barrier_init(s.raw_k_empty, kRawArrivals * kWarpArrivals);
        barrier_init(s.raw_v_empty, kRawArrivals * kWarpArrivals);
        barrier_init(s.k_full, kWidenWarps * kWarpArrivals);
        barrier_init(s.v_full, kWidenWarps * kWarpArrivals);
        barrier_init(s.q_ordered, kWidenWarps * kWarpArrivals);
    }
    __device__ __forceinline__ Slot key_slot() const { return slot_of(s.raw_k, s.raw_k_full, s.raw_k_empty, raw); }
    __device__ __forceinline__ Slot value_slot() const { return slot_of(s.raw_v, s.raw_v_full, s.raw_v_empty, raw); }
    __device__ __forceinline__ int view() const { return views.stage; }
    __device__ __forceinline__ Barrier& view_full() const { return s.view_full[views.stage]; }
    __device__ __forceinline__ void advance(int by) {
        raw.advance(by);
        views.advance(by);
    }
};

__device__ __forceinline__ void load_shared(u32 (&words)[4], u32 address) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
}

// From raw rows to a tile. A lane takes 16 float8 and writes two chunks of a tile's row, which are neighbours but for the
// swizzle. Eight lanes, which the hardware serves together, take half of two rows (or all of two of 64 bytes). The rows'
// numbers are odd and even, so that the tile's swizzle spreads what they write over all banks; those of 128 bytes differ by
// 4 too, so that the raw one does so for what they read: 0 and 5, 1 and 4 in the first pass, 2 and 7, 3 and 6 in the next.
struct WidenPlace {
    static constexpr int kRowsPerPass = RawPlace::kRowsPerPass;
    static constexpr bool kWide = kHeadDim == 128;
    u32 from, to;

    // first_row: of the warp's rows, a multiple of 8.
    __device__ __forceinline__ WidenPlace(int first_row, int lane) {
        const int chunk = lane % 4, panel = lane / 8 % kPanels, second = lane / 4 % 2;
        const int row = kWide ? lane / 16 ^ second * 5 : second + lane / 8 * 2;
        from = raw_offset(first_row + row, panel * 4 + chunk);
        to = panel * kPanelBytes + (first_row + row) * kPanelRowBytes + ((chunk * 2) ^ row) * 16;
    }
    // Rows of a pass are these many further on, of which those modulo 8 swizzle.
    static constexpr __device__ int row_of(int pass) { return kWide ? pass / 2 * 8 + pass % 2 * 2 : pass * kRowsPerPass; }
    __device__ __forceinline__ u32 raw_offset_of(int pass) const {
        return (from ^ row_of(pass) % 8 * 16) + row_of(pass) * kHeadDim;
    }
    __device__ __forceinline__ u32 tile_offset(int pass) const {
        return (to ^ (row_of(pass) % 8 * 16)) + row_of(pass) * kPanelRowBytes;
    }
};
static_assert(WidenPlace::row_of(1) % 8 == 0 || kHeadDim == 128, "rows of 64 bytes swizzle alike in all passes");

// A warp that widens its quarter of every tile that products of a warpgroup take. It holds the rows of a tile in
// registers, so that their place is free for others while it waits for one among the tiles. Consumers fence what they
// read, as they do for tiles that come by themselves. Columns are in the order of RawChunk's products.
struct Widener {
    static constexpr int kRowsOfWarp = kTileTokens / kWidenWarps;
    static constexpr int kPasses = kRowsOfWarp / WidenPlace::kRowsPerPass;
    static_assert(kRowsOfWarp % 8 == 0, "whole turns of the swizzle, see WidenPlace");
    using Raw = u32[kPasses][4];
    // The places of a warpgroup's next tile.
    struct Places {
        Ring<kKeyStages> keys;
        Ring<kValueStages> values;
        __device__ __forceinline__ void advance(int by) {
            keys.advance(by);
            values.advance(by);
        }
    };
    const WorkParams& p;
    Shared& s;
    WidenPlace place;
    Ring<kRawStages> raw;
    Ring<kViewPlaces> views;
    Places next, after;  // of the next tile's warpgroup, and of the other one that takes turns with it

    __device__ __forceinline__ Widener(const WorkParams& p, Shared& s)
        : p(p), s(s),
          place((threadIdx.x / kWarpSize - kConsumerWarps - kProducerWarps) * kRowsOfWarp, threadIdx.x % kWarpSize) {
        after.advance(kTokenGroups - 1);
    }

    __device__ __forceinline__ void run() {
        named_sync(kEveryone, kThreads);
        int turn = 0;  // of the items that have tokens
        for (int index = blockIdx.x; index >= 0;) {
            const int tiles = ceil_div(p.items[index].tokens, kTileTokens);
            index = p.items[index].next;
            if (tiles > 0) order_queries(turn++);
#pragma unroll 1
            for (int tile = 0; tile < tiles; ++tile) take_tile();
        }
    }

    // Brings the columns of an item's queries into the order of their products, where they lie, and turns bfloat16 into
    // float16. Two chunks of a row are neighbours, in turn.
    __device__ __forceinline__ void order_queries(int turn) {
        const int slot = turn % kQuerySlots;
        barrier_wait(s.q_full[slot], turn / kQuerySlots % 2);
#pragma unroll 2
        for (int i = threadIdx.x % (kWidenWarps * kWarpSize); i < kQueryBytes / 32; i += kWidenWarps * kWarpSize) {
            const int row = i * 32 / kPanelRowBytes;
            const u32 first = shared_address(s.q[slot]) + i * 32 + row % 2 * 16, second = first ^ 16;
            u32 low[4], high[4];
            load_shared(low, first);
            load_shared(high, second);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                low[j] = Element::to_halves(low[j]);
                high[j] = Element::to_halves(high[j]);
            }
            store_shared(first, low[0], low[2], high[0], high[2]);
            store_shared(second, low[1], low[3], high[1], high[3]);
        }
        __syncwarp();
        barrier_arrive_warp(s.q_ordered[slot]);
    }

    __device__ __forceinline__ void take_tile() {
        if (is_widened()) {
            widen_tile();
            next.advance(kTokenGroups);
        } else {
            __syncwarp();  // all lanes have looked
            barrier_arrive_warp(s.raw_k_empty[raw.stage]);  // not the values', see kRawReaders
        }
        raw.advance(1);
        views.advance(1);
        if (kTokenGroups == 2) {
            const Places other = after;
            after = next;
            next = other;
        }
    }
    // As Consumer::attend_tiles decides.
    __device__ __forceinline__ bool is_widened() const {
        if (!kReadsRaw) return true;
        barrier_wait(s.view_full[views.stage], views.parity);
        return warps_with_many(s.view[views.stage]) != 0;
    }
    __device__ __forceinline__ void widen_tile() {
        const Ring<kKeyStages>& keys = next.keys;
        const Ring<kValueStages>& values = next.values;
        Raw k, v;
        take(k, shared_address(s.raw_k[raw.stage]), s.raw_k_full[raw.stage], s.raw_k_empty[raw.stage]);
        take(v, shared_address(s.raw_v[raw.stage]), s.raw_v_full[raw.stage], s.raw_v_empty[raw.stage]);
        barrier_wait(s.k_empty[keys.stage], keys.parity ^ 1);
        store<false>(k, shared_address(s.k[keys.stage]), s.k_full[keys.stage]);
        barrier_wait(s.v_empty[values.stage], values.parity ^ 1);
        store<true>(v, shared_address(s.v[values.stage]), s.v_full[values.stage]);
    }
    // Reads this warp's rows when they have come, and frees their place.
    __device__ __forceinline__ void take(Raw& words, u32 rows, Barrier& full, Barrier& empty) const {
        barrier_wait(full, raw.parity);
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) load_shared(words[pass], rows + place.raw_offset_of(pass));
        __syncwarp();
        barrier_arrive_warp(empty, kRawArrivals / kWidenWarps);
    }
    template <bool kValues>
    __device__ __forceinline__ void store(const Raw& words, u32 tile, Barrier& full) const {
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) {
            u32 chunks[2][4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const u32 word = kValues ? by_columns(words[pass][i]) : words[pass][i];
#pragma unroll
                for (int j = 0; j < 2; ++j) chunks[j][i] = KVElement::to_halves(word, j);
            }
            const u32 to = tile + place.tile_offset(pass);
            store_shared(to, chunks[0][0], chunks[0][1], chunks[0][2], chunks[0][3]);
            store_shared(to ^ 16, chunks[1][0], chunks[1][1], chunks[1][2], chunks[1][3]);
        }
        __syncwarp();
        barrier_arrive_warp(full);
    }
};
