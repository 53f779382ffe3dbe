// The scheduler of fibers behind simt.h.
#include "simt.h"

#include <link.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <mutex>
#include <numeric>
#include <vector>

#include "configuration.h"
#include "guarded_memory.h"

#ifndef __x86_64__
#error "the switch of fibers is written for x86-64"
#endif

// Saves the callee-saved registers and the stack pointer in *save, goes on where `load` was saved.
extern "C" void simt_switch(void** save, void* load);
asm(R"(
.text
.hidden simt_switch
.type simt_switch, @function
simt_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size simt_switch, .-simt_switch
)");

namespace simt {

Indices running;

namespace {

struct Copy {
  void* shared;
  const void* global;
  int group;
};

struct Thread {
  uint3 index;
  void* stack_pointer;
  enum { ready, at_barrier, at_rendezvous, ended } state;
  uint32_t mask;
  void* operand;
  void (*complete)(uint32_t, void* const*);
  const char* what;
  Site site;
  std::vector<Copy> copies;
  int group;  // of the next copy
  bool awaited;
};

std::mutex one_launch;

// The launch under way.
Thread threads[kMostThreads];
uint32_t ready_lanes[kMostThreads / kWarp];
uint32_t waiting_lanes[kMostThreads / kWarp];  // at a rendezvous
unsigned num_threads, num_warps, num_ended, num_at_barrier;
Thread* first_at_barrier;
int barrier_sum, barrier_result;
bool next_must_await, must_await;
Thread* current;  // null while the scheduler runs
void* scheduler_stack;
void (*entry)(void*);
void* closure;
unsigned char* shared;  // ends at a page that nothing may touch
size_t shared_bytes;
bool failed;
char error[1024];

// This library's thread-local memory: .tdata, then .tbss, where __shared__ arrays are. (A thread_local that is no shared
// array must have an initial value, which puts it into .tdata.)
thread_local volatile char anchor;
unsigned char *static_shared, *static_shared_end;

int find_static_shared(dl_phdr_info* info, size_t, void*) {
  bool ours = false;
  const ElfW(Phdr)* tls = nullptr;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr) & header = info->dlpi_phdr[i];
    const uintptr_t at = reinterpret_cast<uintptr_t>(&configuration) - info->dlpi_addr;
    if (header.p_type == PT_LOAD && at >= header.p_vaddr && at < header.p_vaddr + header.p_memsz) ours = true;
    if (header.p_type == PT_TLS) tls = &header;
  }
  if (!ours || !tls) return 0;
  static_shared = static_cast<unsigned char*>(info->dlpi_tls_data) + tls->p_filesz;
  static_shared_end = static_cast<unsigned char*>(info->dlpi_tls_data) + tls->p_memsz;
  return 1;
}

unsigned number(const Thread* thread) { return static_cast<unsigned>(thread - threads); }

void set_ready(Thread* thread) {
  thread->state = Thread::ready;
  ready_lanes[number(thread) / kWarp] |= 1u << number(thread) % kWarp;
}

// The first of n, in the order of this launch and going around after `last`, that `is_ready`; n where none is.
template <typename IsReady>
unsigned choose(unsigned n, unsigned last, IsReady is_ready) {
  const unsigned step = configuration.order == 1 ? n - 1 : 1;
  unsigned i = configuration.order == 2 ? configuration.random() % n : last;
  for (unsigned count = 0; count < n; ++count, i = (i + step) % n) {
    if (is_ready(i)) return i;
  }
  return n;
}

// The thread that goes on, looked for from thread number `start` on.
Thread* next_thread(unsigned start) {
  const unsigned warp = choose(num_warps, start / kWarp, [](unsigned w) { return ready_lanes[w] != 0; });
  if (warp == num_warps) return nullptr;
  const unsigned first_lane = warp == start / kWarp ? start % kWarp : configuration.order == 1 ? kWarp - 1 : 0;
  return &threads[warp * kWarp + choose(kWarp, first_lane, [&](unsigned l) { return (ready_lanes[warp] >> l & 1) != 0; })];
}

