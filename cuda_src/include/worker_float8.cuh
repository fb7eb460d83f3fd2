// The rows of K and V of a worker where they are float8: producer warps gather them as they come into rings of their
// own, and further warps widen them into the tiles that consumers read.
#pragma once
#include "worker_producer.cuh"

// Where a lane writes when a warp copies float8 rows of kCopyChunks chunks of 16 bytes, 512 bytes a pass. Chunks of rows of
// 128 bytes are swizzled by the row's number modulo 8, as bulk copies do it.
struct RawPlace {
    static constexpr int kRowsPerPass = kWarpSize / kCopyChunks;
    static constexpr bool kSwizzled = kCopyChunks == 8;
    u32 lane_offset;

    // first_row: of the warp's rows in the tile, a multiple of 8.
    __device__ __forceinline__ RawPlace(int first_row, int lane)
        : lane_offset(offset(first_row + lane / kCopyChunks, lane % kCopyChunks)) {}

    static __device__ __forceinline__ u32 offset(int row, int chunk) {
        return row * kHeadDim + (chunk ^ (kSwizzled ? row % 8 : 0)) * 16;
    }
    __device__ __forceinline__ u32 offset(int pass) const {
        return (lane_offset ^ (kSwizzled ? pass * kRowsPerPass % 8 * 16 : 0)) + pass * kWarpSize * 16;
    }
};

// The rings that producer warps gather float8 rows into.
struct RawRings {
    using Place = RawPlace;
    static constexpr int kRowBytes = kHeadDim;
    static constexpr int kBoxes = kHeadDim == kPanelRowBytes ? 1 : 0;  // for 16 tokens; rows of 64 bytes come without
    Shared& s;
    Ring<kRawStages> raw;
    Ring<kKeyStages> keys;  // where the tile is widened to: its view is at the same place for all warps

    static __device__ __forceinline__ void init(Shared& s) {
        barrier_init(s.raw_k_full, kKeyArrivals);
        barrier_init(s.raw_v_full, kValueArrivals);
        barrier_init(s.raw_k_empty, kWidenWarps * kWarpArrivals);
        barrier_init(s.raw_v_empty, kWidenWarps * kWarpArrivals);
        barrier_init(s.k_full, kWidenWarps * kWarpArrivals);
        barrier_init(s.v_full, kWidenWarps * kWarpArrivals);
        barrier_init(s.q_converted, kWidenWarps * kWarpArrivals);
    }
    __device__ __forceinline__ Slot key_slot() const { return slot_of(s.raw_k, s.raw_k_full, s.raw_k_empty, raw); }
    __device__ __forceinline__ Slot value_slot() const { return slot_of(s.raw_v, s.raw_v_full, s.raw_v_empty, raw); }
    __device__ __forceinline__ int view() const { return keys.view(); }
    __device__ __forceinline__ void advance(int by) {
        raw.advance(by);
        keys.advance(by);
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
    static constexpr bool kSwizzled = RawPlace::kSwizzled;
    u32 from, to;

    // first_row: of the warp's rows, a multiple of 8.
    __device__ __forceinline__ WidenPlace(int first_row, int lane) {
        const int chunk = lane % 4, panel = lane / 8 % kPanels, second = lane / 4 % 2;
        const int row = kSwizzled ? lane / 16 ^ second * 5 : second + lane / 8 * 2;
        from = RawPlace::offset(first_row + row, panel * 4 + chunk);
        to = panel * kPanelBytes + (first_row + row) * kPanelRowBytes + ((chunk * 2) ^ row) * 16;
    }
    // Rows of a pass are these many further on, of which those modulo 8 swizzle.
    static constexpr __device__ int row_of(int pass) { return kSwizzled ? pass / 2 * 8 + pass % 2 * 2 : pass * kRowsPerPass; }
    __device__ __forceinline__ u32 raw_offset(int pass) const {
        return (from ^ (kSwizzled ? row_of(pass) % 8 * 16 : 0)) + row_of(pass) * kHeadDim;
    }
    __device__ __forceinline__ u32 tile_offset(int pass) const {
        return (to ^ (row_of(pass) % 8 * 16)) + row_of(pass) * kPanelRowBytes;
    }
};

// A warp that widens its quarter of every tile. It holds the rows of a tile in registers, so that their place is free for
// others while it waits for one among the tiles. Consumers fence what they read, as they do for tiles that come by
// themselves.
struct Widener {
    static constexpr int kRowsOfWarp = kTileTokens / kWidenWarps;
    static constexpr int kPasses = kRowsOfWarp / WidenPlace::kRowsPerPass;
    static_assert(kRowsOfWarp % 8 == 0, "whole turns of the swizzle, see WidenPlace");
    using Raw = u32[kPasses][4];
    const WorkParams& p;
    Shared& s;
    WidenPlace place;
    Ring<kRawStages> raw;
    Ring<kKeyStages> keys;
    Ring<kValueStages> values;

