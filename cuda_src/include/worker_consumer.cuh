// The consumer warpgroups of a worker: products and softmax, tile after tile, item after item.
#pragma once
#include "worker_output.cuh"
#include "worker_queries.cuh"

// A byte for each chunk of a tile, in it a bit for each 16 of the block's rows.
template <int kBytes>
struct Bytes;
template <>
struct Bytes<4> {
    using Type = u32;
    static __device__ __forceinline__ int first(u32 bits) { return __ffs(bits) - 1; }
};
template <>
struct Bytes<8> {
    using Type = u64;
    static __device__ __forceinline__ int first(u64 bits) { return __ffsll(bits) - 1; }
};
using ChunkBits = Bytes<kTileChunks>;
using Chunks = ChunkBits::Type;
constexpr Chunks kEveryChunk = Chunks(0x0101010101010101u);

struct Consumer : Output {
    Ring<kKeyStages> keys;  // the place of this warpgroup's current tile
    Ring<kValueStages> values;
#if defined(FT_KV_ELEMENT)
    Ring<kRawStages> raw;  // that of its rows as they came; only tiles that are widened have one among keys and values
    Ring<kViewPlaces> views;
#endif
    int tile;               // its number among all that the worker has
    float keys_scale;       // of the item's KV head

    __device__ __forceinline__ Consumer(const WorkParams& p, Shared& s)
        : Output(p, s), tile(kTokenGroups == 2 ? group : 0) {
        keys.advance(tile);
        values.advance(tile);
#if defined(FT_KV_ELEMENT)
        raw.advance(tile);
        views.advance(tile);
#endif
    }

    // Waits until the barriers are set up, and copies the first item's queries where that falls to consumers.
    __device__ __forceinline__ void begin() const {
        if constexpr (kConsumersCopyFirst) {
            const WorkItem item = p.items[blockIdx.x];  // on its way meanwhile
            named_sync(kEveryone, kThreads);
            if (uniform(item.tokens) == 0) return;
            copy_queries<kRows / kConsumerWarps>(p, s, item, 0, uniform(threadIdx.x / kWarpSize));
            arrive_after_copies(shared_address(&s.q_full[0]));
        } else {
            named_sync(kEveryone, kThreads);
        }
    }

    __device__ __forceinline__ void run() {
        begin();
        int end = 0;    // of the item's tiles
        int turn = 0;   // of the items that have tokens
        int count = 0;  // of items
        for (int index = blockIdx.x; index >= 0; ++count) {
            const WorkItem& item = p.items[index];
            fetch_ahead(item);
            keys_scale = key_scale(p, item.kv_head);
            const int tokens = uniform(item.tokens);
            end += ceil_div(tokens, kTileTokens);
            rows.reset();
            if (tokens > 0) {
                const int slot = turn % kQuerySlots;
                barrier_wait(queries_ready(s, slot), turn / kQuerySlots % 2);
                attend_tiles(end, shared_address(s.q[slot]) + row_group * kGroupRows * kPanelRowBytes);
                barrier_arrive_warp(s.q_empty[slot]);
                ++turn;
            }
            rows.finish();
            const int next = uniform(item.next);
            // The warpgroups write in turn: while one does, the other is at the next item's tiles.
            if (kTokenGroups == 2 && group != count % 2) {
                give();
            } else {
                if (kTokenGroups == 2) receive(count / 2 % 2);
                write(WorkItem(item));
            }
            index = next;
        }
    }

    // Brings near what is needed at the item's end. By one warp and only where there is such an item: threads ask one by one,
    // and thousands that ask for one line keep its part of the L2 cache from everybody else. Four lanes share a row.
    __device__ __forceinline__ void fetch_ahead(const WorkItem& item) const {
        if (item.next >= 0 && threadIdx.x < kWarpSize) prefetch_item(p.items + item.next);
        if (item.first_request < 0 && threadIdx.x % 4 == 0) {
            prefetch(p.request_order + item.first_position + min(rows.first_row / p.group, item.num_requests - 1));
        }
    }

