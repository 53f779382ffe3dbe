// Finds nccl.h's functions.
#include <dlfcn.h>

#include "kernels.h"
#include "nccl.h"

namespace pm::cuda {
namespace {

constexpr int kLeastVersion = 2700;  // 2.7: Send and Recv

Nccl functions;
bool loaded = false;

// The first name the library lacks, or null.
const char* look_up(void* library) {
  const char* missing = nullptr;
  const auto find = [&](auto& function, const char* name) {
    void* const found = dlsym(library, name);
    if (!found && !missing) missing = name;
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(found);
  };
#define PM_FIND(name) find(functions.name, "nccl" #name)
  PM_FIND(GetVersion);
  PM_FIND(GetUniqueId);
  PM_FIND(CommInitRank);
  PM_FIND(CommGetAsyncError);
  PM_FIND(CommAbort);
  PM_FIND(GetErrorString);
  PM_FIND(GroupStart);
  PM_FIND(GroupEnd);
  PM_FIND(Send);
  PM_FIND(Recv);
  PM_FIND(AllGather);
#undef PM_FIND
  return missing;
}

}  // namespace

int load_nccl(const char* library, int* version) {
  if (!loaded) {
    void* const opened = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    if (!opened) return fail(PM_UNSUPPORTED, "%s", dlerror());
    if (const char* missing = look_up(opened)) return fail(PM_UNSUPPORTED, "%s has no %s", library, missing);
  }
  if (const int result = functions.GetVersion(version); result != kNcclSuccess)
    return fail(PM_UNSUPPORTED, "%s does not tell its version: %s", library, functions.GetErrorString(result));
  if (*version < kLeastVersion)
    return fail(PM_UNSUPPORTED, "%s is NCCL of version code %d, older than 2.7 (%d)", library, *version, kLeastVersion);
  loaded = true;
  return PM_OK;
}

const Nccl* loaded_nccl() { return loaded ? &functions : nullptr; }

}  // namespace pm::cuda
