// Grid (ceil(count / 128) or more), block 128 threads: edits of the arrays of a plan for tree_decode_sm90, a thread each.
#include "types.cuh"

constexpr int kThreads = 128;
static_assert(kThreads == FT_THREADS, "host and device agree on a block's threads");
constexpr int kMostEdits = 510;  // of a launch: its parameters are 4 KB at most

struct alignas(8) Edit {
    int at;
    int value;
};
static_assert(sizeof(Edit) == 8, "as GrowingPlan.edits holds them");

// Mirrored field by field in fasttree_cupy/execution/edits.py. The edits themselves are parameters, so that no memory of
// the host is read after the launch.
struct EditPlanParams {
    int* packed;  // [elements]: all arrays of the plan
    int count;
    int padding;
    Edit edits[kMostEdits];  // [count]; no two are of one element
};
static_assert(sizeof(EditPlanParams) == 4096, "as EDIT_PLAN_PARAMS in edits.py");

extern "C" __global__ void __launch_bounds__(kThreads) edit_plan(const __grid_constant__ EditPlanParams p) {
    const int i = blockIdx.x * kThreads + threadIdx.x;
    if (i < p.count) p.packed[p.edits[i].at] = p.edits[i].value;
}
