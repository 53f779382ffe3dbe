// CUDA's execution model on one processor: what a kernel compiled by g++ runs on.
//
// A launch runs its blocks one after another; the threads of a block are fibers that take turns, and change over only where
// CUDA makes them wait for each other. So a result that depends on the order in which threads happen to run shows as a
// difference between the orders below, and a wait that can never end is an error that names the places. What it is strict
// about, although some GPU might let it pass: a thread that ends while others of its block wait at a barrier, threads that
// wait at different barriers, a warp instruction whose mask names a thread that has ended or waits elsewhere, an access
// outside of allocated memory (a fault, reported with the thread), an access not aligned to its type.
//
//   order    0 forward: warps and lanes in increasing order, each as far as it can run; blocks in order
//            1 reverse: all that from the last to the first      2 shuffled: at random, from a seed
//   late     0: cp.async copies at once      1: at the wait that asks for it, never before
//   Shared memory starts every block as words 0x7fffffff: not a number as float32 or as two 16-bit floats, and as an index
//   far out of bounds.
//
// Not emulated: blocks that run at the same time and wait for one another, the memory model (a write is seen at once), time.
#ifndef CUDA_EMULATION_SIMT_H_
#define CUDA_EMULATION_SIMT_H_

#include <stddef.h>
#include <stdint.h>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace simt {

constexpr uint32_t kPoison = 0x7fffffffu;
constexpr unsigned kWarp = 32, kMostThreads = 1024;

// A block's shared memory at most, of every GPU that can be configured.
constexpr size_t kMostShared = 227 * 1024;

// A place in a source, by default arguments: the caller's.
struct Site {
  const char* file;
  int line;
};

// What the running thread reads as threadIdx and so on.
struct Indices {
  uint3 thread, block;
  dim3 block_size, grid_size;
};
extern Indices running;

// Runs `entry(closure)` in every thread of every block. Returns null, or what went wrong.
const char* run(dim3 grid, dim3 block, size_t shared_bytes, void (*entry)(void*), void* closure);

unsigned lane();
// Of the GPU, as configured; no result may depend on them.
int multiprocessors();
int capability();      // the major number: 8 for sm_80, 9 for sm_90a
size_t most_shared();  // of a block
unsigned char* dynamic_shared();
bool is_shared(const void* address, size_t bytes);

// Ends the launch with an error; the thread and its block are added to the text.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);

// The block's barrier; returns the sum of `value` over its threads.
int barrier(int value, const char* what, Site site);

// Waits until every lane of `mask` has come with the same `complete`; the last to come calls complete(mask, operands) for
// all, with each lane's operand (null where not in `mask`).
void rendezvous(uint32_t mask, void* operand, void (*complete)(uint32_t mask, void* const* operands), const char* what,
                Site site);

// Lets the others run.
void yield();

// cp.async of 16 bytes; from null: zeros.
void copy_async(void* shared, const void* global);
void commit_copies();
void wait_copies(int groups_left);

// The host waits for the device, or has it allocate.
void count_wait();

// Every thread of the next launch must call await_previous().
void expect_await();
void await_previous();

}  // namespace simt
#endif  // CUDA_EMULATION_SIMT_H_