    // Attends this warpgroup's tiles of an item: those whose tokens most rows see together, the others warp by warp.
    __device__ __forceinline__ void attend_tiles(int end, u32 queries) {
        while (tile < end) {
            if (seen_together()) {
                attend_together(end, queries);
#if defined(FT_KV_ELEMENT)
            } else if (kReadsRaw) {
                attend_raw(queries);
#endif
            } else {
                attend_apart(queries);
            }
        }
    }

#if defined(FT_KV_ELEMENT)
    __device__ __forceinline__ int view_place() const { return views.stage; }
#else
    __device__ __forceinline__ int view_place() const { return keys.of_two_laps(); }
#endif
    __device__ __forceinline__ const TileView& view() const { return s.view[view_place()]; }
    __device__ __forceinline__ u32 visible() const { return shared_address(s.visible[view_place()]); }
    // Who sees the current tile's chunks: the block's rows from 16 * `first` on come first in each byte.
    __device__ __forceinline__ Chunks seen_by(int first) const {
        return *reinterpret_cast<const Chunks*>(view().seen_by) >> first;
    }
    // The chunks that this warp's rows see.
    __device__ __forceinline__ Chunks own_chunks() const { return seen_by(rows.first_row / kChunkRows) & kEveryChunk; }
    // Whether all of this warp's rows see all of the current tile.
    __device__ __forceinline__ bool sees_whole() const {
        u32 whole = view().whole[0];
#pragma unroll
        for (int part = 1; part < kTileWarps; ++part) whole &= view().whole[part];
        return (whole >> rows.first_row / kChunkRows & 1) != 0;
    }
    // Whether the warpgroup's products are worth it for the current tile, whose view it waits for, which comes with 16-bit
    // keys.
    __device__ __forceinline__ bool seen_together() const {
#if defined(FT_KV_ELEMENT)
        barrier_wait(s.view_full[views.stage], views.parity);
#else
        barrier_wait(s.k_full[keys.stage], keys.parity);
#endif
        return __any_sync(0xffffffffu, (warps_with_many(view()) >> row_group * 16 & 0xffff) != 0);
    }

