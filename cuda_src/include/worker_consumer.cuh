// The consumer warpgroups of a worker: products and softmax, tile after tile, item after item.
#pragma once
#include "worker_output.cuh"

struct Consumer : Output {
    Ring<kKeyStages> keys;  // the place of this warpgroup's current tile
    Ring<kValueStages> values;
    int tile;               // its number among all that the worker has
    float keys_scale;       // of the item's KV head

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
        if (kRowGroups == 2 && group == 1) named_arrive(kTurn, 2 * kGroupThreads);
        for (int index = blockIdx.x; index >= 0; writer ^= 1) {
            const WorkItem& item = p.items[index];
            const int next = item.next;
            fetch_ahead(item, next);
            keys_scale = key_scale(p, item.kv_head);
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

    // Attends this warpgroup's tiles of an item. The values of a tile are added during the softmax of the next one.
    __device__ __forceinline__ void attend_tiles(int end, u32 queries) {
        if (tile >= end) return;
        WarpgroupRows::Scores scores;
        start_scores(scores, queries);
        WarpgroupRows::View view = rows.view_of(s.view[keys.view()]);
        products_wait<0>(scores);
        arrive(s.k_empty[keys.stage]);
        weigh(scores, view, [] {});
        Ring<kValueStages> behind = values;  // the tile whose values are still to be added
        advance();
#pragma unroll 1
        while (tile < end) {
            if (kRowGroups == 2) named_sync(kTurn + group, 2 * kGroupThreads);
            start_scores(scores, queries);
            view = rows.view_of(s.view[keys.view()]);
            start_values(behind);
            if (kRowGroups == 2) named_arrive(kTurn + (group ^ 1), 2 * kGroupThreads);
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
    __device__ __forceinline__ void start_scores(WarpgroupRows::Scores& scores, u32 queries) {
        barrier_wait(s.k_full[keys.stage], keys.parity);
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
        rows.weigh(scores, view, shared_address(s.visible[keys.view()]), ScoreScale{p.sm_scale * keys_scale, p.logit_cap},
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
