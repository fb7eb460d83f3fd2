// The producer warps of a worker: which rows of K and V an item's tiles take, and their copies to shared memory.
#pragma once
#include "worker_queries.cuh"

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
        prefetch_following();
    }
    __device__ __forceinline__ const Segment* following() const { return p.segments + min(next, p.num_segments - 1); }
    // By one lane for each 128 bytes: prefetches are served lane by lane.
    __device__ __forceinline__ void prefetch_following() const {
        const int lane = threadIdx.x % kWarpSize;
        if (next < p.num_segments && (lane % 8 == 0 || lane == kWarpSize - 1)) prefetch(following());
    }

    // Goes on to the segments whose tokens are numbered from `begin` on.
    __device__ __forceinline__ void advance(int begin, int lane) {
        held = *following();
        next += kWarpSize;
        prefetch_following();
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
    // A token's row of K and V less its number, and who sees it, with kReadOnce << 8 where that is set.
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

static_assert(kBoxTokens == kChunkTokens, "chunks come as boxes");
constexpr int kCopyVectors = kHeadDim * int(sizeof(KVBits)) / 16;  // of 16 bytes, in a row of K or V

// A thread arrives when its copies are there, a warp when it has stored its part of the view.
constexpr int kCopyArrivals = kTileWarps * kWarpSize, kViewArrivals = kTileWarps * kWarpArrivals;

// A place in a ring: its rows, and the barriers of its phase.
struct Slot {
    u32 rows;
    Barrier& full;
    Barrier& empty;
    int parity;  // of `empty`, once the place is free
};
template <int kStages, int kBytes>
__device__ __forceinline__ Slot slot_of(unsigned char (&rows)[kStages][kBytes], Barrier (&full)[kStages],
                                        Barrier (&empty)[kStages], const Ring<kStages>& ring) {
    return {shared_address(rows[ring.stage]), full[ring.stage], empty[ring.stage], ring.parity ^ 1};
}

// The rings that producer warps gather 16-bit tiles into: those that consumers read.
struct TileRings {
    using Place = PanelPlace<kTileTokens, kRowVectors>;
    static constexpr int kRowBytes = kPanelRowBytes;
    static constexpr int kBoxes = kPanels;  // for 16 tokens
    Shared& s;
    Ring<kKeyStages> keys;
    Ring<kValueStages> values;

    static __device__ __forceinline__ void init(Shared& s) {
        barrier_init(s.k_full, kCopyArrivals + kViewArrivals);
        barrier_init(s.v_full, kCopyArrivals);
    }
    __device__ __forceinline__ Slot key_slot() const { return slot_of(s.k, s.k_full, s.k_empty, keys); }
    __device__ __forceinline__ Slot value_slot() const { return slot_of(s.v, s.v_full, s.v_empty, values); }
    __device__ __forceinline__ int view() const { return keys.of_two_laps(); }
    __device__ __forceinline__ Barrier& view_full() const { return s.k_full[keys.stage]; }
    __device__ __forceinline__ void advance(int by) {
        keys.advance(by);
        values.advance(by);
    }
};

// A warp that gathers its part of tiles, and of every item's queries. The places of a tile of 64 tokens take longer to
// find than its copies to start: so with one row group each warp is at another tile. Those of two row groups come sooner
// where several warps start their copies.
template <typename Rings>
struct Producer {
    using Place = typename Rings::Place;
    const WorkParams& p;
    Shared& s;
    int warp, lane;
    int part;  // of a tile
    Rings rings;  // at the places of this warp's next tile
    int tile;     // its number among all that the worker has
    Place place;
    i64 k, v;  // addresses of this lane's chunk of row 0, for the item's KV head
    int k_stride, v_stride;  // bytes

    // Where the tokens of a part come from, and who sees them. A lane knows tokens lane, lane + 32, ..
    struct Places {
        int count;                 // tokens; the rest is zero
        u32 boxes;                 // chunks of 16 tokens that may come as boxes: a bit for each
        u32 read_again;            // lanes whose tokens others read as well, or that have none
        int row[kLaneTokens];
        int visible[kLaneTokens];  // in bytes: the first row that sees the token, how many do, and kReadOnce << 8
    };

    __device__ __forceinline__ Producer(const WorkParams& p, Shared& s)
        : p(p), s(s), warp(threadIdx.x / kWarpSize - kConsumerWarps), lane(threadIdx.x % kWarpSize),
          part(warp % kTileWarps), rings{s}, tile(warp / kTileWarps), place(part * kWarpTokens, lane),
          k_stride(int(p.k_stride_token) * int(sizeof(KVBits))), v_stride(int(p.v_stride_token) * int(sizeof(KVBits))) {
        rings.advance(tile);
    }

    __device__ __forceinline__ void run() {
        WorkItem item = p.items[blockIdx.x];  // on its way while the barriers are set up
        if (p.bulk && warp == 0 && lane == 0) {
            prefetch_map(p.k_map);
            prefetch_map(p.v_map);
        }
        named_sync(kEveryone, kThreads);
        // Turns count the items that have tokens: only there do consumers wait for producers, and a barrier's parity does
        // not tell a phase from the one after the next.
        int turn = 0;
        bool is_first = true;  // of the worker's items
        // Not unrolled, lest the first one has code of its own.
#pragma unroll 1
        for (int first = 0;;) {  // of the item's tiles
            if (item.tokens > 0) {
                if (kQuerySlots > 1) load_queries(item, turn);
                load_tiles(item, first, turn, is_first);
                first += ceil_div(item.tokens, kTileTokens);
                ++turn;
            }
            if (item.next < 0) return;
            item = p.items[item.next];
            is_first = false;
        }
    }

    // Starts the copies of this warp's share of an item's queries, once their place is free.
    __device__ __forceinline__ void load_queries(const WorkItem& item, int turn) const {
        const int share = warp - (kProducerWarps - kQueryWarps), slot = turn % kQuerySlots;
        if (share < 0) return;
        barrier_wait(s.q_empty[slot], turn / kQuerySlots % 2 ^ 1);
        copy_queries<kQueryRowsOfWarp>(p, s, item, slot, share);
#pragma unroll
        for (int i = 0; i < kQueryArrivals; i += kQueryWarps * kWarpSize) {
            arrive_after_copies(shared_address(&s.q_full[slot]));
        }
    }

    // first: the number of the item's first tile.
    __device__ __forceinline__ void load_tiles(const WorkItem& item, int first, int turn, bool is_first) {
        choose_head(item.kv_head);
        SegmentStream segments(p, item, lane);
        // Where there is one place for queries, consumers copy those of the worker's first item. Later items' come after a tile:
        // until then the place is taken, unless no item before had tokens.
        const int queries_at = kQuerySlots > 1 || is_first ? -1 : turn == 0 ? 0 : kTileTokens;
#pragma unroll 1
        for (int begin = (tile - first) * kTileTokens;; begin += kTilesAtATime * kTileTokens) {
            if (begin == queries_at) load_queries(item, turn);
            if (begin >= item.tokens) return;
            load_tile(segments, item, begin);
        }
    }
    __device__ __forceinline__ void load_tile(SegmentStream& segments, const WorkItem& item, int begin) {
        const int part_begin = begin + part * kWarpTokens;
        const bool in_first = part_begin + kWarpTokens <= min(item.first.kv_len, item.tokens);
        const Places places = in_first ? places_in(item.first, part_begin) : find(segments, begin, item.tokens);
        const Slot keys = rings.key_slot(), values = rings.value_slot();
        barrier_wait(keys.empty, keys.parity);
        copy(places, keys, p.k_map, item.kv_head, k, k_stride);
        write_view(places, item.num_requests * p.group);
        __syncwarp();  // the tile's view is written
        arrive(places, keys.full);
        barrier_arrive_warp(rings.view_full());
        barrier_wait(values.empty, values.parity);
        copy(places, values, p.v_map, item.kv_head, v, v_stride);
        arrive(places, values.full);
        tile += kTilesAtATime;
        rings.advance(kTilesAtATime);
    }

    __device__ __forceinline__ void choose_head(int kv_head) {
        const int column = lane % kCopyVectors * (16 / int(sizeof(KVBits)));
        k = i64(p.k + kv_head * p.k_stride_head + column);
        v = i64(p.v + kv_head * p.v_stride_head + column);
    }

    // A part that lies in the item's first segment, which came with it, from its token `begin` on: nothing is to be waited for.
    __device__ __forceinline__ Places places_in(const Segment& first, int begin) const {
        Places places;
        places.count = kWarpTokens;
        places.boxes = kAllChunks;
        const int visible = first.row_begin | (first.row_end - first.row_begin) << 8;
        places.read_again = visible & kReadOnce << 8 ? 0 : 0xffffffffu;
#pragma unroll
        for (int i = 0; i < kLaneTokens; ++i) {
            places.row[i] = first.kv_begin + begin + i * kWarpSize + lane;
            places.visible[i] = visible;
        }
        return places;
    }

    // Finds this warp's part of the tile that begins with the item's token `first`. Tokens past the last, nobody sees.
    __device__ __forceinline__ Places find(SegmentStream& segments, int first, int tokens) const {
        const int begin = first + part * kWarpTokens, end = min(begin + kWarpTokens, tokens);
        Places places;
        places.count = end - begin;
        places.boxes = places.read_again = 0;
#pragma unroll
        for (int i = 0; i < kLaneTokens; ++i) places.row[i] = places.visible[i] = 0;
        if (begin >= end) return places;
        while (segments.end() <= begin) segments.advance(segments.end(), lane);
        if (!find_chunks(segments, begin, end, places)) {
            search(segments, begin, end, places);
            places.boxes = find_boxes(places);
        }
#pragma unroll
        for (int i = 0; i < kLaneTokens; ++i) {
            places.read_again |= __ballot_sync(0xffffffffu, !(places.visible[i] & kReadOnce << 8));
        }
        return places;
    }
    // Finds the part where each chunk is of one of the held segments, as planned ones are, but for the last of some nodes.
    __device__ __forceinline__ bool find_chunks(const SegmentStream& segments, int begin, int end, Places& places) const {
        bool found = true;
#pragma unroll
        for (int i = 0; i < kLaneTokens; ++i) {
            const int first = begin + i * kWarpSize, second = first + kChunkTokens;
            // Segments lie in order: as many as end before a chunk precede its own.
            const int before_first = __popc(__ballot_sync(0xffffffffu, segments.held_end <= first));
            const int before_second = __popc(__ballot_sync(0xffffffffu, segments.held_end <= second));
            const int from = lane < kChunkTokens ? before_first : before_second;
            const int segment_end = __shfl_sync(0xffffffffu, segments.held_end, from);
            const int shift = __shfl_sync(0xffffffffu, segments.shift(), from);
            const int rows = __shfl_sync(0xffffffffu, segments.visible(), from);
            const int chunk = lane < kChunkTokens ? first : second, token = first + lane;
            found = found && (chunk >= end || (from < kWarpSize && segment_end >= min(chunk + kChunkTokens, end)));
            places.row[i] = token < end ? shift + token : 0;
            places.visible[i] = token < end ? rows : 0;
        }
        places.boxes = (1u << places.count / kChunkTokens) - 1;
        return __all_sync(0xffffffffu, found);
    }
    // The same for tokens of any segments.
    __device__ __forceinline__ void search(SegmentStream& segments, int begin, int end, Places& places) const {
#pragma unroll
        for (int i = 0; i < kLaneTokens; ++i) places.row[i] = places.visible[i] = 0;
        for (int held_from = begin;;) {
            const int held_to = segments.end();
#pragma unroll
            for (int i = 0; i < kLaneTokens; ++i) {
                const int own = begin + i * kWarpSize + lane;
                const int from = segments.find(own);
                const int row = __shfl_sync(0xffffffffu, segments.shift(), from) + own;
                const int rows = __shfl_sync(0xffffffffu, segments.visible(), from);
                if (own >= held_from && own < min(held_to, end)) {
                    places.row[i] = row;
                    places.visible[i] = rows;
                }
            }
            if (held_to >= end) break;
            segments.advance(held_to, lane);
            held_from = held_to;
        }
    }
    // Which chunks have rows that follow one another.
    __device__ __forceinline__ u32 find_boxes(const Places& places) const {
        u32 boxes = 0;
#pragma unroll
        for (int i = 0; i < kLaneTokens; ++i) {
            const int first = __shfl_sync(0xffffffffu, places.row[i], lane & kChunkTokens);
            const bool follows = places.row[i] == first + lane % kChunkTokens && i * kWarpSize + lane < places.count;
            const u32 followers = __ballot_sync(0xffffffffu, follows);
            boxes |= (u32((followers & 0xffff) == 0xffff) | u32(followers >> 16 == 0xffff) << 1) << 2 * i;
        }
        return boxes;
    }

    // Notes who sees the tokens. What rows past the last compute is never looked at.
    __device__ __forceinline__ void write_view(const Places& places, int num_rows) {
        u32 seen_by = 0, whole = (1u << kRows / kChunkRows) - 1;
#pragma unroll
        for (int i = 0; i < kLaneTokens; ++i) {
            const int begin = places.visible[i] & 0xff, count = places.visible[i] >> 8 & 0xff;
            const int end = begin + count < num_rows ? begin + count : kRows;
            const u32 some = count > 0 ? (2u << (begin + count - 1) / kChunkRows) - (1u << begin / kChunkRows) : 0;
            seen_by |= some << (i * kWarpSize + lane) / kChunkTokens * 8;
            const int first_whole = ceil_div(begin, kChunkRows);
            whole &= count > 0 ? (1u << max(end / kChunkRows, first_whole)) - (1u << first_whole) : 0;
            s.visible[rings.view()][part * kWarpTokens + i * kWarpSize + lane] = u16(places.visible[i]);
        }
        seen_by = __reduce_or_sync(0xffffffffu, seen_by);
        whole = __reduce_and_sync(0xffffffffu, whole);
        TileView& view = s.view[rings.view()];
        if (lane < kPartChunks) view.seen_by[part * kPartChunks + lane] = (unsigned char)(seen_by >> lane * 8);
        const u32 own_chunks = lane < kRows / kChunkRows ? __popc(seen_by & 0x01010101u << lane) << lane * 4 : 0;
        const u32 chunks_seen = __reduce_or_sync(0xffffffffu, own_chunks);
        if (lane == 0) {
            view.whole[part] = (unsigned char)whole;
            view.chunks_seen[part] = chunks_seen;
        }
    }

    // Starts the copies of this warp's part: boxes by the bulk copy engine, which one lane asks for them all; other chunks by
    // 16 bytes a lane.
    __device__ __forceinline__ void copy(const Places& places, const Slot& to, const TensorMap& map, int head, i64 base,
                                         int stride) const {
        u32 left = kAllChunks;
        if (Rings::kBoxes > 0 && p.bulk) {
            left &= ~places.boxes;
            copy_boxes(places, to, map, head);
        }
#pragma unroll 1
        for (; left != 0; left &= left - 1) {
            const int chunk = __ffs(left) - 1;
#pragma unroll
            for (int pass = 0; pass < kChunkTokens / Place::kRowsPerPass; ++pass) {
                const int token = pass * Place::kRowsPerPass + lane / kCopyVectors;
                const i64 own = row_address(base, row_of(places, chunk, token), stride);
                copy_async_16(to.rows + chunk * kChunkTokens * Rings::kRowBytes + place.offset(pass),
                              reinterpret_cast<const void*>(own), chunk * kChunkTokens + token < places.count,
                              places.read_again == 0);
            }
        }
    }
    // Every lane arrives when its copies are there; one for all where boxes bring everything.
    __device__ __forceinline__ void arrive(const Places& places, Barrier& full) const {
        if (Rings::kBoxes > 0 && p.bulk && places.boxes == kAllChunks) {
            if (elected()) barrier_arrive(full, kWarpSize);
        } else {
            arrive_after_copies(shared_address(&full));
        }
    }
    __device__ __forceinline__ void copy_boxes(const Places& places, const Slot& to, const TensorMap& map, int head) const {
        int row[kPartChunks];
#pragma unroll
        for (int chunk = 0; chunk < kPartChunks; ++chunk) {
            row[chunk] = __shfl_sync(0xffffffffu, places.row[chunk / 2], chunk % 2 * kChunkTokens);
        }
        if (places.boxes == 0 || !elected()) return;
        barrier_expect(to.full, __popc(places.boxes) * Rings::kBoxes * kBoxBytes);
#pragma unroll
        for (int chunk = 0; chunk < kPartChunks; ++chunk) {
            if (!(places.boxes >> chunk & 1)) continue;
            const u32 rows = to.rows + (part * kWarpTokens + chunk * kChunkTokens) * kPanelRowBytes;
#pragma unroll
            for (int box = 0; box < Rings::kBoxes; ++box) {
                copy_box(rows + box * kPanelBytes, map, box * kPanelElements, head, row[chunk], to.full,
                         places.read_again == 0);
            }
        }
    }
    // The row of a chunk's token.
    __device__ __forceinline__ int row_of(const Places& places, int chunk, int token) const {
        const int own = kLaneTokens == 2 && chunk >= 2 ? places.row[kLaneTokens - 1] : places.row[0];
        return __shfl_sync(0xffffffffu, own, chunk % 2 * kChunkTokens + token);
    }
    // base + row * stride in one instruction; C++ would multiply 64 by 64 bits.
    static __device__ __forceinline__ i64 row_address(i64 base, int row, int stride_bytes) {
        i64 address;
        asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(address) : "r"(row), "r"(stride_bytes), "l"(base));
        return address;
    }
};
