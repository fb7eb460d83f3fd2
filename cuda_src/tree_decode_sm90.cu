// Grid (workers), block 384 threads, one a multiprocessor: a worker's items of a balanced plan, one after the other.
//
// Four producer warps gather the tokens of item after item into rings of tiles; two warpgroups attend them, 64 query
// rows each. The rings run ahead over the ends of items, so that these cost no bandwidth. With one row group the
// warpgroups take turns at the tiles and are merged at the item's end; with two, each has its own rows of every tile.
// The worker that finishes the last piece of some rows merges their pieces, or all that end with it do so together.
#include "barrier.cuh"
#include "kv_tile.cuh"
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
constexpr int kSliceOutputs = 8;               // of a thread's accumulators, when workers merge together
constexpr int kSlices = kOutputs / kSliceOutputs;
constexpr int kPiecesAtATime = 8;

static_assert(kRowGroups == 1 || kRowGroups == 2, "two warpgroups split rows or tokens");
static_assert(kValueStages > kTokenGroups, "each warpgroup holds the values of a tile while it waits for the next one");
static_assert(kWarpTokens <= kWarpSize && kWarpRows <= kWarpSize, "a lane holds one row's place");

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

// An item's runs of tokens in order. A warp holds 32 segments, one a lane; at first but the one that came with the item.
// The next 32 are on their way, though not to registers: a loop that carries what is being loaded waits for it.
struct SegmentStream {
    const WorkParams& p;
    int next;        // index of this lane's segment among those that follow
    Segment held;
    int held_begin;  // of this lane's segment: its first token's number in the item,
    int held_end;    // and the end

    __device__ __forceinline__ SegmentStream(const WorkParams& p, const WorkItem& item, int lane)
        : p(p), next(item.next_segment + lane), held(item.first), held_begin(lane == 0 ? 0 : item.first.kv_len),
          held_end(item.first.kv_len) {
        prefetch(following());
    }
    __device__ __forceinline__ const Segment* following() const { return p.segments + min(next, p.num_segments - 1); }

    // Goes on to the segments whose tokens are numbered from `begin` on.
    __device__ __forceinline__ void advance(int begin, int lane) {
        held = *following();
        next += kWarpSize;
        prefetch(following());
        u32 sum = held.kv_len;
#pragma unroll
        for (int distance = 1; distance < kWarpSize; distance *= 2) {
            const u32 before = __shfl_up_sync(0xffffffffu, sum, distance);
            // What follows the item's last segment may add up to anything.
            if (lane >= distance) sum = min(sum + before, 0x7fffffffu);
        }
        held_end = int(min(begin + sum, 0x7fffffffu));
        held_begin = held_end - held.kv_len;
    }
    // The number of the first token after the held segments.
    __device__ __forceinline__ int end() const { return __shfl_sync(0xffffffffu, held_end, kWarpSize - 1); }
    // A token's row of K and V less its number, and who sees it.
    __device__ __forceinline__ int shift() const { return held.kv_begin - held_begin; }
    __device__ __forceinline__ int visible() const { return held.row_begin | (held.row_end - held.row_begin) << 8; }

    // The lane whose segment holds a token; the last lane where none does.
    __device__ __forceinline__ int find(int token) const {
        int found = 0;
#pragma unroll
        for (int step = kWarpSize / 2; step > 0; step /= 2) {
            if (__shfl_sync(0xffffffffu, held_end, found + step - 1) <= token) found += step;
        }
        return found;
    }
};

// Where a row of an item's queries and outputs lies.
struct QueryRow {
    bool valid;
    int head;
    i64 request;

    __device__ __forceinline__ QueryRow(const WorkParams& p, const WorkItem& item, int row)
        : valid(row < item.num_requests * p.group), head(item.kv_head * p.group + row % p.group) {
        const int in_item = valid ? row / p.group : 0;
        request = item.first_request >= 0 ? item.first_request + in_item : p.request_order[item.first_position + in_item];
    }
};

