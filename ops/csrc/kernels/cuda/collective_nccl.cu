// Collectives between GPUs of one machine that do not map one another's memory: NCCL moves the numbers, through the host's
// memory where it must, and our own kernels add them up.
//
// WHY NOT NCCL'S ALL-REDUCE, which is also what Paddle's own runs: it picks its algorithm (ring, tree; how many channels) by
// the message's size, and with it the order in which ranks are added; so a row's bits would depend on how many rows a step
// has, against law 1 (device.h), and would not be those of collective_ipc.cu. A gather and a send only copy. Besides,
// dist.all_reduce is left out of an exported program without a word; an operator of ours stays in it.
//
// A CALL first gathers a record of every rank, whose size is always the same: what is called, and the first numbers. So
// ranks that make differing calls find out in an exchange that cannot go wrong, and a short message needs no other. The rest
// of a sum goes in shares: each rank gets its share of all ranks, adds them up in rank order, and sends the sums to all.
//
// A RANK THAT DOES NOT COME would leave NCCL's kernels waiting for ever. A thread watches: where calls are under way and
// none has ended for the group's time-out, or NCCL reports an error itself, it says so in the group's report and aborts the
// communicator, which ends those kernels; what they should have brought is then missing, as the report says. Where the ranks
// called different things, it does not wait as long.
#include <stdlib.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <future>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

#include "collective.cuh"
#include "nccl.h"
#include "scalar.cuh"

namespace pm::cuda {
namespace {

using Clock = std::chrono::steady_clock;
using Seconds = std::chrono::duration<double>;

constexpr int kThreads = 256, kMostBlocks = 256;
constexpr int64_t kRecordFloats = 4096;  // a token of Mixtral-8x7B
constexpr Seconds kWatchPeriod(0.05), kPatience(1.0);
constexpr double kMostSeconds = 1e9;  // that a clock adds up

struct Record {
  alignas(16) uint64_t call;
  alignas(16) float x[kRecordFloats];
};
constexpr int64_t kFloatsOfRecord = sizeof(Record) / sizeof(float);

// What lies in Buffer::slots.
struct Staging {
  Record records[PM_MAX_RANKS];
  float received[2 * kBlocks * kSlotFloats - PM_MAX_RANKS * kFloatsOfRecord];
};
constexpr int64_t kReceivedFloats = sizeof(Staging::received) / sizeof(float);
static_assert(sizeof(Staging) == sizeof(Buffer::slots));

struct Outcome {
  int status;
  std::string text;
};

struct Connection {
  Group group = {};
  Report* report = nullptr;  // the host's
  Seconds step_timeout{0};
  int device = 0;
  NcclId id = {};
  const Nccl* nccl = nullptr;
  NcclCommunicator* communicator = nullptr;
  std::timed_mutex calling;          // held while a call is being enqueued
  std::atomic<uint32_t> asked{0};    // calls so far; Report::done: those that have ended
  std::atomic<int> error{0};         // what NCCL has reported itself
  std::atomic<bool> aborted{false};  // the communicator is gone
  std::promise<Outcome> connected;
  std::thread watch;
  std::mutex stopping;
  std::condition_variable stop_asked;
  bool stop = false;
};
Connection* connection = nullptr;  // the open group's

// ---- kernels

// The number of the call that is at its end, for the watch.
__device__ void tell_done(const Group& g, uint32_t number) {
  if (number && blockIdx.x == 0 && threadIdx.x == 0) *static_cast<volatile uint32_t*>(&g.report->done) = number;
}

__device__ void compare_calls(const Group& g, const Record* records, uint64_t call) {
  const int r = static_cast<int>(threadIdx.x);
  if (records && blockIdx.x == 0 && r < g.world && records[r].call != call)
    fail_group(g, PM_RANKS_DISAGREE, r, call, records[r].call);
}

__global__ void write_record(Record* record, uint64_t call, const float* x, int64_t n) {
  if (blockIdx.x == 0 && threadIdx.x == 0) record->call = call;
  for (int64_t i = blockIdx.x * kThreads + threadIdx.x; i < n; i += gridDim.x * kThreads) record->x[i] = x[i];
}

// Every rank's numbers: rank r's at from + r * stride; where `own` is given, this rank's are there.
struct Gathered {
  const float* from;
  int64_t stride;
  const float* own;
  __device__ float of(const Group& g, int rank, int64_t i) const {
    return rank == g.rank && own ? own[i] : from[rank * stride + i];
  }
};

// y [n] = the sums in rank order. `records` (or null), whose calls are compared; `done`: as tell_done has it.
__global__ void add_gathered(const Group g, const Gathered x, float* y, int64_t n, const Record* records, uint64_t call,
                             uint32_t done) {
  compare_calls(g, records, call);
  for (int64_t i = blockIdx.x * kThreads + threadIdx.x; i < n; i += gridDim.x * kThreads) {
    float sum = x.of(g, 0, i);
    for (int r = 1; r < g.world; ++r) sum = __fadd_rn(sum, x.of(g, r, i));
    y[i] = sum;
  }
  tell_done(g, done);
}

// y [rows, world * cols]: every rank's x [rows, cols] from `begin` on, n of them.
__global__ void place_gathered(const Group g, const Gathered x, float* y, int64_t begin, int64_t n, int64_t cols,
                               const Record* records, uint64_t call, uint32_t done) {
  compare_calls(g, records, call);
  for (int64_t i = blockIdx.x * kThreads + threadIdx.x; i < n; i += gridDim.x * kThreads) {
    const int64_t row = (begin + i) / cols, col = (begin + i) % cols;
    for (int r = 0; r < g.world; ++r) y[(row * g.world + r) * cols + col] = x.of(g, r, i);
  }
  tell_done(g, done);
}

__global__ void end_call(const Group g, uint32_t done) { tell_done(g, done); }

dim3 blocks_for(int64_t n) {
  return dim3(static_cast<unsigned>(std::min<int64_t>(std::max<int64_t>(equal_parts(n, kThreads), 1), kMostBlocks)));
}

// ---- a call

// One call on a stream: holds the connection while it is being enqueued.
class Call {
 public:
  Call(Connection& connection, uint64_t call, void* stream)
      : c_(connection), g_(c_.group), call_(call), stream_(stream), lock_(c_.calling), number_(next_number()) {}