unsigned first_thread() { return configuration.order == 1 ? num_threads - 1 : 0; }

void set_running(Thread* thread) {
  current = thread;
  running.thread = thread->index;
  ready_lanes[number(thread) / kWarp] &= ~(1u << number(thread) % kWarp);
}

int name_thread(char* text, size_t size, const Thread* t) {
  return snprintf(text, size, "thread (%u, %u, %u)", t->index.x, t->index.y, t->index.z);
}

const char* short_name(const char* file) {
  const char* slash = strrchr(file, '/');
  return slash ? slash + 1 : file;
}

[[noreturn]] void leave() {
  void* unused;
  failed = true;
  simt_switch(&unused, scheduler_stack);
  abort();
}

[[noreturn]] void fail_between(const Thread* waiting, const Thread* other, const char* format) {
  char first[64], second[64];
  name_thread(first, sizeof(first), waiting);
  name_thread(second, sizeof(second), other);
  char other_place[128] = "";
  if (other->state != Thread::ended) {
    snprintf(other_place, sizeof(other_place), "%s (%s:%d)", other->what, short_name(other->site.file), other->site.line);
  }
  char text[512];
  snprintf(text, sizeof(text), format, second, other_place);
  snprintf(error, sizeof(error), "%s of block (%u, %u, %u) waits at %s (%s:%d), %s", first, running.block.x, running.block.y,
           running.block.z, waiting->what, short_name(waiting->site.file), waiting->site.line, text);
  leave();
}

// Gives the processor to the next thread that can run, looked for from `start` on; where there is none, to the scheduler.
void change_over(unsigned start) {
  Thread* const from = current;
  Thread* const to = next_thread(start);
  if (!to && num_ended < num_threads) {
    const auto* waiting = std::find_if(threads, threads + num_threads, [](auto& t) { return t.state != Thread::ended; });
    const auto* other = std::find_if(threads, threads + num_threads, [&](auto& t) {
      return t.state == Thread::ended || t.what != waiting->what || t.site.line != waiting->site.line;
    });
    fail_between(waiting, other == threads + num_threads ? waiting : other, "while %s waits at %s: nothing can go on");
  }
  if (to) set_running(to);
  if (to != from) simt_switch(&from->stack_pointer, to ? to->stack_pointer : scheduler_stack);
}

void thread_main() {
  entry(closure);
  if (must_await && !current->awaited) fail("ended without await_previous()");
  current->state = Thread::ended;
  ++num_ended;
  const unsigned warp = number(current) / kWarp;
  for (unsigned i = 0; (num_at_barrier || waiting_lanes[warp]) && i < num_threads; ++i) {
    const Thread& other = threads[i];
    const bool names_us = i / kWarp == warp && other.mask >> number(current) % kWarp & 1;
    if (other.state == Thread::at_barrier || (other.state == Thread::at_rendezvous && names_us)) {
      fail_between(&other, current, "but %s%s has ended");
    }
  }
  change_over(number(current));
  abort();  // nothing wakes a thread that has ended
}

void start(unsigned i, dim3 block) {
  Thread& t = threads[i];
  t.index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
  t.copies.clear();
  t.group = 0;
  t.awaited = false;
  // As simt_switch left a stack: six registers, then where to return to, which a call would find 8 bytes off alignment.
  void** slot = reinterpret_cast<void**>(stack_top(i) - 16);
  slot[0] = reinterpret_cast<void*>(thread_main);
  t.stack_pointer = slot - 6;
  std::fill(slot - 6, slot, nullptr);
  set_ready(&t);
}