// A warp that gathers its share of every tile.
struct Producer {
    using Place = PanelPlace<kTileTokens, kChunks>;
    const WorkParams& p;
    Shared& s;
    int warp, lane;
    Ring<kKeyStages> keys;  // the places of the next tile
    Ring<kValueStages> values;
    Place place;
    i64 k, v;  // addresses of this lane's chunk of row 0, for the item's KV head
    int k_stride, v_stride;  // bytes

    // This warp's share of a tile.
    struct Share {
        int count;  // tokens; the rest is zero
        int row;    // of K and V: the token's that this lane knows
        int run;    // where all rows follow one another: the first; else -1
    };

    __device__ __forceinline__ Producer(const WorkParams& p, Shared& s)
        : p(p), s(s), warp(threadIdx.x / kWarpSize - kConsumerWarps), lane(threadIdx.x % kWarpSize),
          place(warp * kWarpTokens, lane), k_stride(int(p.k_stride_token) * 2), v_stride(int(p.v_stride_token) * 2) {}

    __device__ __forceinline__ void run() {
        // Turns count the items that have tokens: only there do consumers wait for producers, and a barrier's parity does
        // not tell a phase from the one after the next.
        int turn = 0;
        for (int index = blockIdx.x; index >= 0;) {
            const WorkItem item = p.items[index];
            if (item.tokens > 0) {
                barrier_wait(s.q_empty[turn % 2], turn / 2 % 2 ^ 1);
                load_item(item, turn % 2);
                ++turn;
            }
            index = item.next;
        }
    }

    __device__ __forceinline__ void load_item(const WorkItem& item, int slot) {
        const QueryRow query(p, item, warp * kWarpRows + lane % kWarpRows);
        k = i64(p.k + item.kv_head * p.k_stride_head + lane % kChunks * 8);
        v = i64(p.v + item.kv_head * p.v_stride_head + lane % kChunks * 8);
        SegmentStream segments(p, item, lane);
#pragma unroll 1
        for (int begin = 0; begin < item.tokens; begin += kTileTokens) {
            barrier_wait(s.k_empty[keys.stage], keys.parity ^ 1);
            const Share share = lay_out(item, segments, begin, min(begin + kTileTokens, item.tokens));
            copy_share(share, s.k[keys.stage], k, k_stride);
            if (begin == 0) load_queries(query, slot);
            __syncwarp();  // the tile's view is written
            arrive_after_copies(shared_address(&s.k_full[keys.stage]));
            if (lane == 0) barrier_arrive(s.k_full[keys.stage]);
            barrier_wait(s.v_empty[values.stage], values.parity ^ 1);
            copy_share(share, s.v[values.stage], v, v_stride);
            arrive_after_copies(shared_address(&s.v_full[values.stage]));
            keys.advance(1);
            values.advance(1);
        }
    }

    // Starts the copy of this warp's share of an item's queries, whose rows its lanes hold; rows past the last are zero.
    // They arrive with the item's first keys.
    __device__ __forceinline__ void load_queries(const QueryRow& own, int slot) {
        using Place = PanelPlace<kRows, kChunks>;
        const Place to(warp * kWarpRows, lane);
        const u32 tile = shared_address(s.q[slot]);
        const i64 offset = own.valid ? own.request * p.q_stride_request + own.head * p.q_stride_head : -1;
#pragma unroll
        for (int pass = 0; pass < kWarpRows / Place::kRowsPerPass; ++pass) {
            const i64 from = __shfl_sync(0xffffffffu, offset, pass * Place::kRowsPerPass + lane / kChunks);
            copy_async_16(tile + to.offset(pass), p.q + max(from, i64(0)) + lane % kChunks * 8, from >= 0);
        }
    }

