// Compile-time configuration: the -D options of kernels.py enter here, once, and are constants everywhere else.
#pragma once
#include "float8.cuh"

#if !defined(FT_ELEMENT) || !defined(FT_HEAD_DIM) || !defined(FT_SOFT_CAP)
#error "FT_ELEMENT (Float16 or BFloat16), FT_HEAD_DIM and FT_SOFT_CAP (0 or 1) are given by kernels.py"
#endif

using Element = FT_ELEMENT;
#if defined(FT_KV_ELEMENT)
using KVElement = FT_KV_ELEMENT;  // Float8E4M3 or Float8E5M2
// What tree_decode_sm90 multiplies: queries and keys, weights and values. Float8 is float16 in one instruction.
using ProductElement = Float16;
#else
using KVElement = Element;
using ProductElement = Element;
#endif
using KVBits = KVElement::Bits;
constexpr bool kFloat8 = sizeof(KVBits) == 1;
constexpr int kHeadDim = FT_HEAD_DIM;
constexpr bool kSoftCap = FT_SOFT_CAP;  // a branch in every score would cost more than the products do
constexpr int kWarpSize = 32;

static_assert(kHeadDim == 16 || kHeadDim == 32 || kHeadDim == 64 || kHeadDim == 128 || kHeadDim == 256,
              "head_dim must be 16, 32, 64, 128 or 256");
