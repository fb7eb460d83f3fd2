// Grid (any), block 128 threads: edits of the arrays of a plan for tree_decode_sm90, read from the host's memory.
#include "types.cuh"

constexpr int kThreads = 128;

struct alignas(8) Edit {
    int at;
    int value;
};
static_assert(sizeof(Edit) == 8, "as GrowingPlan.write_edits writes them");

// Mirrored field by field in fasttree_cupy/execution/edits.py.
struct EditPlanParams {
    int* packed;        // [elements]: all arrays of the plan
    const Edit* edits;  // [count], in page-locked host memory; no two are of one element
    int count;
    int padding;
};
static_assert(sizeof(EditPlanParams) == 24, "as EDIT_PLAN_PARAMS in edits.py");

extern "C" __global__ void __launch_bounds__(kThreads) edit_plan(const __grid_constant__ EditPlanParams p) {
    for (int i = blockIdx.x * kThreads + threadIdx.x; i < p.count; i += gridDim.x * kThreads) {
        const Edit edit = p.edits[i];
        p.packed[edit.at] = edit.value;
    }
}
