// The producer warps of a worker where K and V are float8: rows come as they are, and are widened on the chip.
#pragma once
#include "worker_producer.cuh"

__device__ __forceinline__ void load_shared(u32 (&words)[4], u32 address) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
}
// Waits until at most `pending` groups of copies are under way, which are kMost at most.
template <int kMost>
__device__ __forceinline__ void wait_copies(int pending) {
    if constexpr (kMost > 0) {
        if (pending < kMost) {
            wait_copies<kMost - 1>(pending);
            return;
        }
    }
    ::wait_copies<kMost>();
}

// From a warp's raw rows to a tile. A lane takes 16 float8 and writes two chunks of a tile's row, which are neighbours
// but for the swizzle. Eight lanes, which the hardware serves together, take half a row (or all of one of 64 bytes) and
// the same of the next: the tile's swizzle then spreads their chunks over all banks. Exchanged halves in odd rows do so
// for what they read.
struct WidenPlace {
    static constexpr int kRowsPerPass = CopyPlace::kRowsPerPass;
    u32 from, to;

    // first_row: of the warp's rows in the tile, a multiple of 8.
    __device__ __forceinline__ WidenPlace(int first_row, int lane) {
        const int chunk = lane % 4, panel = lane / 8 % kPanels;
        const int row = lane / 4 % 2 + lane / (8 * kPanels) * 2;
        from = CopyPlace::offset(row, panel * 4 + chunk);
        to = panel * kPanelBytes + (first_row + row) * kPanelRowBytes + ((chunk * 2) ^ row) * 16;
    }
    static __device__ constexpr u32 raw_offset(int pass) { return pass * kWarpSize * 16; }
    __device__ __forceinline__ u32 tile_offset(int pass) const {
        const int row = pass * kRowsPerPass;
        return (to ^ (row % 8 * 16)) + row * kPanelRowBytes;
    }
};

// A warp's units are its parts of the keys of a tile, of its values, of its next tile's keys and so on. Each is copied to
// the warp's own ring and widened later, so that copies are under way all the time.
struct Float8Producer : Producer {
    static constexpr int kKeyArrivals = kTileWarps, kValueArrivals = kTileWarps;
    static constexpr int kPasses = kWarpTokens / CopyPlace::kRowsPerPass;
    static constexpr int kBatch = min_of(kTileTokens > 64 ? 2 : 4, kPasses);  // passes whose reads are under way together
    static_assert(kPasses % kBatch == 0 && kBatch * CopyPlace::kRowsPerPass % 8 == 0, "batches differ by a constant");
    // Of the base class, `keys` is the place of the next tile to be copied.
    Ring<kKeyStages> wide_keys;  // the places to which the oldest units go
    WidenPlace widen;
    int units = 0;   // in the ring
    int newest = 0;  // the place of the next unit in it
    int oldest = 0;
    bool oldest_is_values = false;

    __device__ __forceinline__ Float8Producer(const WorkParams& p, Shared& s)
        : Producer(p, s), widen(part * kWarpTokens, lane) {
        wide_keys.advance(tile);
    }

    __device__ __forceinline__ void run() {
        int turn = 0, first = 0;  // see Producer
        for (int index = blockIdx.x; index >= 0;) {
            const WorkItem item = p.items[index];
            if (item.tokens > 0) {
                // Consumers may still be at the item before the last, and want units of it.
                while (!queries_free(turn)) {
                    if (units > 0) widen_oldest();
                }
                load_queries(item, turn % 2, turn / 2 % 2);
                load_tiles(item, first);
                first += ceil_div(item.tokens, kTileTokens);
                ++turn;
            }
            index = item.next;
        }
        while (units > 0) widen_oldest();
    }

    __device__ __forceinline__ void load_tiles(const WorkItem& item, int first) {
        choose_head(item.kv_head);
        SegmentStream segments(p, item, lane);
        Places places;
#pragma unroll 1
        for (int begin = (tile - first) * kTileTokens; begin < item.tokens; begin += kTilesAtATime * kTileTokens) {
#pragma unroll 1
            for (int unit = 0; unit < 2; ++unit) {  // keys, then values
                if (units == kRawUnits) widen_oldest();
                if (unit == 0) {
                    places = find(segments, begin, item.tokens);
                    note(places, item.num_requests * p.group);
                }
                copy(places, raw(newest), unit == 0 ? k : v, unit == 0 ? k_stride : v_stride);
                commit_copies();
                newest = newest + 1 == kRawUnits ? 0 : newest + 1;
                ++units;
            }
            tile += kTilesAtATime;
            keys.advance(kTilesAtATime);
        }
    }
    __device__ __forceinline__ u32 raw(int place) const { return shared_address(s.raw[warp][place]); }

    // Whether the place of this item's queries is free; for the whole warp.
    __device__ __forceinline__ bool queries_free(int turn) const {
        return __all_sync(0xffffffffu, barrier_test(s.q_empty[turn % 2], turn / 2 % 2 ^ 1));
    }

    // Waits for the oldest unit and for its place in the tiles, and hands it on. Consumers fence what they read, as they do
    // for tiles that come by themselves: a fence here would wait for the copies.
    __device__ __forceinline__ void widen_oldest() {
        const bool is_values = oldest_is_values;
        wait_copies<kRawUnits - 1>(units - 1);
        __syncwarp();  // lanes read what others copied
        if (is_values) {
            barrier_wait(s.v_empty[values.stage], values.parity ^ 1);
            widen_rows<ValueElement>(raw(oldest), shared_address(s.v[values.stage]));
        } else {
            barrier_wait(s.k_empty[wide_keys.stage], wide_keys.parity ^ 1);
            widen_rows<Element>(raw(oldest), shared_address(s.k[wide_keys.stage]));
        }
        __syncwarp();  // all lanes have read and written their rows; with keys, the tile's view is written too
        if (lane == 0) barrier_arrive(is_values ? s.v_full[values.stage] : s.k_full[wide_keys.stage]);
        if (is_values) {
            values.advance(kTilesAtATime);
        } else {
            wide_keys.advance(kTilesAtATime);
        }
        oldest_is_values = !is_values;
        oldest = oldest + 1 == kRawUnits ? 0 : oldest + 1;
        --units;
    }
    template <typename To>
    __device__ __forceinline__ void widen_rows(u32 rows, u32 tile) const {
#pragma unroll 1
        for (int done = 0; done < kPasses; done += kBatch) {
            u32 words[kBatch][4];
#pragma unroll
            for (int pass = 0; pass < kBatch; ++pass) load_shared(words[pass], rows + widen.from + widen.raw_offset(pass));
#pragma unroll
            for (int pass = 0; pass < kBatch; ++pass) {
                const u32 to = tile + widen.tile_offset(pass);
                store_widened<To>(to, to ^ 16, words[pass]);
            }
            rows += widen.raw_offset(kBatch);
            tile += kBatch * CopyPlace::kRowsPerPass * kPanelRowBytes;
        }
    }
};
