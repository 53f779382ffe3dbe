// Collectives over shared memory: include/collective.h. Compiled once, for baseline x86-64 (sums only, no product to fuse).
//
// THE SEGMENT
//   a header (who belongs, how far each rank has got), then 2 slots of kSlotFloats for every rank. A call passes its data
//   through the slots in chunks: each rank copies its chunk into its own slot, all meet, each reads the slots of all. Chunks
//   alternate between a rank's two slots. To write slot s again a rank must have passed the meeting of the chunk between,
//   and every rank had finished reading slot s before it came to that meeting: so one meeting a chunk is enough.
//
// HOW RANKS JOIN
//   Rank 0 removes what dead jobs left (any segment of ours whose rank 0 no longer lives, this job's name among them),
//   creates the name with O_EXCL, fills in the header with its pid and process start time and stores the magic number last.
//   The others open the name again and again until they find a segment with the magic number, the right size and world,
//   still joining, whose rank 0 lives: pid and start time together cannot be those of a dead process whose pid was given out
//   again. A segment of a killed job never passes, so it can only cost another turn of the loop. A rank then claims its
//   place (compare and swap of its pid, so two processes cannot both be rank 1) and waits. When every place is taken, rank 0
//   removes the name and turns the phase from joining to ready. A rank that gives up (time-out, a dead peer) turns it to
//   broken instead: the phase leaves `joining` once, by compare and swap, so either all ranks joined or none did. Whoever
//   finds rank 0 dead removes the name.
#include "../include/collective.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <atomic>

#include "counters.h"

namespace {

constexpr uint64_t kMagic = 0x70644d69'7874726cull;  // changes with the layout below
constexpr char kPrefix[] = "paddle-mixtral-";
constexpr int64_t kSlotFloats = 64 * 1024;
// From here on each rank adds up its share of a chunk and the others copy it: 3 n floats moved instead of (world + 1) n.
constexpr int kShareWorld = 3;
constexpr int64_t kShareFloats = 8 * 1024;
constexpr double kLivenessPeriod = 0.05, kJoinPoll = 0.001;

enum Phase : uint32_t { joining, ready, broken };

struct Member {
  alignas(64) std::atomic<uint64_t> arrived;  // meetings this rank has come to
  uint64_t call[2];                           // what it was doing at the last two
  alignas(64) std::atomic<int32_t> pid;       // 0: nobody has claimed this place
  uint64_t start_time;
  std::atomic<uint32_t> joined, left;
};

struct Header {
  std::atomic<uint64_t> magic;
  uint64_t pid_namespace;  // in which the pids below mean something: containers may share /dev/shm and not their pids
  int32_t world;
  std::atomic<uint32_t> phase;
  Member member[PM_MAX_RANKS];
};
static_assert(std::atomic<uint64_t>::is_always_lock_free && std::atomic<int32_t>::is_always_lock_free);

struct Group {
  Header* header = nullptr;  // null: no group
  float* slots = nullptr;
  size_t bytes = 0;
  int rank = 0, world = 1;
  int status = PM_OK;  // what every call returns once something went wrong
  uint64_t meetings = 0, chunks = 0;
  double step_timeout_s = 0;
  int spins = 0;
};
Group g;

constexpr size_t header_bytes() { return (sizeof(Header) + 4095) & ~size_t{4095}; }
size_t segment_bytes(int world) { return header_bytes() + sizeof(float) * 2 * kSlotFloats * world; }

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}

void sleep_for(double seconds) {
  const timespec t = {0, static_cast<long>(seconds * 1e9)};
  nanosleep(&t, nullptr);
}

// When a process started, in clock ticks since boot; 0 when it is gone or a zombie. With the pid it names a process for
// good.
uint64_t process_start_time(int32_t pid) {
  char path[32], text[1024];
  snprintf(path, sizeof path, "/proc/%d/stat", pid);
  const int file = open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0) return 0;
  const ssize_t size = read(file, text, sizeof text - 1);
  close(file);
  text[size > 0 ? size : 0] = 0;
  const char* field = strrchr(text, ')');  // the second field, the command's name, may itself hold spaces and parentheses
  if (field == nullptr || field[1] == 0 || field[2] == 'Z' || field[2] == 'X') return 0;
  for (int i = 2; i < 22 && field; ++i) field = strchr(field + 1, ' ');
  return field ? strtoull(field, nullptr, 10) : 0;
}

uint64_t pid_namespace() {
  struct stat info;
  return stat("/proc/self/ns/pid", &info) == 0 ? info.st_ino : 0;
}