    // Finds this warp's share of the tile of tokens [begin, end) of the item, and notes who sees them: those past the
    // item's last, nobody.
    __device__ __forceinline__ Share lay_out(const WorkItem& item, SegmentStream& segments, int begin, int end) {
        const int first = begin + warp * kWarpTokens;
        const int own = first + lane % kWarpTokens;
        const int num_rows = item.num_requests * p.group;
        Share share{end - first, 0, -1};
        int visible = 0;  // as two bytes: the first row that sees the token, and how many do
        TileView view{kRows, 0, 0, end - begin < kTileTokens ? 0 : kRows};
        const u32 whole = __ballot_sync(0xffffffffu, segments.held_begin <= begin && segments.held_end >= end);
        if (whole != 0) {
            const int from = __ffs(whole) - 1;
            const int row = __shfl_sync(0xffffffffu, segments.shift(), from) + first;
            const int rows = __shfl_sync(0xffffffffu, segments.visible(), from);
            share.row = row + lane % kWarpTokens;
            if (own < end) visible = rows;
            if (share.count >= kWarpTokens) share.run = row;
            view.add(rows & 0xff, (rows & 0xff) + (rows >> 8), num_rows);
        } else {
            search(segments, begin, end, num_rows, own, share, visible, view);
        }
        if (lane < kWarpTokens) s.visible[keys.view()][warp * kWarpTokens + lane] = u16(visible);
        if (warp == 0 && lane == 0) s.view[keys.view()] = view;
        return share;
    }
    // The same for a tile of several segments.
    __device__ __forceinline__ void search(SegmentStream& segments, int begin, int end, int num_rows, int own, Share& share,
                                           int& visible, TileView& view) {
        for (int held_from = begin;;) {
            const int held_to = segments.end();
            const int from = segments.find(own);
            const int row = __shfl_sync(0xffffffffu, segments.shift(), from) + own;
            const int rows = __shfl_sync(0xffffffffu, segments.visible(), from);
            if (own >= held_from && own < min(held_to, end)) {
                share.row = row;
                visible = rows;
            }
            if (warp == 0 && max(segments.held_begin, begin) < min(segments.held_end, end)) {
                view.add(segments.held.row_begin, segments.held.row_end, num_rows);
            }
            if (held_to >= end) break;
            segments.advance(held_to, lane);
            held_from = held_to;
        }
        const int run = __shfl_sync(0xffffffffu, share.row, 0);
        const bool follows = share.row == run + lane % kWarpTokens;
        if (__all_sync(0xffffffffu, follows) && share.count >= kWarpTokens) share.run = run;
        if (warp == 0) view.reduce();
    }

    // Starts the copy of this warp's share of a tile.
    __device__ __forceinline__ void copy_share(const Share& share, const void* tile, i64 base, int stride) const {
        const u32 to = shared_address(tile);
        constexpr int kPasses = kWarpTokens / Place::kRowsPerPass;
        if (share.run >= 0) {
            const i64 step = i64(stride) * Place::kRowsPerPass;
            i64 from = row_address(base, share.run + lane / kChunks, stride);
#pragma unroll
            for (int pass = 0; pass < kPasses; ++pass, from += step) {
                ::copy_async_16(to + place.offset(pass), reinterpret_cast<const void*>(from));
            }
        } else {
#pragma unroll
            for (int pass = 0; pass < kPasses; ++pass) {
                const int in_warp = pass * Place::kRowsPerPass + lane / kChunks;
                const int row = __shfl_sync(0xffffffffu, share.row, in_warp);
                copy_async_16(to + place.offset(pass), reinterpret_cast<const void*>(row_address(base, row, stride)),
                              in_warp < share.count);
            }
        }
    }
    // base + row * stride in one instruction; C++ would multiply 64 by 64 bits.
    static __device__ __forceinline__ i64 row_address(i64 base, int row, int stride_bytes) {
        i64 address;
        asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(address) : "r"(row), "r"(stride_bytes), "l"(base));
        return address;
    }
};

struct Consumer {
    const WorkParams& p;
    Shared& s;
    int group;         // warpgroup
    int row_group;
    WarpgroupRows rows;
    Ring<kKeyStages> keys;  // the place of this warpgroup's current tile
    Ring<kValueStages> values;
    int tile;          // its number among all that the worker has

