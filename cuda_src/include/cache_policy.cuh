// How long the L2 cache keeps what a copy brings: a hint that copies take, for compute capability 8.0 or higher.
#pragma once
#include "types.cuh"

// As `createpolicy` makes them for all of a copy's bytes; the values are those of CUTLASS (CacheHintSm90).
constexpr u64 kNormalPolicy = 0x1000000000000000u;    // as without a hint
constexpr u64 kReadOncePolicy = 0x12f0000000000000u;  // leaves first: else it would drive out what others read