bool lives(const Member& member) {
  const int32_t pid = member.pid.load(std::memory_order_acquire);
  return pid > 0 && process_start_time(pid) == member.start_time;
}

void unmap(Header* header, size_t bytes) {
  if (header) munmap(header, bytes);
}

Header* map(int file, size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  return memory == MAP_FAILED ? nullptr : static_cast<Header*>(memory);
}

// Removes the segments of this user's dead jobs, which were killed between creating the name and removing it.
void remove_stale_segments() {
  DIR* folder = opendir("/dev/shm");
  if (folder == nullptr) return;
  while (const dirent* entry = readdir(folder)) {
    if (strncmp(entry->d_name, kPrefix, sizeof kPrefix - 1) != 0) continue;
    char name[300];
    snprintf(name, sizeof name, "/%s", entry->d_name);
    const int file = shm_open(name, O_RDWR | O_CLOEXEC, 0);
    if (file < 0) continue;  // another user's, or gone meanwhile
    struct stat info;
    if (fstat(file, &info) == 0 && info.st_uid == geteuid() && info.st_size >= static_cast<off_t>(header_bytes())) {
      Header* header = map(file, header_bytes());
      if (header && header->magic.load(std::memory_order_acquire) == kMagic && header->pid_namespace == pid_namespace() &&
          !lives(header->member[0]))
        shm_unlink(name);
      unmap(header, header_bytes());
    }
    close(file);
  }
  closedir(folder);
}

// Rank 0: a new segment under this name. *status is -errno where there is none.
Header* create_segment(const char* name, int world, int* status) {
  remove_stale_segments();
  shm_unlink(name);
  const size_t bytes = segment_bytes(world);
  const int file = shm_open(name, O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600);
  if (file < 0) {
    *status = -errno;
    return nullptr;
  }
  int error;  // fallocate, not only ftruncate: a full /dev/shm must be an error here, not a SIGBUS at the first write
  do error = posix_fallocate(file, 0, bytes);
  while (error == EINTR);
  Header* header = error ? nullptr : map(file, bytes);
  if (header == nullptr) {
    *status = -(error ? error : errno);
    shm_unlink(name);
  } else {
    header->pid_namespace = pid_namespace();
    header->world = world;
    header->member[0].start_time = process_start_time(getpid());
    header->member[0].pid.store(getpid());
    header->member[0].joined.store(1);
    header->magic.store(kMagic, std::memory_order_release);
  }
  close(file);
  return header;
}

// Another rank: the segment under this name with its own place claimed, or null while there is none it may join.
Header* open_segment(const char* name, int rank, int world) {
  const size_t bytes = segment_bytes(world);
  const int file = shm_open(name, O_RDWR | O_CLOEXEC, 0);
  if (file < 0) return nullptr;
  struct stat info;
  const bool fits = fstat(file, &info) == 0 && info.st_uid == geteuid() && info.st_size == static_cast<off_t>(bytes);
  Header* header = fits ? map(file, bytes) : nullptr;
  close(file);
  if (header == nullptr) return nullptr;
  int32_t nobody = 0;
  Member& me = header->member[rank];
  if (header->magic.load(std::memory_order_acquire) == kMagic && header->world == world &&
      header->pid_namespace == pid_namespace() && header->phase.load() == joining && lives(header->member[0]) &&
      me.pid.compare_exchange_strong(nobody, getpid())) {
    me.start_time = process_start_time(getpid());
    me.joined.store(1, std::memory_order_release);
    return header;
  }
  unmap(header, bytes);
  return nullptr;
}

// Waits until the phase leaves `joining`, which rank 0 sees to when all are there; true when it is `ready`.
bool wait_until_ready(Header* header, const char* name, int rank, int world, double deadline) {
  double next_check = now() + kLivenessPeriod;
  for (;; sleep_for(kJoinPoll)) {
    bool all_joined = true, all_live = true;
    for (int r = 0; r < world; ++r) all_joined = all_joined && header->member[r].joined.load(std::memory_order_acquire);
    if (rank == 0 && all_joined) {
      shm_unlink(name);
      uint32_t phase = joining;
      header->phase.compare_exchange_strong(phase, ready);
    }
    const uint32_t phase = header->phase.load(std::memory_order_acquire);
    if (phase != joining) return phase == ready;
    const double time = now();
    if (time >= next_check) {
      next_check = time + kLivenessPeriod;
      for (int r = 0; r < world; ++r)
        if (header->member[r].joined.load(std::memory_order_acquire)) all_live = all_live && lives(header->member[r]);
    }
    if (time >= deadline || !all_live) {
      uint32_t expected = joining;
      header->phase.compare_exchange_strong(expected, broken);
      if (rank == 0 || !lives(header->member[0])) shm_unlink(name);
    }
  }
}