    __device__ __forceinline__ Consumer(const WorkParams& p, Shared& s)
        : p(p), s(s), group(threadIdx.x / kGroupThreads), row_group(kRowGroups == 2 ? group : 0),
          rows(row_group * kGroupRows), tile(kTokenGroups == 2 ? group : 0) {
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

    // Writes the item's outputs, or its partial ones; the last piece merges them all, or the workers of the last pieces do
    // so together.
    __device__ __forceinline__ void write(const WorkItem& item) {
        normalise();
        if (item.pieces > 1) {
            write_partial(item);
            named_sync(kOwnGroup + group, kGroupThreads);
            if (item.together) {
                merge_together(item);
                return;
            }
            if (!is_last(item)) return;
            merge(item);
            normalise();
        }
        write_outputs(item);
    }
    __device__ __forceinline__ void normalise() {
        const float factor[2] = {rows.state[0].normaliser(), rows.state[1].normaliser()};
        rows.scale_outputs(factor);
    }

    // A warp without rows of the item has nothing to write or merge.
    __device__ __forceinline__ bool has_rows(const WorkItem& item) const {
        return rows.first_row / 16 * 16 < item.num_requests * p.group;
    }
    __device__ __forceinline__ i64 partial(const WorkItem& item, int piece) const {
        return i64(item.first_partial + piece) * kRowGroups + row_group;
    }
    __device__ __forceinline__ float* partial_lse(i64 partial, int half) const {
        return p.mid_lse + partial * kGroupRows + rows.first_row % kGroupRows + half * 8;
    }

    __device__ __forceinline__ void write_partial(const WorkItem& item) {
        if (!has_rows(item)) return;
        const i64 to = partial(item, item.piece);
        float* o = p.mid_o + to * kOutputs * kGroupThreads + threadIdx.x % kGroupThreads;
#pragma unroll
        for (int i = 0; i < kOutputs; ++i) __stcg(o + i * kGroupThreads, rows.o[i]);
        if (threadIdx.x % 4 == 0) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                __stcg(partial_lse(to, half), rows.state[half].m + log2_approx(rows.state[half].l));
            }
        }
    }

    __device__ __forceinline__ bool leads() const { return threadIdx.x % kGroupThreads == 0; }

    // Whether this piece is the last of its rows to be done.
    __device__ __forceinline__ bool is_last(const WorkItem& item) {
        if (leads()) {
            int* counter = p.counters + item.counter * kRowGroups + row_group;
            const bool last = add_acquire_release(counter, 1) == item.pieces - 1;
            if (last) *counter = 0;  // for the next launch
            s.merge[group] = last;
        }
        named_sync(kOwnGroup + group, kGroupThreads);
        return s.merge[group];
    }

    // Where all workers end with the same rows, the last ones merge a slice of the columns each. They wait for the last
    // piece, but not for ever: it need not be on the chip yet. Its worker takes what is left, so that nobody depends on a
    // worker that waits.
    __device__ __forceinline__ void merge_together(const WorkItem& item) {
        int* done = p.counters + item.counter * kRowGroups + row_group * (2 + kSlices);
        int* generation = done + 1;  // the number of launches so far
        int* taken = done + 2;       // for each slice, the launch that was the last to merge it
        int launch = 0, own = kSlices;  // of the leading thread: this launch, and its next slice
        bool last = false;
        if (leads()) {
            launch = load_acquire(generation) + 1;
            const int place = item.pieces - 1 - add_acquire_release(done, 1);
            last = place == 0;
            bool ready = last;
            if (last) {
                *done = 0;
                store_release(generation, launch);
            } else if (place < kSlices) {
                for (int poll = 0; poll < p.polls && !ready; ++poll) ready = load_acquire(generation) == launch;
            }
            if (ready) own = place;
        }
        for (;;) {
            if (leads()) s.merge[group] = next_slice(item, taken, launch, own, last);
            named_sync(kOwnGroup + group, kGroupThreads);
            const int slice = s.merge[group];
            if (slice < 0) return;
            merge_slice(item, slice);
            named_sync(kOwnGroup + group, kGroupThreads);
        }
    }
    // Takes the next slice for this warpgroup: one in so many as there are pieces, from `own` on; then, at the last piece,
    // whatever nobody has taken. -1: none. By the leading thread.
    __device__ __forceinline__ static int next_slice(const WorkItem& item, int* taken, int launch, int& own, bool last) {
        while (own < kSlices) {
            const int slice = own;
            own += item.pieces;
            if (atomicExch(taken + slice, launch) != launch) return slice;
        }
        if (!last) return -1;
        u32 left = 0;
#pragma unroll
        for (int slice = 0; slice < kSlices; ++slice) left |= u32(load_relaxed(taken + slice) != launch) << slice;
        for (; left != 0; left &= left - 1) {
            const int slice = __ffs(left) - 1;
            if (atomicExch(taken + slice, launch) != launch) return slice;
        }
        return -1;
    }

    // Merges a slice: several pieces are fetched at a time, and added in their order.
    __device__ __forceinline__ void merge_slice(const WorkItem& item, int slice) {
        if (!has_rows(item)) return;
        float o[kSliceOutputs] = {};
        rows.state[0] = rows.state[1] = SoftmaxState{};
#pragma unroll 1
        for (int first = 0; first < item.pieces; first += kPiecesAtATime) {
            float fetched[kPiecesAtATime][kSliceOutputs], lse[kPiecesAtATime][2];
#pragma unroll
            for (int i = 0; i < kPiecesAtATime; ++i) {
                const i64 from = partial(item, min(first + i, item.pieces - 1));
                const float* part = p.mid_o + (from * kOutputs + slice * kSliceOutputs) * kGroupThreads;
#pragma unroll
                for (int row = 0; row < 2; ++row) lse[i][row] = __ldcg(partial_lse(from, row));
#pragma unroll
                for (int j = 0; j < kSliceOutputs; ++j) {
                    fetched[i][j] = __ldcg(part + j * kGroupThreads + threadIdx.x % kGroupThreads);
                }
            }
#pragma unroll
            for (int i = 0; i < kPiecesAtATime; ++i) {
                if (first + i < item.pieces) add_piece<kSliceOutputs>(o, fetched[i], lse[i]);
            }
        }
        const float factor[2] = {rows.state[0].normaliser(), rows.state[1].normaliser()};
#pragma unroll
        for (int i = 0; i < kSliceOutputs; ++i) o[i] *= factor[i / 2 % 2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const QueryRow row(p, item, rows.first_row + half * 8);
            if (slice == 0) write_lse(row, half);
            write_columns<kSliceOutputs>(row, o + 2 * half, slice * kSliceOutputs * 2);
        }
    }
    // Adds a part of a piece's accumulators to o, and its two rows' LSE to the states.
    template <int kPart>
    __device__ __forceinline__ void add_piece(float* o, const float* piece, const float (&lse)[2]) {
        float weight[2], factor[2];
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            SoftmaxState& state = rows.state[row];
            const float m = fmaxf(state.m, lse[row]);
            factor[row] = exp2_approx(state.m - SoftmaxState::finite_base(m));
            weight[row] = exp2_approx(lse[row] - SoftmaxState::finite_base(m));
            state.l = state.l * factor[row] + weight[row];
            state.m = m;
        }
