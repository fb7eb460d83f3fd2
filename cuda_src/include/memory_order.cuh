// Reads and writes of global memory by which blocks order what they did before.
#pragma once

// Adds to a counter in global memory, after this thread's writes and those it has seen, and before its later reads.
__device__ __forceinline__ int add_acquire_release(int* counter, int value) {
    int before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(value) : "memory");
    return before;
}

// Of two threads that each write, then fence, then read what the other wrote, one at least reads it.
__device__ __forceinline__ void fence_sequential() { asm volatile("fence.sc.gpu;" ::: "memory"); }

// Reads, and writes, that other threads' writes and reads are ordered by.
__device__ __forceinline__ int load_acquire(const int* address) {
    int value;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}
__device__ __forceinline__ int load_relaxed(const int* address) {
    int value;
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}
__device__ __forceinline__ void store_release(int* address, int value) {
    asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}
