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

// A warp's units are its shares of the keys of a tile, of its values, of the next one's keys and so on. Each is copied
// to the warp's own ring and widened later, so that copies are under way all the time.
struct Float8Producer : Producer {
    static constexpr int kKeyArrivals = kProducerWarps, kValueArrivals = kProducerWarps;
    static constexpr int kRawTiles = kRawUnits / 2;
    static_assert(kRawUnits % 2 == 0, "the ring holds as many units of keys as of values");
    static constexpr int kPasses = kWarpTokens / CopyPlace::kRowsPerPass;
    // Passes whose reads are under way together; with 128 tokens registers are few.
    static constexpr int kBatch = min_of(kTileTokens > 64 ? 2 : 4, kPasses);
    static_assert(kPasses % kBatch == 0 && kBatch * CopyPlace::kRowsPerPass % 8 == 0, "batches differ by a constant");
    // Of the base class, `keys` is the place of the next tile to be copied, `values` of the next to be widened.
    Ring<kKeyStages> wide_keys;
    WidenPlace widen;
    int tiles = 0;   // in the ring of units
    int newest = 0;  // the place there of the next tile to be copied, in tiles
    int oldest = 0;

    __device__ __forceinline__ Float8Producer(const WorkParams& p, Shared& s)
        : Producer(p, s), widen(warp * kWarpTokens, lane) {}

    // Item after item, and then, with nothing left to copy, what is still to be widened.
    __device__ __forceinline__ void run() {
        int turn = 0;  // see Producer
        for (int index = blockIdx.x;;) {
            const WorkItem item = p.items[max(index, 0)];
            const int tokens = index >= 0 ? item.tokens : 0;
            choose_head(item.kv_head);
            const QueryRow query(p, item, warp * kWarpRows + lane % kWarpRows);
            SegmentStream segments(p, item, lane);
            int begin = 0;
#pragma unroll 1
            while (begin < tokens || (index < 0 && tiles > 0)) {
                // Consumers may still be at the item before the last, and want tiles of it.
                const bool copies = begin > 0 || (tokens > 0 && queries_free(turn));
                const bool widens = tiles == kRawTiles || (!copies && tiles > 0);
                step(copies, widens, item, segments, query, begin, turn);
                if (copies) begin += kTileTokens;
            }
            if (index < 0) return;
            if (tokens > 0) ++turn;
            index = item.next;
        }
    }

    // Whether the place of this item's queries is free; for the whole warp.
    __device__ __forceinline__ bool queries_free(int turn) const {
        return __all_sync(0xffffffffu, barrier_test(s.q_empty[turn % 2], turn / 2 % 2 ^ 1));
    }

    // Widens the oldest tile, copies the next one, or both, unit by unit.
    __device__ __forceinline__ void step(bool copies, bool widens, const WorkItem& item, SegmentStream& segments,
                                         const QueryRow& query, int begin, int turn) {
        Share share;
        if (widens) widen_unit<Element>(2 * oldest, 2 * tiles - 1, wide_keys, s.k_empty, s.k_full, s.k);
        if (copies) {
            share = lay_out(item, segments, begin, min(begin + kTileTokens, item.tokens));
            copy_share(share, raw(2 * newest), k, k_stride);
            if (begin == 0) load_queries(query, turn % 2);
            commit_copies();
        }
        if (widens) {
            widen_unit<ValueElement>(2 * oldest + 1, 2 * tiles - (copies ? 1 : 2), values, s.v_empty, s.v_full, s.v);
            oldest = oldest + 1 == kRawTiles ? 0 : oldest + 1;
            --tiles;
        }
        if (copies) {
            copy_share(share, raw(2 * newest + 1), v, v_stride);
            commit_copies();
            newest = newest + 1 == kRawTiles ? 0 : newest + 1;
            keys.advance(1);
            ++tiles;
        }
    }
    __device__ __forceinline__ u32 raw(int unit) const { return shared_address(s.raw[warp][unit]); }

    // Waits for a unit, after which at most `pending` were copied, and for its place in a tile, and hands it on. Consumers
    // fence what they read, as they do for tiles that come by themselves: a fence here would wait for the copies.
    template <typename To, int kStages>
    __device__ __forceinline__ void widen_unit(int unit, int pending, Ring<kStages>& ring, Barrier (&empty)[kStages],
                                               Barrier (&full)[kStages], unsigned char (&to)[kStages][kTileBytes]) {
        wait_copies<kRawUnits - 1>(pending);
        __syncwarp();  // lanes read what others copied
        barrier_wait(empty[ring.stage], ring.parity ^ 1);
        widen_rows<To>(raw(unit), shared_address(to[ring.stage]));
        __syncwarp();  // all lanes have read and written their rows; with keys, the tile's view is written too
        if (lane == 0) barrier_arrive(full[ring.stage]);
        ring.advance(1);
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
