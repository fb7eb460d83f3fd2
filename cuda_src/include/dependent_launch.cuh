// Kernels that begin before the one ahead of them in the stream has ended.
#pragma once

// Programmatic dependent launch: lets the next kernel in the stream begin when all blocks have come here. For kernels of
// compute capability 9.0 alone. Nothing where the launch does not ask for it, as below.
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
// Waits for the end of the kernel ahead, whose writes are then there.
__device__ __forceinline__ void wait_for_launcher() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