// Is `rank`, which has not come to `meeting`, never going to?
bool lost(int rank, uint64_t meeting) {
  const Member& member = g.header->member[rank];
  const auto came = [&] { return member.arrived.load(std::memory_order_acquire) >= meeting; };
  if (came()) return false;
  const bool gone = member.left.load(std::memory_order_acquire) || !lives(member);
  return gone && !came();  // it may have come just before it ended
}

// Waits for `rank` to come to `meeting`. Ranks usually differ by microseconds, so spin first; then let others have the
// processor, which a rank on the same core needs; then sleep, for a rank that waits for its next request.
int wait_for(int rank, uint64_t meeting) {
  const std::atomic<uint64_t>& arrived = g.header->member[rank].arrived;
  for (int i = 0; i < g.spins; ++i) {
    if (arrived.load(std::memory_order_acquire) >= meeting) return PM_OK;
    __builtin_ia32_pause();
  }
  const double start = now();
  double next_check = start + kLivenessPeriod;
  while (arrived.load(std::memory_order_acquire) < meeting) {
    const double time = now();
    if (time >= next_check) {
      next_check = time + kLivenessPeriod;
      bool hopeless = time - start >= g.step_timeout_s || g.header->phase.load(std::memory_order_acquire) == broken;
      for (int r = 0; r < g.world && !hopeless; ++r) hopeless = lost(r, meeting);
      // Once more, for a rank that came and then broke the group over a later meeting.
      if (hopeless && arrived.load(std::memory_order_acquire) < meeting) {
        g.header->phase.store(broken, std::memory_order_release);
        return PM_PEER_LOST;
      }
    }
    if (time - start < 0.002)
      sched_yield();
    else
      sleep_for(time - start < 1 ? 50e-6 : time - start < 10 ? 1e-3 : 5e-3);
  }
  return PM_OK;
}

// Returns when all ranks have come; what they wrote before is visible then. `call` says what this rank is doing.
int meet(uint64_t call) {
  const uint64_t meeting = ++g.meetings;
  Member& me = g.header->member[g.rank];
  me.call[meeting & 1] = call;
  me.arrived.store(meeting, std::memory_order_release);
  for (int r = 0; r < g.world && g.status == PM_OK; ++r) g.status = wait_for(r, meeting);
  for (int r = 0; r < g.world && g.status == PM_OK; ++r)
    if (g.header->member[r].call[meeting & 1] != call) g.status = PM_RANKS_DISAGREE;
  return g.status;
}

uint64_t describe(uint64_t op, int64_t rows, int64_t cols) {
  return ((op * 0x9e3779b97f4a7c15ull + rows) * 0x9e3779b97f4a7c15ull) + cols;
}

float* slot(int rank) { return g.slots + (2 * rank + (g.chunks & 1)) * kSlotFloats; }

// y [n] = the sum of all ranks' slots from `offset`, in rank order. y may be this rank's own slot.
void sum_slots(float* y, int64_t offset, int64_t n) {
  constexpr int64_t kBlock = 512;
  float sum[kBlock];
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t size = n - begin < kBlock ? n - begin : kBlock;
    memcpy(sum, slot(0) + offset + begin, size * sizeof(float));
    for (int r = 1; r < g.world; ++r) {
      const float* x = slot(r) + offset + begin;
      for (int64_t i = 0; i < size; ++i) sum[i] += x[i];
    }
    memcpy(y + begin, sum, size * sizeof(float));
  }
}

// Rank r adds up the r-th share of a chunk in its own slot, which nobody else reads there, and copies the other shares.
int reduce_by_shares(float* y, int64_t n, uint64_t call) {
  const int64_t share = ((n + g.world - 1) / g.world + 15) & ~int64_t{15};
  const auto begin = [&](int r) { return r * share < n ? r * share : n; };
  sum_slots(slot(g.rank) + begin(g.rank), begin(g.rank), begin(g.rank + 1) - begin(g.rank));
  if (const int status = meet(call)) return status;
  for (int r = 0; r < g.world; ++r) memcpy(y + begin(r), slot(r) + begin(r), (begin(r + 1) - begin(r)) * sizeof(float));
  return PM_OK;
}

pm::KernelClock clock_all_reduce("all_reduce"), clock_all_gather("all_gather");

}  // namespace