void on_fault(int signal, siginfo_t* info, void*) {
  if (!current) {  // not a thread's fault
    struct sigaction by_default = {};
    by_default.sa_handler = SIG_DFL;
    sigaction(signal, &by_default, nullptr);
    return;
  }
  if (signal == SIGSEGV || signal == SIGBUS) {
    fail("an access at %p, outside of any memory or misaligned", info->si_addr);
  }
  fail("%s", signal == SIGFPE ? "an integer division by zero" : "undefined behaviour (an index or an alignment)");
}

// While a launch runs, a fault in a thread ends the launch and not the process.
class Faults {
 public:
  Faults() {
    constexpr size_t kBytes = 64 * 1024;
    static unsigned char* const alternate = between_guards(kBytes);
    stack_t stack = {};
    stack.ss_sp = alternate;
    stack.ss_size = kBytes;
    sigaltstack(&stack, &old_stack_);
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < kSignals; ++i) sigaction(signals_[i], &action, &old_[i]);
  }
  ~Faults() {
    for (int i = 0; i < kSignals; ++i) sigaction(signals_[i], &old_[i], nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  static constexpr int kSignals = 4;
  const int signals_[kSignals] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
  struct sigaction old_[kSignals];
  stack_t old_stack_;
};

void copy_16(void* to, const void* from) {
  if (from) {
    memcpy(to, from, 16);
  } else {
    memset(to, 0, 16);
  }
}

void run_block(dim3 block) {
  poison(static_shared, static_shared_end);
  poison(shared, shared + shared_bytes);
  num_ended = num_at_barrier = 0;
  barrier_sum = 0;
  std::fill(ready_lanes, ready_lanes + kMostThreads / kWarp, 0);
  std::fill(waiting_lanes, waiting_lanes + kMostThreads / kWarp, 0);
  for (unsigned i = 0; i < num_threads; ++i) start(i, block);
  set_running(next_thread(first_thread()));
  simt_switch(&scheduler_stack, current->stack_pointer);
  current = nullptr;
}

}  // namespace

const char* run(dim3 grid, dim3 block, size_t bytes, void (*entry_)(void*), void* closure_) {
  const std::lock_guard<std::mutex> lock(one_launch);
  ++launches;
  must_await = next_must_await;
  next_must_await = false;
  if (configuration.launches_to_failure > 0 && --configuration.launches_to_failure == 0) return "it was to fail";
  if (!configuration.runs) return nullptr;
  anchor = 0;  // so that this thread has its .tbss
  dl_iterate_phdr(find_static_shared, nullptr);
  static unsigned char* const shared_end = between_guards(kMostShared) + whole_pages(kMostShared);
  num_threads = block.x * block.y * block.z;
  num_warps = (num_threads + kWarp - 1) / kWarp;
  shared_bytes = (bytes + 127) / 128 * 128;
  shared = shared_end - shared_bytes;
  entry = entry_;
  closure = closure_;
  running.block_size = block;
  running.grid_size = grid;
  failed = false;

  std::vector<uint64_t> blocks(static_cast<uint64_t>(grid.x) * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), 0);
  if (configuration.order == 1) std::reverse(blocks.begin(), blocks.end());
  if (configuration.order == 2) std::shuffle(blocks.begin(), blocks.end(), configuration.random);
  const Faults faults;
  for (const uint64_t i : blocks) {
    running.block = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                     static_cast<unsigned>(i / grid.x / grid.y)};
    run_block(block);
    if (failed) return error;
  }
  return nullptr;
}

void expect_await() { next_must_await = true; }
void await_previous() { current->awaited = true; }

unsigned lane() { return number(current) % kWarp; }

unsigned char* dynamic_shared() { return shared; }

bool is_shared(const void* address, size_t bytes) {
  const auto* p = static_cast<const unsigned char*>(address);
  return (p >= shared && p + bytes <= shared + shared_bytes) || (p >= static_shared && p + bytes <= static_shared_end);
}

void fail(const char* format, ...) {
  char who[64], text[512];
  name_thread(who, sizeof(who), current);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  snprintf(error, sizeof(error), "%s of block (%u, %u, %u): %s", who, running.block.x, running.block.y, running.block.z,
           text);
  leave();
}