  Staging& staging() const { return *reinterpret_cast<Staging*>(g_.buffers[g_.rank]->slots); }
  Gathered records() const { return {staging().records[0].x, kFloatsOfRecord, nullptr}; }
  // For the last kernel of a call whose every number has been passed.
  uint32_t done_if(bool last) const { return last ? number_ : 0; }

  // Gathers every rank's record of the first n numbers.
  int gather_records(const float* x, int64_t n) {
    Record* const all = staging().records;
    if (const int status = launch(write_record, blocks_for(n), dim3(kThreads), 0, stream_, all + g_.rank, call_, x, n))
      return status;
    return gather(all[g_.rank], all);
  }

  // Every rank's x [n] to staging().received, rank r's at r * n.
  int gather_numbers(const float* x, int64_t n) {
    return run("a gather", [&](const Nccl& nccl, NcclCommunicator* communicator, cudaStream_t stream) {
      return nccl.AllGather(x, staging().received, n, kNcclFloat32, communicator, stream);
    });
  }

  // To every other rank what `to` says, and from it what `from` says, at the same time.
  template <class To, class From>
  int exchange(To to, From from) {
    int status =
        run("beginning an exchange", [](const Nccl& nccl, NcclCommunicator*, cudaStream_t) { return nccl.GroupStart(); });
    for (int peer = 0; peer < g_.world && status == PM_OK; ++peer) {
      if (peer == g_.rank) continue;
      const std::pair<const float*, int64_t> sent = to(peer);
      const std::pair<float*, int64_t> received = from(peer);
      if (sent.second)
        status = run("a send", [&](const Nccl& nccl, NcclCommunicator* communicator, cudaStream_t stream) {
          return nccl.Send(sent.first, sent.second, kNcclFloat32, peer, communicator, stream);
        });
      if (received.second && status == PM_OK)
        status = run("a receipt", [&](const Nccl& nccl, NcclCommunicator* communicator, cudaStream_t stream) {
          return nccl.Recv(received.first, received.second, kNcclFloat32, peer, communicator, stream);
        });
    }
    if (status != PM_OK) return status;
    return run("an exchange", [](const Nccl& nccl, NcclCommunicator*, cudaStream_t) { return nccl.GroupEnd(); });
  }

  int add(Gathered x, float* y, int64_t n, const Record* compared, bool last) {
    return launch(add_gathered, blocks_for(n), dim3(kThreads), 0, stream_, g_, x, y, n, compared, call_, done_if(last));
  }
  int place(Gathered x, float* y, int64_t begin, int64_t n, int64_t cols, const Record* compared, bool last) {
    return launch(place_gathered, blocks_for(n), dim3(kThreads), 0, stream_, g_, x, y, begin, n, cols, compared, call_,
                  done_if(last));
  }
  int end() { return launch(end_call, dim3(1), dim3(1), 0, stream_, g_, number_); }