extern "C" {

int pm_cpu_group_join(const char* name, int rank, int world, double join_timeout_s, double step_timeout_s) {
  if (g.header) return -EBUSY;
  if (world == 1) return PM_OK;
  char path[256];
  if (snprintf(path, sizeof path, "/%s%s", kPrefix, name) >= static_cast<int>(sizeof path)) return -ENAMETOOLONG;
  const double deadline = now() + join_timeout_s;
  int status = PM_PEER_LOST;
  Header* header = rank == 0 ? create_segment(path, world, &status) : nullptr;
  while (rank != 0 && header == nullptr && now() < deadline) {
    header = open_segment(path, rank, world);
    if (header == nullptr) sleep_for(kJoinPoll);
  }
  if (header == nullptr) return status;
  if (!wait_until_ready(header, path, rank, world, deadline)) {
    unmap(header, segment_bytes(world));
    return PM_PEER_LOST;
  }
  g = Group{};
  g.header = header;
  g.bytes = segment_bytes(world);
  g.slots = reinterpret_cast<float*>(reinterpret_cast<char*>(header) + header_bytes());
  g.rank = rank;
  g.world = world;
  g.step_timeout_s = step_timeout_s;
  // With fewer processors than ranks, whoever spins keeps the one it waits for from running.
  cpu_set_t set;
  g.spins = sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) >= world ? 100 : 0;
  return PM_OK;
}

void pm_cpu_group_leave(void) {
  if (g.header == nullptr) return;
  g.header->member[g.rank].left.store(1, std::memory_order_release);
  unmap(g.header, g.bytes);
  g = Group{};
}

int pm_cpu_group_rank(void) { return g.rank; }
int pm_cpu_group_world(void) { return g.world; }

int pm_cpu_all_reduce(const float* x, float* y, int64_t n, void*) {
  const pm::TimedCall timed(clock_all_reduce);
  if (g.header == nullptr) return PM_NOT_CONNECTED;
  const uint64_t call = describe(1, n, 1);
  for (int64_t begin = 0; begin < n && g.status == PM_OK; begin += kSlotFloats, ++g.chunks) {
    const int64_t size = n - begin < kSlotFloats ? n - begin : kSlotFloats;
    memcpy(slot(g.rank), x + begin, size * sizeof(float));
    if (meet(call) != PM_OK) break;
    if (g.world >= kShareWorld && size >= kShareFloats)
      reduce_by_shares(y + begin, size, call);
    else
      sum_slots(y + begin, 0, size);
  }
  return g.status;
}

int pm_cpu_all_gather(const float* x, float* y, int64_t rows, int64_t cols, void*) {
  const pm::TimedCall timed(clock_all_gather);
  if (g.header == nullptr) return PM_NOT_CONNECTED;
  const uint64_t call = describe(2, rows, cols);
  const int64_t n = rows * cols;
  for (int64_t begin = 0; begin < n && g.status == PM_OK; begin += kSlotFloats, ++g.chunks) {
    const int64_t end = n - begin < kSlotFloats ? n : begin + kSlotFloats;
    memcpy(slot(g.rank), x + begin, (end - begin) * sizeof(float));
    if (meet(call) != PM_OK) break;
    for (int r = 0; r < g.world; ++r)
      for (int64_t i = begin; i < end;) {  // a chunk may begin and end amid a row
        const int64_t row = i / cols, col = i % cols, size = cols - col < end - i ? cols - col : end - i;
        memcpy(y + (row * g.world + r) * cols + col, slot(r) + (i - begin), size * sizeof(float));
        i += size;
      }
  }
  return g.status;
}

int pm_cpu_broadcast(void* x, int64_t bytes, void*) {
  if (g.header == nullptr) return PM_NOT_CONNECTED;
  const uint64_t call = describe(3, bytes, 1);
  constexpr int64_t kSlotBytes = kSlotFloats * sizeof(float);
  for (int64_t begin = 0; begin < bytes && g.status == PM_OK; begin += kSlotBytes, ++g.chunks) {
    const int64_t size = bytes - begin < kSlotBytes ? bytes - begin : kSlotBytes;
    char* const part = static_cast<char*>(x) + begin;
    if (g.rank == 0) memcpy(slot(0), part, size);
    if (meet(call) != PM_OK) break;
    if (g.rank != 0) memcpy(part, slot(0), size);
  }
  return g.status;
}

int pm_cpu_group_alive(void) {
  if (g.header == nullptr) return 1;
  for (int r = 0; r < g.world; ++r) {
    const Member& member = g.header->member[r];
    if (member.left.load(std::memory_order_acquire) || !lives(member)) return 0;
  }
  return g.status == PM_OK && g.header->phase.load(std::memory_order_acquire) == ready;
}

}  // extern "C"