int barrier(int value, const char* what, Site site) {
  current->what = what;
  current->site = site;
  current->state = Thread::at_barrier;
  for (unsigned i = 0; num_ended && i < num_threads; ++i) {
    if (threads[i].state == Thread::ended) fail_between(current, &threads[i], "but %s%s has ended");
  }
  if (num_at_barrier == 0) first_at_barrier = current;
  const Site first = first_at_barrier->site;
  if (first.line != site.line || strcmp(first.file, site.file) != 0) fail_between(current, first_at_barrier, "%s at %s");
  barrier_sum += value;
  if (++num_at_barrier < num_threads) {
    change_over(number(current));
  } else {
    num_at_barrier = 0;
    barrier_result = barrier_sum;
    barrier_sum = 0;
    for (unsigned i = 0; i < num_threads; ++i) set_ready(&threads[i]);
    change_over(first_thread());
  }
  return barrier_result;
}

void rendezvous(uint32_t mask, void* operand, void (*complete)(uint32_t, void* const*), const char* what, Site site) {
  const unsigned warp = number(current) / kWarp, lane = number(current) % kWarp;
  Thread* const lanes = &threads[warp * kWarp];
  const uint32_t existing = num_threads - warp * kWarp >= kWarp ? ~0u : (1u << (num_threads - warp * kWarp)) - 1;
  if (!(mask >> lane & 1))
    fail("%s (%s:%d) with mask %08x, without its own lane", what, short_name(site.file), site.line, mask);
  if (mask & ~existing)
    fail("%s (%s:%d) with mask %08x; the warp has %08x", what, short_name(site.file), site.line, mask, existing);
  current->what = what;
  current->site = site;
  current->state = Thread::at_rendezvous;
  current->mask = mask;
  current->operand = operand;
  current->complete = complete;
  waiting_lanes[warp] |= 1u << lane;
  bool all = true;
  for (unsigned i = 0; i < kWarp; ++i) {
    if (!(mask >> i & 1)) continue;
    const Thread& other = lanes[i];
    if (other.state == Thread::ended) fail_between(current, &other, "but %s%s has ended");
    all = all && other.state == Thread::at_rendezvous && other.mask == mask;
    if (other.state != Thread::at_rendezvous || other.mask != mask) continue;
    if (other.complete != complete || strcmp(other.what, what) != 0 || other.site.line != site.line ||
        strcmp(other.site.file, site.file) != 0) {
      fail_between(current, &other, "%s at %s");
    }
  }
  if (!all) return change_over(number(current));
  void* operands[kWarp];
  for (unsigned i = 0; i < kWarp; ++i) operands[i] = mask >> i & 1 ? lanes[i].operand : nullptr;
  complete(mask, operands);
  waiting_lanes[warp] &= ~mask;
  for (unsigned i = 0; i < kWarp; ++i) {
    if (mask >> i & 1) set_ready(&lanes[i]);
  }
  change_over(warp * kWarp + (configuration.order == 1 ? kWarp - 1 : 0));
}

void yield() {
  set_ready(current);
  sched_yield();
  const unsigned step = configuration.order == 1 ? num_threads - 1 : 1;
  change_over((number(current) + step) % num_threads);
}

void copy_async(void* shared, const void* global) {
  if (configuration.late) {
    current->copies.push_back({shared, global, current->group});
  } else {
    copy_16(shared, global);
  }
}

void commit_copies() { ++current->group; }

void wait_copies(int groups_left) {
  std::vector<Copy>& copies = current->copies;
  const auto last =
      std::find_if(copies.begin(), copies.end(), [&](const Copy& c) { return c.group >= current->group - groups_left; });
  for (auto copy = copies.begin(); copy != last; ++copy) copy_16(copy->shared, copy->global);
  copies.erase(copies.begin(), last);
}

}  // namespace simt