 private:
  // 0 stands for none.
  uint32_t next_number() {
    const uint32_t number = ++c_.asked;
    return number ? number : ++c_.asked;
  }

  int gather(const Record& mine, Record* all) {
    return run("a gather", [&](const Nccl& nccl, NcclCommunicator* communicator, cudaStream_t stream) {
      return nccl.AllGather(&mine, all, kFloatsOfRecord, kNcclFloat32, communicator, stream);
    });
  }

  template <class Function>
  int run(const char* what, Function function) {
    const auto stream = static_cast<cudaStream_t>(stream_);
    const int result = c_.aborted ? kNcclSuccess : function(*c_.nccl, c_.communicator, stream);
    if (c_.aborted) return group_status();
    if (result == kNcclSuccess) return PM_OK;
    return fail(PM_LAUNCH_FAILED, "NCCL: %s: %s", what, c_.nccl->GetErrorString(result));
  }

  Connection& c_;
  const Group& g_;
  const uint64_t call_;
  void* const stream_;
  const std::unique_lock<std::timed_mutex> lock_;
  const uint32_t number_;
};

// ---- the watch

void abort_communicator(Connection& c, pm_status status) {
  uint32_t none = PM_OK;
  __atomic_compare_exchange_n(&c.report->status, &none, status, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  // Not under a call's feet; but one that stays in NCCL waits itself for what this is to end.
  std::unique_lock<std::timed_mutex> lock(c.calling, std::defer_lock);
  (void)lock.try_lock_for(kPatience);
  c.aborted = true;
  c.nccl->CommAbort(c.communicator);
}

// Waits for a call to end; returns once told to, or when there is nothing left to watch.
void watch(Connection& c) {
  uint32_t done_before = 0;
  Clock::time_point since = Clock::now();
  std::unique_lock<std::mutex> lock(c.stopping);
  while (!c.stop_asked.wait_for(lock, kWatchPeriod, [&] { return c.stop; })) {
    int error = kNcclSuccess;
    const int asking = c.nccl->CommGetAsyncError(c.communicator, &error);
    if (asking != kNcclSuccess || error != kNcclSuccess) {
      c.error = asking != kNcclSuccess ? asking : error;
      return abort_communicator(c, PM_PEER_LOST);
    }
    const uint32_t done = __atomic_load_n(&c.report->done, __ATOMIC_ACQUIRE);
    const Clock::time_point now = Clock::now();
    if (done == c.asked || done != done_before) since = now;
    done_before = done;
    const bool failed = __atomic_load_n(&c.report->status, __ATOMIC_ACQUIRE) != PM_OK;
    if (now - since > (failed ? std::min(kPatience, c.step_timeout) : c.step_timeout))
      return abort_communicator(c, PM_PEER_LOST);
  }
}

int sum(Connection& c, const float* x, float* y, int64_t n, uint64_t word, void* stream) {
  const Group& g = c.group;
  Call call(c, word, stream);
  const int64_t first = std::min(n, kRecordFloats);
  if (const int status = call.gather_records(x, first)) return status;
  const Staging& staging = call.staging();
  if (const int status = call.add(call.records(), y, first, staging.records, n == first)) return status;
  if (n == first) return PM_OK;
  const int64_t most = kReceivedFloats / g.world * g.world;
  for (int64_t begin = first; begin < n; begin += most) {
    const int64_t size = std::min(most, n - begin), share = equal_parts(size, g.world);
    const auto at = [&](int r) { return std::min(r * share, size); };
    const auto length = [&](int r) { return at(r + 1) - at(r); };
    const int64_t mine = begin + at(g.rank);
    int status = call.exchange([&](int r) { return std::pair(x + begin + at(r), length(r)); },
                               [&](int r) { return std::pair(call.staging().received + r * share, length(g.rank)); });
    if (status == PM_OK) status = call.add({staging.received, share, x + mine}, y + mine, length(g.rank), nullptr, false);
    if (status == PM_OK)
      status = call.exchange([&](int) { return std::pair<const float*, int64_t>(y + mine, length(g.rank)); },
                             [&](int r) { return std::pair(y + begin + at(r), length(r)); });
    if (status != PM_OK) return status;
  }
  return call.end();
}

// In a thread of its own, since NCCL waits for the other ranks without end: connects, with a sum that uses every way there
// is, so that no later call has to; tells how that went, and watches.
void connect_and_watch(Connection* c) {
  const auto connect = [&] {
    if (const int status = check(cudaSetDevice(c->device), "choosing the GPU")) return status;
    const int result = c->nccl->CommInitRank(&c->communicator, c->group.world, c->id, c->group.rank);
    if (result != kNcclSuccess)
      return fail(PM_LAUNCH_FAILED, "NCCL cannot connect the ranks: %s", c->nccl->GetErrorString(result));
    const int64_t n = kRecordFloats + PM_MAX_RANKS;
    void* x = nullptr;
    int status = check(cudaMalloc(&x, n * sizeof(float)), "numbers for a first sum by NCCL");
    if (status == PM_OK) status = check(cudaMemset(x, 0, n * sizeof(float)), "numbers for a first sum by NCCL");
    float* const numbers = static_cast<float*>(x);
    if (status == PM_OK) status = sum(*c, numbers, numbers, n, all_reduce_word(n), nullptr);
    if (status == PM_OK) status = check(cudaDeviceSynchronize(), "a first sum by NCCL");
    cudaFree(x);
    return status;
  };
  const int status = connect();
  c->connected.set_value({status, status == PM_OK ? "" : pm_cuda_kernels()->last_error()});
  if (status == PM_OK) watch(*c);
}

void stop_watch() {
  if (!connection || !connection->watch.joinable()) return;
  {
    const std::lock_guard<std::mutex> lock(connection->stopping);
    connection->stop = true;
  }
  connection->stop_asked.notify_one();
  connection->watch.join();
}

int refuse_capture(void* stream) {
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  if (const int status = check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &capturing), "the stream"))
    return status;
  if (capturing == cudaStreamCaptureStatusNone) return PM_OK;
  return fail(PM_UNSUPPORTED, "a collective by NCCL cannot be captured into a graph: the end of every call is watched for");
}

}  // namespace

