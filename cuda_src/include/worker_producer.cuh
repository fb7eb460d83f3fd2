// The producer warps of a worker: which rows of K and V an item's tiles take, and their copies to shared memory.
#pragma once
#include "kv_tile.cuh"
#include "worker.cuh"

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

constexpr int kCopyChunks = kHeadDim * int(sizeof(KVBits)) / 16;  // of 16 bytes, in a row of K or V

#if defined(FT_KV_ELEMENT)
// Where a lane writes when a warp copies float8 rows of kCopyChunks chunks of 16 bytes, 512 bytes a pass. In rows of 128
// bytes the odd ones have their halves exchanged, see Float8Producer.
struct CopyPlace {
    static constexpr int kRowsPerPass = kWarpSize / kCopyChunks;
    u32 lane_offset;

    __device__ __forceinline__ CopyPlace(int, int lane) : lane_offset(offset(lane / kCopyChunks, lane % kCopyChunks)) {}

    static __device__ __forceinline__ u32 offset(int row, int chunk) {
        return row * kHeadDim + (chunk ^ (kCopyChunks == 8 ? row % 2 * 4 : 0)) * 16;
    }
    __device__ __forceinline__ u32 offset(int pass) const { return lane_offset + pass * kWarpSize * 16; }
};
#else
using CopyPlace = PanelPlace<kTileTokens, kChunks>;
#endif

// A warp that gathers its share of every tile.
struct Producer {
    using Place = CopyPlace;
    // A thread arrives when its copies are there; for what warps store beside the keys, they arrive once more.
    static constexpr int kKeyArrivals = kProducerWarps * (kWarpSize + 1), kValueArrivals = kProducerWarps * kWarpSize;
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
          place(warp * kWarpTokens, lane), k_stride(int(p.k_stride_token) * int(sizeof(KVBits))),
          v_stride(int(p.v_stride_token) * int(sizeof(KVBits))) {}

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
        choose_head(item.kv_head);
        SegmentStream segments(p, item, lane);
#pragma unroll 1
        for (int begin = 0; begin < item.tokens; begin += kTileTokens) {
            barrier_wait(s.k_empty[keys.stage], keys.parity ^ 1);
            const Share share = lay_out(item, segments, begin, min(begin + kTileTokens, item.tokens));
            copy_share(share, shared_address(s.k[keys.stage]), k, k_stride);
            if (begin == 0) load_queries(query, slot);
            __syncwarp();  // the tile's view is written
            arrive_after_copies(shared_address(&s.k_full[keys.stage]));
            if (lane == 0) barrier_arrive(s.k_full[keys.stage]);
            barrier_wait(s.v_empty[values.stage], values.parity ^ 1);
            copy_share(share, shared_address(s.v[values.stage]), v, v_stride);
            arrive_after_copies(shared_address(&s.v_full[values.stage]));
            keys.advance(1);
            values.advance(1);
        }
    }

    __device__ __forceinline__ void choose_head(int kv_head) {
        const int column = lane % kCopyChunks * (16 / int(sizeof(KVBits)));
        k = i64(p.k + kv_head * p.k_stride_head + column);
        v = i64(p.v + kv_head * p.v_stride_head + column);
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
    __device__ __forceinline__ void copy_share(const Share& share, u32 to, i64 base, int stride) const {
        constexpr int kPasses = kWarpTokens / Place::kRowsPerPass;
        if (share.run >= 0) {
            const i64 step = i64(stride) * Place::kRowsPerPass;
            i64 from = row_address(base, share.run + lane / kCopyChunks, stride);
#pragma unroll
            for (int pass = 0; pass < kPasses; ++pass, from += step) {
                ::copy_async_16(to + place.offset(pass), reinterpret_cast<const void*>(from));
            }
        } else {
#pragma unroll
            for (int pass = 0; pass < kPasses; ++pass) {
                const int in_warp = pass * Place::kRowsPerPass + lane / kCopyChunks;
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