#pragma unroll
        for (int i = 0; i < kPart; ++i) o[i] = o[i] * factor[i / 2 % 2] + piece[i] * weight[i / 2 % 2];
    }

    // Half of a thread's accumulators of a piece, and the LSE of its two rows.
    struct Partial {
        float o[kOutputs / 2];
        float lse[2];
    };
    __device__ __forceinline__ Partial fetch(const WorkItem& item, int piece, int half) const {
        const i64 from = partial(item, piece);
        const float* o = p.mid_o + (from * kOutputs + half * (kOutputs / 2)) * kGroupThreads + threadIdx.x % kGroupThreads;
        Partial fetched;
#pragma unroll
        for (int i = 0; i < kOutputs / 2; ++i) fetched.o[i] = __ldcg(o + i * kGroupThreads);
#pragma unroll
        for (int row = 0; row < 2; ++row) fetched.lse[row] = __ldcg(partial_lse(from, row));
        return fetched;
    }

    // Adds the pieces up, in their order: the result does not depend on who does it. The next piece is fetched while one
    // is added, half of it at a time for want of registers.
    __device__ __forceinline__ void merge(const WorkItem& item) {
        rows.reset();
        if (!has_rows(item)) return;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            rows.state[0] = rows.state[1] = SoftmaxState{};
            Partial ahead = fetch(item, 0, half);
#pragma unroll 1
            for (int piece = 0; piece < item.pieces; ++piece) {
                const Partial current = ahead;
                if (piece + 1 < item.pieces) ahead = fetch(item, piece + 1, half);
                add_piece<kOutputs / 2>(rows.o + half * (kOutputs / 2), current.o, current.lse);
            }
        }
    }

    __device__ __forceinline__ void write_outputs(const WorkItem& item) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const QueryRow row(p, item, rows.first_row + half * 8);
            write_lse(row, half);
            write_columns<kOutputs>(row, rows.o + 2 * half, 0);
        }
    }
    // Writes a row's accumulators from a column on: o[0] and o[1], then o[4] and o[5] eight columns further, and so on.
    template <int kCount>
    __device__ __forceinline__ void write_columns(const QueryRow& row, const float* o, int column) const {
        if (!row.valid) return;
        u16* to = p.o + row.request * p.o_stride_request + row.head * p.o_stride_head + column + threadIdx.x % 4 * 2;
        if (p.o_aligned) {
#pragma unroll
            for (int j = 0; j < kCount; j += 4) *reinterpret_cast<u32*>(to + 2 * j) = Element::pack(o[j], o[j + 1]);
        } else {
#pragma unroll
            for (int j = 0; j < kCount; j += 4) {
                const u32 pair = Element::pack(o[j], o[j + 1]);
                to[2 * j] = u16(pair);
                to[2 * j + 1] = u16(pair >> 16);
            }
        }
    }
    __device__ __forceinline__ void write_lse(const QueryRow& row, int half) const {
        if (p.lse != nullptr && row.valid && threadIdx.x % 4 == 0) {
            p.lse[row.request * p.qo_heads + row.head] = rows.state[half].natural_lse();
        }
    }
    static constexpr int kExchange = 1, kOwnGroup = 3, kTurn = 5;  // named barriers, one for each warpgroup
};