    // Attends tiles up to the next one that is not seen together. The values of a tile are added during the softmax of the
    // next one. Their place is not kept but found anew: only so the compiler sees that it is the same in all lanes.
    __device__ __forceinline__ void attend_together(int end, u32 queries) {
        WarpgroupRows::Scores scores;
        start_scores(scores, queries);
        const bool first_whole = sees_whole();
        products_wait<0>(scores);
        barrier_arrive_warp(s.k_empty[keys.stage]);
        weigh(scores, first_whole, [] {});
        advance();
#pragma unroll 1
        while (tile < end && seen_together()) {
            start_scores(scores, queries);
            const bool whole = sees_whole();
            const Ring<kValueStages> behind = values.before(kTokenGroups);
            start_values(behind);
            products_wait<1>(scores);
            barrier_arrive_warp(s.k_empty[keys.stage]);
            weigh(scores, whole, [&] { barrier_arrive_warp(s.v_empty[behind.stage]); });
            advance();
        }
        const Ring<kValueStages> behind = values.before(kTokenGroups);
        start_values(behind);
        products_wait<0>(rows.o);
        barrier_arrive_warp(s.v_empty[behind.stage]);
    }
    // Attends one tile, each warp the chunks that its rows see.
    __device__ __forceinline__ void attend_apart(u32 queries) {
        Chunks mine = own_chunks();
        if (kFloat8) barrier_wait(s.k_full[keys.stage], keys.parity);
        barrier_wait(s.v_full[values.stage], values.parity);
#pragma unroll 1
        for (; mine != 0; mine &= mine - 1) {
            const int chunk = ChunkBits::first(mine) / 8;
            const auto place =
                WarpgroupRows::chunk_of(chunk, shared_address(s.k[keys.stage]), shared_address(s.v[values.stage]));
            rows.attend_chunk(place, queries, kRows * kPanelRowBytes, visible() + chunk * kChunkTokens * 2, to_score(),
                              [] {});
        }
        __syncwarp();
        barrier_arrive_warp(s.k_empty[keys.stage]);
        barrier_arrive_warp(s.v_empty[values.stage]);
        advance();
    }
#if defined(FT_KV_ELEMENT)
    // The same for a tile of float8 rows as they came. The keys' place is given back when the values have come, too: so who
    // has seen the next keys in this place knows that the phase of the values before is over.
    __device__ __forceinline__ void attend_raw(u32 queries) {
        Barrier &values_full = s.raw_v_full[raw.stage], &keys_empty = s.raw_k_empty[raw.stage];
        Chunks mine = own_chunks();
        const u32 place = RawChunk::place(threadIdx.x % kWarpSize);
        const u32 raw_keys = shared_address(s.raw_k[raw.stage]) + place;
        const u32 raw_values = shared_address(s.raw_v[raw.stage]) + place;
        barrier_wait(s.raw_k_full[raw.stage], raw.parity);
        if (mine == 0) {
            barrier_wait(values_full, raw.parity);
            __syncwarp();  // all lanes have seen these phases
            barrier_arrive_warp(keys_empty);
        }
#pragma unroll 1
        while (mine != 0) {
            const int chunk = ChunkBits::first(mine) / 8;
            const u32 tokens = chunk * kChunkTokens * kHeadDim;
            mine &= mine - 1;
            rows.attend_chunk(RawChunk{raw_keys + tokens, raw_values + tokens}, queries, kRows * kPanelRowBytes,
                              visible() + chunk * kChunkTokens * 2, to_score(), [&] {
                                  barrier_wait(values_full, raw.parity);
                                  if (mine == 0) barrier_arrive_warp(keys_empty);
                              });
        }
        __syncwarp();
        barrier_arrive_warp(s.raw_v_empty[raw.stage], kRawArrivals / kRawReaders);
        advance_view();
    }
#endif
    __device__ __forceinline__ void start_scores(WarpgroupRows::Scores& scores, u32 queries) {
        if (kFloat8) barrier_wait(s.k_full[keys.stage], keys.parity);
        fence_shared_async();
        WarpgroupRows::start_scores(scores, tile_address(queries), kRows * kPanelRowBytes,
                                    tile_address(shared_address(s.k[keys.stage])));
    }
    __device__ __forceinline__ void start_values(const Ring<kValueStages>& place) {
        barrier_wait(s.v_full[place.stage], place.parity);
        fence_shared_async();
        rows.start_values(tile_address(shared_address(s.v[place.stage])));
    }
    // The address of a tile, for a product. With one row group the compiler does not see that it is the same in all lanes.
    static __device__ __forceinline__ u32 tile_address(u32 address) {
        return kTokenGroups == 2 ? uniform(address) : address;
    }
    template <typename AfterValues>
    __device__ __forceinline__ void weigh(WarpgroupRows::Scores& scores, bool whole,
                                          const AfterValues& after_values) {
        rows.weigh(scores, whole, visible(), to_score(), after_values);
    }
    __device__ __forceinline__ ScoreScale to_score() const { return {p.sm_scale * keys_scale, p.logit_cap}; }
    __device__ __forceinline__ void advance() {
        keys.advance(kTokenGroups);
        values.advance(kTokenGroups);
        advance_view();
    }
    __device__ __forceinline__ void advance_view() {
        tile += kTokenGroups;
#if defined(FT_KV_ELEMENT)
        raw.advance(kTokenGroups);
        views.advance(kTokenGroups);
#endif
    }

    // One token group leaves its state in shared memory, in the order of the accumulators. It has taken what was there
    // before: it was the last to receive.
    __device__ __forceinline__ void give() {
        const int thread = threadIdx.x % kGroupThreads;
        __syncwarp();
#pragma unroll
        for (int i = 0; i < kOutputs; ++i) s.exchange[i * kGroupThreads + thread] = rows.o[i];
        if (thread % 4 == 0) {
#pragma unroll
            for (int half = 0; half < 2; ++half) s.exchange_state[rows.first_row + half * 8] = rows.state[half];
        }
        __syncwarp();
        barrier_arrive_warp(s.given[group]);
    }
    // ... and the other adds it to its own.
    __device__ __forceinline__ void receive(int parity) {
        const int thread = threadIdx.x % kGroupThreads;
        barrier_wait(s.given[group ^ 1], parity);
        float own[2], other[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const SoftmaxState given = s.exchange_state[rows.first_row + half * 8];
            SoftmaxState total;
            total.m = fmaxf(rows.state[half].m, given.m);
            own[half] = total.weight(rows.state[half].m);
            other[half] = total.weight(given.m);
            total.l = rows.state[half].l * own[half] + given.l * other[half];
            rows.state[half] = total;
        }
#pragma unroll
        for (int i = 0; i < kOutputs; ++i) {
            rows.o[i] = rows.o[i] * own[i / 2 % 2] + s.exchange[i * kGroupThreads + thread] * other[i / 2 % 2];
        }
    }
};
