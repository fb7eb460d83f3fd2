// A GPU for kernels under test: every thread is a fiber. Warps go on in any order that a seed decides, lanes of a warp too;
// what is asynchronous is done some time before it is waited for. Up to kResident blocks of a launch are there at once.
#pragma once
#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector>

namespace gpu {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 128 << 10;
constexpr int kNamedBarriers = 16;

struct Dim {
    unsigned x, y, z;
};

// A barrier in shared memory: a phase ends with as many arrivals as are expected and when all announced bytes are there.
struct PhaseBarrier {
    int expected = 0, pending = 0;
    long bytes = 0;
    int over = 0;  // phases
};
struct NamedBarrier {
    int arrived = 0, over = 0;
};

struct Block {
    Dim index;
    unsigned char* shared;
    size_t shared_bytes;
    std::map<uint32_t, PhaseBarrier> barriers;
    NamedBarrier named[kNamedBarriers];
};

// Products of a warpgroup that are under way, as one warp sees them.
struct ProductGroup {
    std::vector<std::function<void()>> products;
    std::vector<float*> accumulators;  // whose values are held, so that who reads them too soon finds NaN
    std::vector<float> held;
};

struct Warp {
    Block* block;
    int weight;        // how often it is chosen
    int arrived = 0;   // lanes at the warp's current instruction
    int turns = 0;     // such instructions that are done
    const char* instruction = nullptr;
    void* operands[kLanes];
    ProductGroup open;
    std::deque<ProductGroup> under_way;
};

struct Copy {
    unsigned char* to;
    const unsigned char* from;
    int bytes, zeros;
};

struct Lane {
    Warp* warp;
    Dim thread;
    int number;  // in its warp
    jmp_buf here;
    ucontext_t start;
    bool started = false, finished = false;
    std::function<bool()> until;  // what it waits for; none: nothing
    std::string waits_for;
    std::deque<Copy> copies;       // that it has begun, in order
    long begun = 0, done = 0;      // of them
    std::deque<long> groups;       // how many had begun at each commit
};

struct Machine {
    std::mt19937_64 random;
    struct Job {
        Lane* asked_by;
        std::function<void()> work;
    };
    std::vector<Job> jobs;  // what the copy engines still have to do
    Lane* current = nullptr;
    jmp_buf scheduler;
    std::string fault;
    Dim grid;
    int threads;  // of a block

