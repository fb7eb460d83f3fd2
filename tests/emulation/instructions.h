// The PTX instructions that the kernels use, each a function of its name with _ for dots and colons: results first, then
// what it reads. Words after the PTX manual.
#pragma once
#include "cuda.h"

namespace ptx {

using gpu::block;
using gpu::lane;
using gpu::warp;
using std::to_string;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = unsigned long long;

// Numbers.

inline float half_to_float(u16 bits) { return float(__builtin_bit_cast(_Float16, bits)); }
inline u16 float_to_half(float value) { return __builtin_bit_cast(u16, _Float16(value)); }
inline float bfloat_to_float(u16 bits) { return __builtin_bit_cast(float, u32(bits) << 16); }
inline u16 float_to_bfloat(float value) {
    const u32 bits = __builtin_bit_cast(u32, value);
    if (value != value) return 0x7fff;
    return u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
// An e4m3 as a half: sign, four bits of exponent with bias 7, three of mantissa.
inline u16 e4m3_to_half(unsigned char bits) {
    const int exponent = bits >> 3 & 15, mantissa = bits & 7;
    if (exponent == 15 && mantissa == 7) return 0x7fff;
    const float size = exponent ? std::ldexp(float(8 + mantissa), exponent - 10) : std::ldexp(float(mantissa), -9);
    return float_to_half(bits & 0x80 ? -size : size);
}

inline void cvt_f32_f16(float& to, u16 from) { to = half_to_float(from); }
inline void cvt_rn_f16_f32(u16& to, float from) { to = float_to_half(from); }
inline void cvt_rn_f16x2_f32(u32& to, float high, float low) { to = u32(float_to_half(high)) << 16 | float_to_half(low); }
inline void cvt_rn_bf16x2_f32(u32& to, float high, float low) {
    to = u32(float_to_bfloat(high)) << 16 | float_to_bfloat(low);
}
inline void cvt_rn_satfinite_f16x2_f32(u32& to, float high, float low) {
    const auto within = [](float x) { return x != x ? x : std::fmin(std::fmax(x, -65504.0f), 65504.0f); };
    cvt_rn_f16x2_f32(to, within(high), within(low));
}
inline void cvt_rn_f16x2_e4m3x2(u32& to, u16 from) {
    to = u32(e4m3_to_half((unsigned char)(from >> 8))) << 16 | e4m3_to_half((unsigned char)from);
}
inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }
inline void ex2_approx_ftz_f32(float& to, float from) { to = flushed(std::exp2(flushed(from))); }
inline void lg2_approx_ftz_f32(float& to, float from) { to = std::log2(flushed(from)); }
inline void rcp_approx_ftz_f32(float& to, float from) { to = flushed(1.0f / flushed(from)); }
inline void mul_f16x2(u32& to, u32 a, u32 b) {
    const auto product = [](u16 x, u16 y) { return float_to_half(half_to_float(x) * half_to_float(y)); };
    to = u32(product(u16(a >> 16), u16(b >> 16))) << 16 | product(u16(a), u16(b));
}
inline void mov_b32(u16& low, u16& high, u32 from) { low = u16(from), high = u16(from >> 16); }
inline void mov_b64(u64& to, u32 low, u32 high) { to = u64(high) << 32 | low; }
inline void mad_wide_s32(long long& to, int a, int b, long long c) { to = (long long)(a) * b + c; }

// Memory.

template <typename T>
T load(u32 address) {
    T value;
    std::memcpy(&value, gpu::shared(address, int(sizeof value)), sizeof value);
    return value;
}
inline void ld_shared_u32(u32& to, u32 address) { to = load<u32>(address); }
inline void ld_shared_v4_u32(u32& a, u32& b, u32& c, u32& d, u32 address) {
    gpu::shared(address, 16);
    a = load<u32>(address), b = load<u32>(address + 4), c = load<u32>(address + 8), d = load<u32>(address + 12);
}
inline void st_shared_v4_u32(u32 address, u32 a, u32 b, u32 c, u32 d) {
    const u32 words[4] = {a, b, c, d};
    std::memcpy(gpu::shared(address, 16), words, 16);
}
inline void ld_global_v4_u32(u32& a, u32& b, u32& c, u32& d, const void* from) {
    u32 words[4];
    std::memcpy(words, from, 16);
    a = words[0], b = words[1], c = words[2], d = words[3];
}
inline void ld_acquire_gpu_global_s32(int& to, const int* from) {
    gpu::let_others_go_on();
    to = *from;
}
inline void ld_relaxed_gpu_global_s32(int& to, const int* from) { ld_acquire_gpu_global_s32(to, from); }
inline void st_release_gpu_global_s32(int* to, int value) {
    gpu::let_others_go_on();
    *to = value;
}
inline void atom_acq_rel_gpu_global_add_s32(int& before, int* counter, int value) {
    gpu::let_others_go_on();
    before = *counter;
    *counter += value;
}
inline void fence_sc_gpu() {}
inline void fence_proxy_async_shared_cta() {}
inline void prefetch_global_L1(const void*) {}
inline void prefetch_tensormap(const void*) {}

// Barriers.

inline void mbarrier_init_shared_cta_b64(u32 address, int arrivals) {
    gpu::shared(address, 8);
    block().barriers[address] = {arrivals, arrivals};
}
inline void mbarrier_arrive_shared_cta_b64(u32 address, int count) { gpu::arrive(gpu::barrier(address), count); }
inline void mbarrier_expect_tx_relaxed_cta_shared_cta_b64(u32 address, int bytes) { gpu::barrier(address).bytes += bytes; }
inline void mbarrier_try_wait_parity_shared_cta_b64(u32& done, u32 address, int parity) {
    const gpu::PhaseBarrier& barrier = gpu::barrier(address);
    gpu::wait_until([&barrier, parity] { return (barrier.over & 1) != parity; }, "the barrier at " + to_string(address));
    done = 1;
}
inline void bar_sync(int id, int threads) { sync_named(id, threads); }

// Asynchronous copies.

inline void cp_async_cg_shared_global(u32 to, const void* from, int, int bytes = 16) {
    unsigned char* at = gpu::shared(to, 16);
    gpu::poison(at, 16);
    lane().copies.push_back({at, static_cast<const unsigned char*>(from), bytes, 16 - bytes});
    ++lane().begun;
}
inline void cp_async_cg_shared_global_L2_cache_hint(u32 to, const void* from, int size, int bytes, u64) {
    cp_async_cg_shared_global(to, from, size, bytes);
}
inline void cp_async_mbarrier_arrive_noinc_shared_cta_b64(u32 address) {
    gpu::Lane& self = lane();
    const long begun = self.begun;
    gpu::machine.jobs.push_back({&self, [&self, begun, address] {
                                     gpu::finish_copies(self, begun);
                                     gpu::arrive(gpu::barrier(address), 1);
                                 }});
}
inline void cp_async_commit_group() { lane().groups.push_back(lane().begun); }
inline void cp_async_wait_group(int pending) {
    gpu::Lane& self = lane();
    for (; int(self.groups.size()) > pending; self.groups.pop_front()) gpu::finish_copies(self, self.groups.front());
}

// As emulated.py fills it in place of CUDA: 128 bytes.
struct TensorMap {
    const unsigned char* memory;
    u64 element_bytes;
    u64 strides[2];  // in bytes, of the two outer dimensions
    u64 box[2];      // bytes of the inner dimension, elements of the outermost one; one of the middle
};
inline void cp_async_bulk_tensor_3d_shared_cluster_global_tile_mbarrier_complete_tx_bytes_L2_cache_hint(
    u32 to, const void* map, int x, int y, int z, u32 barrier, u64) {
    TensorMap tensor;
    std::memcpy(&tensor, map, sizeof tensor);
    const int row_bytes = int(tensor.box[0]), rows = int(tensor.box[1]);
    gpu::check(to % 1024 % u32(row_bytes * 8) == 0, "a box that does not begin with the swizzle");
    unsigned char* at = gpu::shared(to, 16);
    gpu::shared(to + u32(row_bytes * rows) - 16, 16);
    gpu::poison(at, row_bytes * rows);
    const unsigned char* from =
        tensor.memory + (long long)(x) * (long long)tensor.element_bytes + y * (long long)tensor.strides[0] +
        z * (long long)tensor.strides[1];
    const long long stride = (long long)tensor.strides[1];
    gpu::machine.jobs.push_back({&lane(), [=] {
                                     for (int byte = 0; byte < row_bytes * rows; byte += 16) {
                                         const int row = byte / 128;
                                         std::memcpy(at + (byte ^ row % 8 * 16),
                                                     from + byte / row_bytes * stride + byte % row_bytes, 16);
                                     }
                                     gpu::PhaseBarrier& full = gpu::barrier(barrier);
                                     full.bytes -= row_bytes * rows;
                                     gpu::end_phase(full);
                                 }});
}
inline void elect_sync(u32& elected) {
    int nothing = 0;
    gpu::together("elect", nothing, [](int**) {});
    elected = lane().number == 0;
}

// Products. Fragments as in mma.cuh and wgmma.cuh.

struct Half {
    static float to_float(u16 bits) { return half_to_float(bits); }
};
struct Bfloat {
    static float to_float(u16 bits) { return bfloat_to_float(bits); }
};
// The 16 x 16 elements whose pairs the lanes hold.
template <typename Element>
void gather(float (&a)[16][16], const u32 (&words)[gpu::kLanes][4]) {
    for (int i = 0; i < gpu::kLanes; ++i) {
        for (int word = 0; word < 4; ++word) {
            const int row = i / 4 + word % 2 * 8, column = i % 4 * 2 + word / 2 * 8;
            a[row][column] = Element::to_float(u16(words[i][word]));
            a[row][column + 1] = Element::to_float(u16(words[i][word] >> 16));
        }
    }
}
struct MmaOperands {
    float* c[4];
    u32 a[4], b[2];
};
template <typename Element>
void mma(const char* name, MmaOperands own) {
    gpu::together(name, own, [](MmaOperands** lanes) {
        u32 words[gpu::kLanes][4];
        float a[16][16], b[8][16];
        for (int i = 0; i < gpu::kLanes; ++i) {
            std::memcpy(words[i], lanes[i]->a, sizeof words[i]);
            for (int k = 0; k < 4; ++k) {
                b[i / 4][k / 2 * 8 + i % 4 * 2 + k % 2] = Element::to_float(u16(lanes[i]->b[k / 2] >> k % 2 * 16));
            }
        }
        gather<Element>(a, words);
        for (int i = 0; i < gpu::kLanes; ++i) {
            for (int j = 0; j < 4; ++j) {
                float& sum = *lanes[i]->c[j];
                for (int k = 0; k < 16; ++k) sum += a[i / 4 + j / 2 * 8][k] * b[i % 4 * 2 + j % 2][k];
            }
        }
    });
}
inline void mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32(float& c0, float& c1, float& c2, float& c3, u32 a0, u32 a1,
                                                              u32 a2, u32 a3, u32 b0, u32 b1) {
    mma<Half>("mma f16", {{&c0, &c1, &c2, &c3}, {a0, a1, a2, a3}, {b0, b1}});
}
inline void mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32(float& c0, float& c1, float& c2, float& c3, u32 a0, u32 a1,
                                                                u32 a2, u32 a3, u32 b0, u32 b1) {
    mma<Bfloat>("mma bf16", {{&c0, &c1, &c2, &c3}, {a0, a1, a2, a3}, {b0, b1}});
}

struct Matrices {
    u32 address;
    u32 words[4];
};
inline Matrices ldmatrix(const char* name, u32 address, bool transposed) {
    Matrices own{address, {}};
    gpu::together(name, own, [transposed](Matrices** lanes) {
        for (int matrix = 0; matrix < 4; ++matrix) {
            u16 rows[8][8];
            for (int row = 0; row < 8; ++row) {
                std::memcpy(rows[row], gpu::shared(lanes[matrix * 8 + row]->address, 16), 16);
            }
            for (int i = 0; i < gpu::kLanes; ++i) {
                const int row = i / 4, column = i % 4 * 2;
                const u16 low = transposed ? rows[column][row] : rows[row][column];
                const u16 high = transposed ? rows[column + 1][row] : rows[row][column + 1];
                lanes[i]->words[matrix] = u32(high) << 16 | low;
            }
        }
    });
    return own;
}
inline void ldmatrix_sync_aligned_m8n8_x4_shared_b16(u32& a, u32& b, u32& c, u32& d, u32 address) {
    const Matrices m = ldmatrix("ldmatrix", address, false);
    a = m.words[0], b = m.words[1], c = m.words[2], d = m.words[3];
}
inline void ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16(u32& a, u32& b, u32& c, u32& d, u32 address) {
    const Matrices m = ldmatrix("ldmatrix.trans", address, true);
    a = m.words[0], b = m.words[1], c = m.words[2], d = m.words[3];
}

// Warpgroup products: each warp computes its 16 of the 64 rows, at some time between their commit and the wait for them.

// A matrix of 16-bit elements in shared memory with the swizzle of 128 bytes, as a descriptor says.
struct Tile {
    u32 start, leading, stride;
    explicit Tile(u64 descriptor)
        : start(u32(descriptor & 0x3fff) << 4), leading(u32(descriptor >> 16 & 0x3fff) << 4),
          stride(u32(descriptor >> 32 & 0x3fff) << 4) {
        gpu::check(descriptor >> 62 == 1, "a descriptor without the swizzle of 128 bytes");
    }
    static u16 at(u32 address) { return load<u16>(address ^ (address >> 7 & 7) << 4); }
    // Element k of row n, where rows lie along k; or where they lie along n.
    u16 along_k(int n, int k) const { return at(start + u32(n / 8) * stride + u32(n % 8 * 128 + k * 2)); }
    u16 along_n(int n, int k) const {
        return at(start + u32(n / 64) * leading + u32(k / 8) * stride + u32(k % 8 * 128 + n % 64 * 2));
    }
};
template <int kColumns>
struct ProductOperands {
    float* d[kColumns / 2];
    u32 a[4];  // where it is in registers
    u64 a_tile, b_tile;
    bool held, accumulate, b_along_n;
};
template <typename Element, int kColumns>
void multiply(const ProductOperands<kColumns> (&lanes)[gpu::kLanes], int warp_row) {
    const ProductOperands<kColumns>& any = lanes[0];
    float a[16][16];
    if (any.held) {
        u32 words[gpu::kLanes][4];
        for (int i = 0; i < gpu::kLanes; ++i) std::memcpy(words[i], lanes[i].a, sizeof words[i]);
        gather<Element>(a, words);
    } else {
        const Tile tile(any.a_tile);
        for (int row = 0; row < 16; ++row) {
            for (int k = 0; k < 16; ++k) a[row][k] = Element::to_float(tile.along_k(warp_row + row, k));
        }
    }
    const Tile tile(any.b_tile);
    for (int n = 0; n < kColumns; ++n) {
        float b[16];
        for (int k = 0; k < 16; ++k) b[k] = Element::to_float(any.b_along_n ? tile.along_n(n, k) : tile.along_k(n, k));
        for (int row = 0; row < 16; ++row) {
            float& d = *lanes[row % 8 * 4 + n % 8 / 2].d[n / 8 * 4 + row / 8 * 2 + n % 2];
            float sum = any.accumulate ? d : 0.0f;
            for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k];
            d = sum;
        }
    }
}
template <typename Element, int kColumns>
void start_product(const char* name, ProductOperands<kColumns> own) {
    gpu::together(name, own, [](ProductOperands<kColumns>** operands) {
        struct All {
            ProductOperands<kColumns> lanes[gpu::kLanes];
        } all;
        for (int i = 0; i < gpu::kLanes; ++i) all.lanes[i] = *operands[i];
        const int warp_row = int(lane().thread.x) % 128 / 32 * 16;
        gpu::ProductGroup& open = warp().open;
        if (open.products.empty()) {
            for (const auto& of : all.lanes) open.accumulators.insert(open.accumulators.end(), of.d, of.d + kColumns / 2);
        }
        open.products.push_back([all, warp_row] { multiply<Element, kColumns>(all.lanes, warp_row); });
    });
}
// Operands: the accumulators, then A's descriptor, B's and whether to add; or A's four words, B's descriptor and, unless it
// adds in any case, whether to.
template <typename Element, int kColumns, typename Pointers>
void wgmma(const char* name, int b_along_n, const Pointers& d, u64 a, u64 b, int accumulate) {
    ProductOperands<kColumns> own{{}, {}, a, b, false, accumulate != 0, b_along_n != 0};
    std::copy(d.begin(), d.end(), own.d);
    start_product<Element>(name, own);
}
template <typename Element, int kColumns, typename Pointers>
void wgmma(const char* name, int b_along_n, const Pointers& d, u32 a0, u32 a1, u32 a2, u32 a3, u64 b, int accumulate = 1) {
    ProductOperands<kColumns> own{{}, {a0, a1, a2, a3}, 0, b, true, accumulate != 0, b_along_n != 0};
    std::copy(d.begin(), d.end(), own.d);
    start_product<Element>(name, own);
}
template <size_t kCount>
using Accumulators = std::array<float*, kCount>;
#define PTX_WGMMA(COLUMNS, TYPE, ELEMENT) \
    template <typename... Operands> \
    void wgmma_mma_async_sync_aligned_m64n##COLUMNS##k16_f32_##TYPE##_##TYPE(int b_along_n, \
                                                                           const Accumulators<COLUMNS / 2>& d, \
                                                                           Operands... operands) { \
        wgmma<ELEMENT, COLUMNS>("wgmma " #COLUMNS " " #TYPE, b_along_n, d, operands...); \
    }
PTX_WGMMA(64, f16, Half)
PTX_WGMMA(64, bf16, Bfloat)
PTX_WGMMA(128, f16, Half)
PTX_WGMMA(128, bf16, Bfloat)
#undef PTX_WGMMA

inline void wgmma_fence_sync_aligned() { __syncwarp(); }
inline void wgmma_commit_group_sync_aligned() {
    int nothing = 0;
    gpu::together("wgmma.commit", nothing, [](int**) {
        gpu::Warp& self = warp();
        gpu::ProductGroup group = std::move(self.open);
        self.open = {};
        for (const gpu::ProductGroup& before : self.under_way) {
            // Accumulators that are poisoned already: values that come later are held by the group before.
            if (before.accumulators == group.accumulators) group.accumulators.clear();
        }
        for (float* accumulator : group.accumulators) group.held.push_back(*accumulator);
        for (float* accumulator : group.accumulators) *accumulator = NAN;
        self.under_way.push_back(std::move(group));
        while (!self.under_way.empty() && gpu::machine.below(2)) gpu::finish_products(self);
    });
}
template <size_t kCount>
void wgmma_wait_group_sync_aligned(const Accumulators<kCount>&, int pending) {
    int nothing = 0;
    gpu::together("wgmma.wait", nothing, [pending](int**) {
        while (int(warp().under_way.size()) > pending) gpu::finish_products(warp());
    });
}

// Nothing to do here.
inline void setmaxnreg_inc_sync_aligned_u32(int) {}
inline void setmaxnreg_dec_sync_aligned_u32(int) {}
inline void griddepcontrol_launch_dependents() {}
inline void griddepcontrol_wait() {}

}  // namespace ptx