    __device__ __forceinline__ Widener(const WorkParams& p, Shared& s)
        : p(p), s(s),
          place((threadIdx.x / kWarpSize - kConsumerWarps - kProducerWarps) * kRowsOfWarp, threadIdx.x % kWarpSize) {}

    __device__ __forceinline__ void run() {
        named_sync(kEveryone, kThreads);
        int turn = 0;  // of the items that have tokens
        for (int index = blockIdx.x; index >= 0;) {
            const int tiles = ceil_div(p.items[index].tokens, kTileTokens);
            index = p.items[index].next;
            if (kConvertsQueries && tiles > 0) convert_queries(turn++);
#pragma unroll 1
            for (int tile = 0; tile < tiles; ++tile) widen_tile();
        }
    }

    // Turns an item's queries into float16 where they lie.
    __device__ __forceinline__ void convert_queries(int turn) {
        const int slot = turn % kQuerySlots, thread = threadIdx.x % (kWidenWarps * kWarpSize);
        barrier_wait(s.q_full[slot], turn / kQuerySlots % 2);
#pragma unroll 4
        for (int chunk = thread; chunk < kQueryBytes / 16; chunk += kWidenWarps * kWarpSize) {
            const u32 at = shared_address(s.q[slot]) + chunk * 16;
            u32 pairs[4];
            load_shared(pairs, at);
#pragma unroll
            for (int i = 0; i < 4; ++i) pairs[i] = BFloat16::to_halves(pairs[i]);
            store_shared(at, pairs[0], pairs[1], pairs[2], pairs[3]);
        }
        __syncwarp();
        barrier_arrive_warp(s.q_converted[slot]);
    }

    __device__ __forceinline__ void widen_tile() {
        Raw k, v;
        take(k, shared_address(s.raw_k[raw.stage]), s.raw_k_full[raw.stage], s.raw_k_empty[raw.stage]);
        take(v, shared_address(s.raw_v[raw.stage]), s.raw_v_full[raw.stage], s.raw_v_empty[raw.stage]);
        barrier_wait(s.k_empty[keys.stage], keys.parity ^ 1);
        store<ProductElement>(k, shared_address(s.k[keys.stage]), s.k_full[keys.stage]);
        barrier_wait(s.v_empty[values.stage], values.parity ^ 1);
        store<ProductElement>(v, shared_address(s.v[values.stage]), s.v_full[values.stage]);
        raw.advance(1);
        keys.advance(1);
        values.advance(1);
    }
    // Reads this warp's rows when they have come, and frees their place.
    __device__ __forceinline__ void take(Raw& words, u32 rows, Barrier& full, Barrier& empty) const {
        barrier_wait(full, raw.parity);
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) load_shared(words[pass], rows + place.raw_offset(pass));
        __syncwarp();
        barrier_arrive_warp(empty);
    }
    template <typename To>
    __device__ __forceinline__ void store(const Raw& words, u32 tile, Barrier& full) const {
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) {
            const u32 to = tile + place.tile_offset(pass);
            store_widened<To>(to, to ^ 16, words[pass]);
        }
        __syncwarp();
        barrier_arrive_warp(full);
    }
};