int open_by_nccl(const Group& g, Report* report, double step_timeout_s, const void* id, double timeout_s) {
  int device = 0;
  if (const int status = check(cudaGetDevice(&device), "which GPU")) return status;
  Connection* const c = new Connection;
  c->group = g;
  c->report = report;
  c->step_timeout = Seconds(std::min(step_timeout_s, kMostSeconds));
  c->device = device;
  c->nccl = loaded_nccl();
  memcpy(&c->id, id, sizeof c->id);
  std::future<Outcome> connected = c->connected.get_future();
  c->watch = std::thread(connect_and_watch, c);
  if (connected.wait_for(Seconds(std::min(timeout_s, kMostSeconds))) != std::future_status::ready) {
    c->watch.detach();  // and c is its
    return fail(PM_PEER_LOST, "NCCL did not connect the ranks within %g s", timeout_s);
  }
  const Outcome outcome = connected.get();
  if (outcome.status != PM_OK) {
    c->watch.join();
    delete c;
    return fail(static_cast<pm_status>(outcome.status), "%s", outcome.text.c_str());
  }
  connection = c;
  // Before what NCCL and CUDA do at the end of the process, having been loaded before.
  static const int registered = atexit(stop_watch);
  (void)registered;
  return PM_OK;
}

int all_reduce_by_nccl(const Group&, const float* x, float* y, int64_t n, uint64_t call, void* stream) {
  if (const int status = refuse_capture(stream)) return status;
  return sum(*connection, x, y, n, call, stream);
}

int all_gather_by_nccl(const Group& g, const float* x, float* y, int64_t rows, int64_t cols, uint64_t word, void* stream) {
  if (const int status = refuse_capture(stream)) return status;
  Call call(*connection, word, stream);
  const int64_t n = rows * cols, first = std::min(n, kRecordFloats), most = kReceivedFloats / g.world;
  if (const int status = call.gather_records(x, first)) return status;
  const Staging& staging = call.staging();
  if (const int status = call.place(call.records(), y, 0, first, cols, staging.records, n == first)) return status;
  for (int64_t begin = first; begin < n; begin += most) {
    const int64_t size = std::min(most, n - begin);
    if (const int status = call.gather_numbers(x + begin, size)) return status;
    const Gathered gathered = {staging.received, size, nullptr};
    if (const int status = call.place(gathered, y, begin, size, cols, nullptr, begin + size == n)) return status;
  }
  return PM_OK;
}

const char* nccl_error() {
  return connection && connection->error != kNcclSuccess ? connection->nccl->GetErrorString(connection->error) : nullptr;
}

void close_nccl() {
  if (!connection) return;
  stop_watch();
  // Whatever is left to do has been waited for; unlike CommDestroy this waits for no other rank.
  if (!connection->aborted) connection->nccl->CommAbort(connection->communicator);
  delete connection;
  connection = nullptr;
}

}  // namespace pm::cuda
