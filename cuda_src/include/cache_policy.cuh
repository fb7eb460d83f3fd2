// How long the L2 cache keeps what a copy brings: a hint that copies take, for compute capability 8.0 or higher.
#pragma once
#include "types.cuh"

// Values of CUTLASS (CacheHintSm90). `createpolicy` makes the second of evict_first for all bytes. What it makes of
// evict_normal is another than the first, and slower than no hint (bench/NOTES.md).
constexpr u64 kNormalPolicy = 0x1000000000000000u;    // as without a hint
constexpr u64 kReadOncePolicy = 0x12f0000000000000u;  // leaves first: else it would drive out what others read
