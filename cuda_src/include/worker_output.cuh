// The end of a worker's item: outputs or partial ones, and the merge of the pieces of some rows.
#pragma once
#include "memory_order.cuh"
#include "worker.cuh"

constexpr int kSliceOutputs = 8;  // of a thread's accumulators, when workers merge together
constexpr int kSlices = kOutputs / kSliceOutputs;
// Whether a lane writes 16 bytes at a time, not 4. With one row group, half of whose warps write, that took longer
// (bench/NOTES.md); of float8 values a lane has other columns.
constexpr bool kWritesVectors = kRowGroups == 2 && !kFloat8;
constexpr int kPiecesAtATime = 4;  // whose parts of a slice are fetched together
constexpr u32 kAllSlices = (1u << kSlices) - 1;
// In a piece's word, see merge_together: the launch's number, and whether the piece's worker has given up merging.
constexpr int kGivenUp = 1 << 30, kLaunchMask = kGivenUp - 1;
static_assert(kSliceOutputs % 8 == 0 && kOutputs % kSliceOutputs == 0, "slices are whole runs of 16 columns");

// The rows of a warpgroup, and where they go.
struct Output {
    const WorkParams& p;
    Shared& s;
    int group;  // warpgroup
    int row_group;
    WarpgroupRows rows;

    __device__ __forceinline__ Output(const WorkParams& p, Shared& s)
        : p(p), s(s), group(uniform(threadIdx.x / kGroupThreads)), row_group(kRowGroups == 2 ? group : 0),
          rows(row_group * kGroupRows) {}

    // Writes the item's outputs, or its partial ones; the last piece merges them all, or the workers of the last pieces do
    // so together.
    __device__ __forceinline__ void write(const WorkItem& item) {
        normalise(value_scale(p, item.kv_head));
        if (item.pieces > 1) {
            write_partial(item);
            named_sync(kOwnGroup + group, kGroupThreads);
            if (item.together) {
                merge_together(item);
                return;
            }
            if (!is_last(item)) return;
            merge(item);
            normalise(1.0f);
        }
        write_outputs(item);
    }
    __device__ __forceinline__ void normalise(float scale) {
        const float factor[2] = {rows.state[0].normaliser() * scale, rows.state[1].normaliser() * scale};
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

    __device__ __forceinline__ float base2_lse(int half) const {
        return rows.state[half].m + log2_approx(rows.state[half].l);
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
                __stcg(partial_lse(to, half), base2_lse(half));
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
            s.merge_work[group] = last;
        }
        named_sync(kOwnGroup + group, kGroupThreads);
        return s.merge_work[group];
    }

