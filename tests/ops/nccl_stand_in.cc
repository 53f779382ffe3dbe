// The entry points of NCCL that ops/csrc/kernels/cuda/nccl.h declares, for processes whose GPUs are emulated: a message is a
// file in a folder of the job's own. Stricter than NCCL where that is lenient, and as unkind where it is not: a wait has no
// end but CommAbort, and a message that is not as long as the one waited for is waited on for ever.
//
// Streams are not emulated: what NCCL enqueues happens at once.
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {

enum Result { success = 0, system_error = 2, internal_error = 3, invalid_argument = 4, invalid_usage = 5, remote_error = 6 };
constexpr int kFloat32 = 7;

struct Id {
  char bytes[128];
};

}  // namespace

struct Communicator {
  std::string folder;
  int world, rank;
  std::atomic<bool> aborted{false};
  std::map<std::tuple<int, int, std::string>, int> numbers;  // of the messages from, to, of a kind

  std::string next(int from, int to, const std::string& kind) {
    const int number = numbers[{from, to, kind}]++;
    return folder + "/" + kind + "-" + std::to_string(from) + "-" + std::to_string(to) + "-" + std::to_string(number);
  }
};

namespace {

struct Transfer {
  Communicator* communicator;
  bool sends;
  const void* from;
  void* to;
  size_t bytes;
  int peer;
};
thread_local int open_groups = 0;
thread_local std::vector<Transfer> grouped;

bool wait_a_little(const Communicator& c) {
  usleep(50);
  return !c.aborted;
}

int write_message(const std::string& name, const void* data, size_t bytes) {
  const std::string unfinished = name + ".part";
  const int file = open(unfinished.c_str(), O_WRONLY | O_CREAT | O_EXCL, 0600);
  if (file < 0) return system_error;
  size_t written = 0;
  while (written < bytes) {
    const ssize_t some = write(file, static_cast<const char*>(data) + written, bytes - written);
    if (some <= 0) return system_error;
    written += static_cast<size_t>(some);
  }
  close(file);
  return rename(unfinished.c_str(), name.c_str()) == 0 ? success : system_error;
}

int read_message(const Communicator& c, const std::string& name, void* data, size_t bytes) {
  struct stat info;
  while (stat(name.c_str(), &info) != 0 || static_cast<size_t>(info.st_size) != bytes)
    if (!wait_a_little(c)) return internal_error;
  const int file = open(name.c_str(), O_RDONLY);
  size_t had = 0;
  while (had < bytes) {
    const ssize_t some = read(file, static_cast<char*>(data) + had, bytes - had);
    if (some <= 0) return system_error;
    had += static_cast<size_t>(some);
  }
  close(file);
  unlink(name.c_str());
  return success;
}

int transfer(const Transfer& t) {
  if (open_groups == 0) return invalid_usage;  // a send outside of a group waits for its receiver
  if (!t.communicator || t.communicator->aborted || t.bytes == 0) return invalid_argument;
  if (t.peer < 0 || t.peer >= t.communicator->world || t.peer == t.communicator->rank) return invalid_argument;
  grouped.push_back(t);
  return success;
}

}  // namespace

EXPORTED int ncclGetVersion(int* version) {
  const char* told = getenv("NCCL_STAND_IN_VERSION");
  *version = told ? atoi(told) : 22703;
  return success;
}

EXPORTED const char* ncclGetErrorString(int result) {
  static const std::map<int, const char*> texts = {{success, "no error"},
                                                   {system_error, "unhandled system error"},
                                                   {internal_error, "internal error"},
                                                   {invalid_argument, "invalid argument"},
                                                   {invalid_usage, "invalid usage"},
                                                   {remote_error, "remote process exited or there was a network error"}};
  return texts.at(result);
}

EXPORTED int ncclGetUniqueId(Id* id) {
  snprintf(id->bytes, sizeof id->bytes, "%s/XXXXXX", getenv("NCCL_STAND_IN_FOLDER"));
  return mkdtemp(id->bytes) ? success : system_error;
}

EXPORTED int ncclCommInitRank(Communicator** communicator, int world, Id id, int rank) {
  auto* const c = new Communicator;
  c->folder = id.bytes;
  c->world = world;
  c->rank = rank;
  if (const int result = write_message(c->folder + "/joined-" + std::to_string(rank), "", 0)) return result;
  for (int r = 0; r < world; ++r)
    while (access((c->folder + "/joined-" + std::to_string(r)).c_str(), F_OK) != 0) wait_a_little(*c);
  *communicator = c;
  return success;
}

// A file `broken` in the folder stands for what NCCL itself finds out.
EXPORTED int ncclCommGetAsyncError(Communicator* c, int* result) {
  *result = access((c->folder + "/broken").c_str(), F_OK) == 0 ? remote_error : success;
  return success;
}

// Its memory stays: a call may be under way.
EXPORTED int ncclCommAbort(Communicator* c) {
  c->aborted = true;
  return success;
}

EXPORTED int ncclAllGather(const void* from, void* to, size_t count, int dtype, Communicator* c, void*) {
  if (!c || c->aborted || dtype != kFloat32 || open_groups || count == 0) return invalid_argument;
  const size_t bytes = count * sizeof(float);
  for (int r = 0; r < c->world; ++r)
    if (r != c->rank)
      if (const int result = write_message(c->next(c->rank, r, "gather"), from, bytes)) return result;
  memmove(static_cast<char*>(to) + c->rank * bytes, from, bytes);
  for (int r = 0; r < c->world; ++r)
    if (r != c->rank)
      if (const int result = read_message(*c, c->next(r, c->rank, "gather"), static_cast<char*>(to) + r * bytes, bytes))
        return result;
  return success;
}

EXPORTED int ncclSend(const void* from, size_t count, int dtype, int peer, Communicator* c, void*) {
  if (dtype != kFloat32) return invalid_argument;
  return transfer({c, true, from, nullptr, count * sizeof(float), peer});
}

EXPORTED int ncclRecv(void* to, size_t count, int dtype, int peer, Communicator* c, void*) {
  if (dtype != kFloat32) return invalid_argument;
  return transfer({c, false, nullptr, to, count * sizeof(float), peer});
}

EXPORTED int ncclGroupStart() {
  ++open_groups;
  return success;
}

EXPORTED int ncclGroupEnd() {
  if (open_groups == 0) return invalid_usage;
  if (--open_groups) return success;
  const std::vector<Transfer> transfers = std::move(grouped);
  grouped.clear();
  for (const bool sends : {true, false})
    for (const Transfer& t : transfers) {
      if (t.sends != sends) continue;
      Communicator& c = *t.communicator;
      const int result = sends ? write_message(c.next(c.rank, t.peer, "message"), t.from, t.bytes)
                               : read_message(c, c.next(t.peer, c.rank, "message"), t.to, t.bytes);
      if (result) return result;
    }
  return success;
}