extern "C" __global__ void __launch_bounds__(kThreads, 1) tree_decode_sm90(const __grid_constant__ WorkParams p) {
    extern __shared__ __align__(1024) unsigned char memory[];
    Shared& s = *reinterpret_cast<Shared*>(memory);
    if (threadIdx.x == 0) {
        prefetch_item(p.items + blockIdx.x);
        // A thread arrives when its copies are there; for what warps store beside the keys, they arrive once more.
        for (Barrier& barrier : s.k_full) barrier_init(barrier, kProducerWarps * (kWarpSize + 1));
        for (Barrier& barrier : s.v_full) barrier_init(barrier, kProducerWarps * kWarpSize);
        for (Barrier& barrier : s.k_empty) barrier_init(barrier, kConsumerWarps / kTokenGroups);
        for (Barrier& barrier : s.v_empty) barrier_init(barrier, kConsumerWarps / kTokenGroups);
        for (Barrier& barrier : s.q_empty) barrier_init(barrier, kConsumerWarps);
    }
    __syncthreads();
    // Tiles of 128 tokens take more registers than an equal share: the producers leave theirs.
    if (threadIdx.x < kConsumerWarps * kWarpSize) {
        if (kTileTokens > 64) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kConsumerRegisters));
        Consumer(p, s).run();
    } else {
        if (kTileTokens > 64) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kProducerRegisters));
        Producer(p, s).run();
    }
}
