// The consumer warpgroups of a worker: products and softmax, tile after tile, item after item.
#pragma once
#include "worker_output.cuh"

// A bit for each of the block's 16 rows, in a byte for each chunk of a tile.
template <int kBytes>
struct Bits;
template <>
struct Bits<4> { using Type = u32; };
template <>
struct Bits<8> { using Type = u64; };
using Chunks = Bits<kTileChunks>::Type;
constexpr Chunks kEveryChunk = Chunks(0x0101010101010101u);
__device__ __forceinline__ int count_bits(u32 bits) { return __popc(bits); }
__device__ __forceinline__ int count_bits(u64 bits) { return __popcll(bits); }
__device__ __forceinline__ int first_bit(u32 bits) { return __ffs(bits) - 1; }
__device__ __forceinline__ int first_bit(u64 bits) { return __ffsll(bits) - 1; }

// A tile's chunks times the warps that see them, of a warpgroup, up to which its warps attend the tile apart: half of all.
constexpr int kMostApart = kTileChunks * 2;

struct Consumer : Output {
    Ring<kKeyStages> keys;  // the place of this warpgroup's current tile
    Ring<kValueStages> values;
    int tile;               // its number among all that the worker has

    __device__ __forceinline__ Consumer(const WorkParams& p, Shared& s)
        : Output(p, s), tile(kTokenGroups == 2 ? group : 0) {
        keys.advance(tile);
        values.advance(tile);
    }

    __device__ __forceinline__ void run() {
        int end = 0;   // of the item's tiles
        int turn = 0;  // of the items that have tokens
        // The warpgroups write in turn: while one does, the other is at the next item's tiles.
        int writer = 0;
        for (int index = blockIdx.x; index >= 0; writer ^= 1) {
            const WorkItem& item = p.items[index];
            const int next = item.next;
            fetch_ahead(item, next);
            end += ceil_div(item.tokens, kTileTokens);
            rows.reset();
            if (item.tokens > 0) {
                attend_tiles(end, shared_address(s.q[turn % 2]) + row_group * kGroupRows * kPanelRowBytes);
                arrive(s.q_empty[turn % 2]);
                ++turn;
            }
            rows.finish();
            if (kTokenGroups == 2 && group != writer) {
                give();
            } else {
                if (kTokenGroups == 2) receive();
                write(WorkItem(item));
            }
            index = next;
        }
    }

    // Brings near what is needed at the item's end.
    __device__ __forceinline__ void fetch_ahead(const WorkItem& item, int next) const {
        prefetch_item(p.items + max(next, 0));
        if (item.first_request < 0) {
            prefetch(p.request_order + item.first_position + min(rows.first_row / p.group, item.num_requests - 1));
        }
    }
    // A warp's sign that it is done with a place.
    static __device__ __forceinline__ void arrive(Barrier& barrier) {
        if (threadIdx.x % kWarpSize == 0) barrier_arrive(barrier);
    }

    // Attends this warpgroup's tiles of an item: those whose tokens most rows see together, the others warp by warp.
    __device__ __forceinline__ void attend_tiles(int end, u32 queries) {
        while (tile < end) {
            if (seen_together()) {
                attend_together(end, queries);
            } else {
                attend_apart(queries);
            }
        }
    }

    // The chunks of the tile that this warp's rows see, once the tile's keys are there: one bit in eight a chunk.
    __device__ __forceinline__ Chunks chunks_of(int first_warp) const {
        return *reinterpret_cast<const Chunks*>(s.seen_by[keys.view()]) >> first_warp;
    }
    // Whether the warpgroup's products are worth it for the current tile, whose keys it waits for.
    __device__ __forceinline__ bool seen_together() const {
        barrier_wait(s.k_full[keys.stage], keys.parity);
        return count_bits(chunks_of(row_group * 4) & kEveryChunk * 0xf) > kMostApart;
    }

    // Attends tiles up to the next one that is not seen together. The values of a tile are added during the softmax of the
    // next one.
    __device__ __forceinline__ void attend_together(int end, u32 queries) {
        WarpgroupRows::Scores scores;
        start_scores(scores, queries);
        WarpgroupRows::View view = rows.view_of(s.view[keys.view()]);
        products_wait<0>(scores);
        arrive(s.k_empty[keys.stage]);
        weigh(scores, view, [] {});
        Ring<kValueStages> behind = values;  // the tile whose values are still to be added
        advance();
#pragma unroll 1
        while (tile < end && seen_together()) {
            start_scores(scores, queries);
            view = rows.view_of(s.view[keys.view()]);
            start_values(behind);
            products_wait<1>(scores);
            arrive(s.k_empty[keys.stage]);
            weigh(scores, view, [&] { arrive(s.v_empty[behind.stage]); });
            behind = values;
            advance();
        }
        start_values(behind);
        products_wait<0>(rows.o);
        arrive(s.v_empty[behind.stage]);
    }
    // Attends one tile, each warp the chunks that its rows see.
    __device__ __forceinline__ void attend_apart(u32 queries) {
        Chunks mine = chunks_of(row_group * 4 + threadIdx.x % kGroupThreads / kWarpSize) & kEveryChunk;
        barrier_wait(s.v_full[values.stage], values.parity);
#pragma unroll 1
        for (; mine != 0; mine &= mine - 1) {
            rows.attend_chunk(first_bit(mine) / 8, queries, kRows * kPanelRowBytes, shared_address(s.k[keys.stage]),
                              shared_address(s.v[values.stage]), shared_address(s.visible[keys.view()]),
                              ScoreScale{p.sm_scale, p.logit_cap});
        }
        __syncwarp();
        arrive(s.k_empty[keys.stage]);
        arrive(s.v_empty[values.stage]);
        advance();
    }
    __device__ __forceinline__ void start_scores(WarpgroupRows::Scores& scores, u32 queries) {
        fence_shared_async();
        WarpgroupRows::start_scores(scores, queries, kRows * kPanelRowBytes, shared_address(s.k[keys.stage]));
    }
    __device__ __forceinline__ void start_values(const Ring<kValueStages>& place) {
        barrier_wait(s.v_full[place.stage], place.parity);
        fence_shared_async();
        rows.start_values(shared_address(s.v[place.stage]));
    }
    template <typename AfterValues>
    __device__ __forceinline__ void weigh(WarpgroupRows::Scores& scores, const WarpgroupRows::View& view,
                                          const AfterValues& after_values) {
        rows.weigh(scores, view, shared_address(s.visible[keys.view()]), ScoreScale{p.sm_scale, p.logit_cap},
                   after_values);
    }
    __device__ __forceinline__ void advance() {
        tile += kTokenGroups;
        keys.advance(kTokenGroups);
        values.advance(kTokenGroups);
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
        named_arrive(kExchange + group, 2 * kGroupThreads);
    }
    // ... and the other adds it to its own.
    __device__ __forceinline__ void receive() {
        const int thread = threadIdx.x % kGroupThreads;
        named_sync(kExchange + (group ^ 1), 2 * kGroupThreads);
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