    // Where all workers end with the same rows, each merges some slices of the columns: piece i those of numbers i,
    // i + pieces, .. A word for each piece holds the number of the last launch in which it was done. A worker looks at all
    // words until they are this launch's, but not for ever: a piece's worker need not be on the chip yet. Who gives up says
    // so in its word and looks once more; who sees all pieces done merges what was given up, too. Of a worker that gives up
    // and the one that ends last, one at least sees the other's word; both may, and write the same bits.
    __device__ __forceinline__ void merge_together(const WorkItem& item) {
        if (threadIdx.x % kGroupThreads < kWarpSize) {
            int* words = p.counters + item.counter * kRowGroups + row_group * item.pieces;
            const int launch = (load_relaxed(words + item.piece) & kLaunchMask) + 1 & kLaunchMask;
            __syncwarp();  // all lanes have looked: one writes there next
            const bool merges = item.piece < kSlices;
            u32 slices = 0;
#pragma unroll 1
            for (int gives_up = 0; gives_up <= merges && slices == 0; ++gives_up) {
                const int word = gives_up ? launch | kGivenUp : launch;
                slices = finish_piece(words, item, launch, word, merges && !gives_up ? p.polls : 0);
            }
            if (leads()) s.merge_work[group] = int(slices);
        }
        named_sync(kOwnGroup + group, kGroupThreads);
#pragma unroll 1
        for (u32 left = u32(s.merge_work[group]) & kAllSlices; left != 0; left &= left - 1) merge_slice(item, __ffs(left) - 1);
    }
    // Says in this piece's word what is given, and looks at all words, again up to `polls` times: 0 where not all pieces
    // are done in this launch, else a bit for each slice that falls to this warpgroup, and one beyond. By the first warp.
    __device__ __forceinline__ static u32 finish_piece(int* words, const WorkItem& item, int launch, int own, int polls) {
        const int lane = threadIdx.x % kWarpSize;
        if (lane == 0) store_release(words + item.piece, own);
        __syncwarp();
        fence_sequential();  // this word comes before any lane's look at the others
#pragma unroll 1
        for (int poll = 0; poll <= polls; ++poll) {
            bool done = true;
            u32 slices = kAllSlices + 1;
#pragma unroll 1
            for (int piece = lane; piece < item.pieces; piece += kWarpSize) {
                const int word = load_acquire(words + piece);
                done = done && (word & kLaunchMask) == launch;
                if (piece == item.piece || word != launch) slices |= slices_of(piece, item.pieces);
            }
            if (__all_sync(0xffffffffu, done)) return __reduce_or_sync(0xffffffffu, slices);
        }
        return 0;
    }
    __device__ __forceinline__ static u32 slices_of(int piece, int pieces) {
        u32 slices = 0;
#pragma unroll 1
        for (int slice = piece; slice < kSlices; slice += pieces) slices |= 1u << slice;
        return slices;
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

    // Adds the pieces up, in their order: the result does not depend on who does it. Its own is still in its registers; of
    // another, half is fetched at a time, for want of more.
    __device__ __forceinline__ void merge(const WorkItem& item) {
        if (!has_rows(item)) {
            rows.reset();
            return;
        }
        const float own_lse[2] = {base2_lse(0), base2_lse(1)};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            rows.state[0] = rows.state[1] = SoftmaxState{};
            float* own = rows.o + half * (kOutputs / 2);
            float sum[kOutputs / 2] = {};
#pragma unroll 1
            for (int piece = 0; piece < item.pieces; ++piece) {
                if (piece == item.piece) {
                    add_piece<kOutputs / 2>(sum, own, own_lse);
                } else {
                    const Partial other = fetch(item, piece, half);
                    add_piece<kOutputs / 2>(sum, other.o, other.lse);
                }
            }
#pragma unroll
            for (int i = 0; i < kOutputs / 2; ++i) own[i] = sum[i];
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
    // Writes a row's accumulators from a column on, a pair for each j = 0, 4, ..: o[0] and o[1], then o[4] and o[5] eight
    // columns further, and so on. Of float8 values a thread has four columns side by side of each 16, see RawChunk.
    template <int kCount>
    __device__ __forceinline__ void write_columns(const QueryRow& row, const float* o, int column) const {
        if constexpr (kWritesVectors && kCount % 16 == 0) {
            if (p.o_aligned) {
                write_vectors<kCount>(row, o, column);
                return;
            }
        }
        if (!row.valid) return;
        u16* to = p.o + row.request * p.o_stride_request + row.head * p.o_stride_head + column;
        to += threadIdx.x % 4 * (kFloat8 ? 4 : 2);
        if (p.o_aligned) {
#pragma unroll
            for (int j = 0; j < kCount; j += 4) *reinterpret_cast<u32*>(to + column_of(j)) = pair_of(o, j);
        } else {
#pragma unroll
            for (int j = 0; j < kCount; j += 4) {
                const u32 pair = pair_of(o, j);
                to[column_of(j)] = u16(pair);
                to[column_of(j) + 1] = u16(pair >> 16);
            }
        }
    }
    // The same, 16 bytes a lane: four lanes, which share a row, hand pairs round, so that each has eight columns side by side.
    template <int kCount>
    __device__ __forceinline__ void write_vectors(const QueryRow& row, const float* o, int column) const {
        const int lane = threadIdx.x % 4;
        u16* to = p.o + row.request * p.o_stride_request + row.head * p.o_stride_head + column + lane * 8;
#pragma unroll
        for (int j = 0; j < kCount; j += 16) {
            u32 pairs[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) pairs[i] = pair_of(o, j + 4 * i);
            hand_round<1>(pairs[0], pairs[1], lane);
            hand_round<1>(pairs[2], pairs[3], lane);
            hand_round<2>(pairs[0], pairs[2], lane);
            hand_round<2>(pairs[1], pairs[3], lane);
            if (row.valid) *reinterpret_cast<Packed8*>(to + 2 * j) = Packed8{pairs[0], pairs[1], pairs[2], pairs[3]};
        }
    }
    // Lanes without the bit give their second word for the first of those with it.
    template <int kBit>
    static __device__ __forceinline__ void hand_round(u32& first, u32& second, int lane) {
        const bool upper = lane & kBit;
        const u32 other = __shfl_xor_sync(0xffffffffu, upper ? first : second, kBit);
        (upper ? first : second) = other;
    }
    static __device__ __forceinline__ int column_of(int j) { return kFloat8 ? j / 8 * 16 + j / 4 % 2 * 2 : 2 * j; }
    static __device__ __forceinline__ u32 pair_of(const float* o, int j) {
        const int first = kFloat8 ? j / 8 * 8 + j / 4 % 2 : j;
        return Element::pack(o[first], o[first + (kFloat8 ? 4 : 1)]);
    }
    __device__ __forceinline__ void write_lse(const QueryRow& row, int half) const {
        if (p.lse != nullptr && row.valid && threadIdx.x % 4 == 0) {
            p.lse[row.request * p.qo_heads + row.head] = rows.state[half].natural_lse();
        }
    }
};