    int below(int limit) { return int(random() % uint64_t(limit)); }
};
inline Machine machine;

inline Lane& lane() { return *machine.current; }
inline Warp& warp() { return *lane().warp; }
inline Block& block() { return *warp().block; }

// Ends the launch.
[[noreturn]] inline void fail(const std::string& what) {
    if (machine.fault.empty()) machine.fault = what;
    _longjmp(machine.scheduler, 1);
}
inline void check(bool holds, const char* what) {
    if (!holds) fail(what);
}

// Lets others go on, until a condition holds.
template <typename Condition>
void wait_until(const Condition& holds, const std::string& what) {
    Lane& self = lane();
    self.until = holds;
    self.waits_for = what;
    if (_setjmp(self.here) == 0) _longjmp(machine.scheduler, 1);
}
inline void let_others_go_on() {
    wait_until([] { return true; }, "its turn");
}

// An instruction of the whole warp: the last lane to come does it for all. Each lane's operands are given by reference.
template <typename Operands, typename Do>
void together(const char* instruction, Operands& own, const Do& all) {
    Warp& self = warp();
    if (self.arrived == 0) self.instruction = instruction;
    if (self.instruction != instruction && std::strcmp(self.instruction, instruction) != 0) {
        fail(std::string("lanes of a warp are at ") + self.instruction + " and at " + instruction);
    }
    self.operands[lane().number] = &own;
    if (++self.arrived < kLanes) {
        const int turn = self.turns;
        wait_until([&self, turn] { return self.turns != turn; }, std::string("all lanes at ") + instruction);
        return;
    }
    Operands* operands[kLanes];
    for (int i = 0; i < kLanes; ++i) operands[i] = static_cast<Operands*>(self.operands[i]);
    all(operands);
    self.arrived = 0;
    ++self.turns;
}

// Memory.

inline unsigned char* shared(uint32_t address, int bytes) {
    check(address + size_t(bytes) <= block().shared_bytes, "an address beyond shared memory");
    check(address % uint32_t(bytes < 16 ? bytes : 16) == 0, "a misaligned address in shared memory");
    return block().shared + address;
}
inline void poison(unsigned char* to, int bytes) { std::memset(to, 0xff, size_t(bytes)); }

inline PhaseBarrier& barrier(uint32_t address) {
    const auto found = block().barriers.find(address);
    check(found != block().barriers.end(), "a barrier that was not set up");
    return found->second;
}
inline void end_phase(PhaseBarrier& barrier) {
    check(barrier.pending >= 0, "more arrivals than a phase has");
    if (barrier.pending > 0 || barrier.bytes != 0) return;
    barrier.pending = barrier.expected;
    ++barrier.over;
}
inline void arrive(PhaseBarrier& barrier, int count) {
    barrier.pending -= count;
    end_phase(barrier);
}

// Does a lane's copies up to one.
inline void finish_copies(Lane& of, long until) {
    for (; of.done < until; ++of.done) {
        const Copy copy = of.copies.front();
        of.copies.pop_front();
        std::memcpy(copy.to, copy.from, size_t(copy.bytes));
        std::memset(copy.to + copy.bytes, 0, size_t(copy.zeros));
    }
}

inline void finish_products(Warp& of) {
    ProductGroup group = std::move(of.under_way.front());
    of.under_way.pop_front();
    for (size_t i = 0; i < group.accumulators.size(); ++i) *group.accumulators[i] = group.held[i];
    for (const auto& product : group.products) product();
}

// Scheduling.

using Kernel = void (*)(const void*);
inline Kernel kernel;
inline const void* parameters;

inline void begin_lane() {
    kernel(parameters);
    lane().finished = true;
    _longjmp(machine.scheduler, 1);
}

// One lane's turn, until it waits for something; false where it waits already.
inline bool go_on(Lane& self) {
    if (self.finished || (self.until && !self.until())) return false;
    machine.current = &self;
    if (_setjmp(machine.scheduler) == 0) {
        if (self.started) _longjmp(self.here, 1);
        self.started = true;
        setcontext(&self.start);
    }
    return true;
}

// One turn of some of a warp's lanes, which may drift apart until their next common instruction; false where these all wait.
inline bool go_on(std::vector<Lane>& lanes, size_t first, int count) {
    bool moved = false;
    const int begin = machine.below(kLanes);
    for (int i = 0; i < count && machine.fault.empty(); ++i) moved |= go_on(lanes[first + size_t((begin + i) % kLanes)]);
    return moved;
}

inline void do_some_job() {
    const size_t chosen = size_t(machine.below(int(machine.jobs.size())));
    const Machine::Job job = std::move(machine.jobs[chosen]);
    machine.jobs[chosen] = std::move(machine.jobs.back());
    machine.jobs.pop_back();
    machine.current = job.asked_by;
    if (_setjmp(machine.scheduler) == 0) job.work();
}

inline std::string who_waits(const std::vector<Lane>& lanes) {
    std::string text = "nobody goes on:";
    for (const Lane& lane : lanes) {
        if (!lane.finished && lane.number == 0) {
            text += " block " + std::to_string(lane.warp->block->index.x) + " warp " + std::to_string(lane.thread.x / 32) +
                    " waits for " + lane.waits_for + ";";
        }
    }
    return text;
}

inline void run_all(std::vector<Lane>& lanes, std::vector<Warp>& warps) {
    const int eagerness = 1 << machine.below(8);  // of the copy engines, against 128 of the warps
    int chances = 0;
    for (Warp& warp : warps) chances += warp.weight = 1 << machine.below(6);
    for (;;) {
        if (!machine.jobs.empty() && machine.below(128) < eagerness) do_some_job();
        int chosen = machine.below(chances);
        size_t first = 0;
        while ((chosen -= warps[first].weight) >= 0) ++first;
        bool moved = go_on(lanes, first * kLanes, machine.below(4) ? kLanes : 1 + machine.below(kLanes));
        for (size_t i = 0; i < warps.size() && !moved; ++i) {
            moved = go_on(lanes, (first + i) % warps.size() * kLanes, kLanes);
        }
        if (!machine.fault.empty()) return;
        if (moved) continue;
        if (!machine.jobs.empty()) {
            do_some_job();
            continue;
        }
        for (const Lane& lane : lanes) {
            if (!lane.finished) machine.fault = who_waits(lanes);
        }
        return;
    }
}

// Runs blocks `first` up to `end` of a grid, all at once.
inline void run_blocks(unsigned first, unsigned end, size_t shared_bytes) {
    const unsigned threads = unsigned(machine.threads), blocks = end - first;
    machine.jobs.clear();
    std::vector<Block> grid(blocks);
    std::vector<Warp> warps(blocks * threads / kLanes);
    std::vector<Lane> lanes(blocks * threads);
    const size_t stacks_bytes = kStackBytes * lanes.size();
    constexpr int kProtection = PROT_READ | PROT_WRITE, kKind = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    auto* stacks = static_cast<unsigned char*>(mmap(nullptr, stacks_bytes, kProtection, kKind, -1, 0));
    std::vector<std::vector<unsigned char>> memory(blocks);
    for (unsigned b = 0; b < blocks; ++b) {
        memory[b].assign(shared_bytes + 1024, 0xff);  // NaN of all types
        const auto begin = reinterpret_cast<uintptr_t>(memory[b].data());
        const unsigned number = first + b, x = machine.grid.x, y = machine.grid.y;
        grid[b].index = {number % x, number / x % y, number / x / y};
        grid[b].shared = memory[b].data() + (1024 - begin % 1024) % 1024;
        grid[b].shared_bytes = shared_bytes;
    }
    for (size_t i = 0; i < lanes.size(); ++i) {
        Lane& lane = lanes[i];
        lane.warp = &warps[i / kLanes];
        lane.warp->block = &grid[i / threads];
        lane.thread = {unsigned(i % threads), 0, 0};
        lane.number = int(i % kLanes);
        getcontext(&lane.start);
        lane.start.uc_stack.ss_sp = stacks + i * kStackBytes;
        lane.start.uc_stack.ss_size = kStackBytes;
        lane.start.uc_link = nullptr;
        makecontext(&lane.start, begin_lane, 0);
    }
    run_all(lanes, warps);
    munmap(stacks, stacks_bytes);
}

// Runs a grid; returns what went wrong, an empty text if nothing did. Blocks that wait for others of more than kResident
// would wait for ever.
constexpr unsigned kResident = 64;
inline std::string launch(Kernel entry, const void* params, Dim grid, unsigned threads, size_t shared_bytes, uint64_t seed) {
    kernel = entry;
    parameters = params;
    machine.random.seed(seed);
    machine.fault.clear();
    machine.grid = grid;
    machine.threads = int(threads);
    const unsigned blocks = grid.x * grid.y * grid.z;
    for (unsigned first = 0; first < blocks && machine.fault.empty(); first += kResident) {
        run_blocks(first, blocks < first + kResident ? blocks : first + kResident, shared_bytes);
    }
    return machine.fault;
}

}  // namespace gpu
