// A processor with AMX on one without: to be preloaded into a process that uses the operators.
//
// The kernels' machine code runs as it ships. A tile instruction raises SIGILL; the handler decodes it where it stands,
// performs it on the thread's own TileUnit and continues behind it. Whatever the processor would refuse, and whatever is no
// tile instruction, ends the process by SIGILL, after a sentence on stderr.
//
// What is not the library's own: its answer to which processor this is (pm::isa(), has_bf16_tiles(); a preloaded
// definition comes before the library's), since its code asks the processor itself. So has_amx() is not tried.
//
// The handler calls nothing but memcpy, memset, write and sigaction, and uses vector registers freely: the kernel has
// saved the interrupted thread's, MXCSR included, and restores them.
#include <dlfcn.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>

#include "../../../ops/csrc/kernels/cpu/dispatch.h"
#include "tile_unit.h"

namespace {

// Of a preloaded library it is there before the thread runs: reading it allocates nothing.
__attribute__((tls_model("initial-exec"))) thread_local amx::TileUnit t_unit;
std::atomic<int64_t> g_instructions{0};

constexpr int kRegisters[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

// A VEX-encoded instruction of three bytes of prefix: C4, R X B and the map, W vvvv L pp; opcode, ModRM and the address.
class Instruction {
 public:
  enum Prefix { kNone, k66, kF3, kF2 };

  Instruction(const uint8_t* code, const greg_t* registers) : code_(code), registers_(registers) {}

  bool is_of_tiles() const {
    return code_[0] == 0xc4 && (code_[1] & 31) == 2 &&
           (opcode() == 0x49 || opcode() == 0x4b || opcode() == 0x5c || opcode() == 0x5e);
  }
  int opcode() const { return code_[3]; }
  Prefix prefix() const { return static_cast<Prefix>(code_[2] & 3); }
  bool has_w_or_l() const { return code_[2] & 0x84; }
  int vvvv() const { return ~code_[2] >> 3 & 15; }  // 0: none named
  int reg() const { return (code_[4] >> 3 & 7) | extension(7); }
  int rm() const { return (code_[4] & 7) | extension(5); }
  int mod() const { return code_[4] >> 6; }
  bool has_sib() const { return mod() != 3 && (code_[4] & 7) == 4; }
  int64_t length() const { return 5 + has_sib() + displacement_bytes(); }

  // The base and the displacement, and what the index adds: a tile's rows are that far apart.
  bool is_relative() const { return mod() == 0 && (code_[4] & 7) == 5; }  // to the next instruction
  bool lacks_base() const { return has_sib() && mod() == 0 && (code_[5] & 7) == 5; }
  uint64_t base() const {
    const uint64_t next = reinterpret_cast<uint64_t>(code_) + static_cast<uint64_t>(length());
    return displacement() + (is_relative() ? next : value_of((has_sib() ? code_[5] & 7 : code_[4] & 7) | extension(5)));
  }
  uint64_t index() const {
    if (!has_sib()) return 0;
    const int found = (code_[5] >> 3 & 7) | extension(6);
    return found == 4 ? 0 : value_of(found) << (code_[5] >> 6);
  }

 private:
  // The fourth bit of a register's number, inverted in the code.
  int extension(int bit) const { return (code_[1] >> bit & 1) ? 0 : 8; }
  int displacement_bytes() const { return mod() == 1 ? 1 : mod() == 2 || is_relative() ? 4 : 0; }
  uint64_t displacement() const {
    const uint8_t* at = code_ + 5 + has_sib();
    int32_t far = 0;
    if (displacement_bytes() == 1) return static_cast<uint64_t>(static_cast<int64_t>(static_cast<int8_t>(*at)));
    if (displacement_bytes() == 4) memcpy(&far, at, 4);
    return static_cast<uint64_t>(static_cast<int64_t>(far));
  }
  uint64_t value_of(int number) const { return static_cast<uint64_t>(registers_[kRegisters[number]]); }

  const uint8_t* code_;
  const greg_t* registers_;
};

constexpr const char* kNoInstruction = "#UD: no tile instruction has this form";
constexpr const char* kNoBase = "not emulated: an address without a base register";

const char* configure(const Instruction& it, amx::TileUnit& unit) {
  if (it.vvvv()) return kNoInstruction;
  if (it.mod() == 3) {
    if (it.prefix() == Instruction::kF2 && (it.rm() & 7) == 0) return unit.zero(it.reg());
    return it.prefix() == Instruction::kNone && it.reg() % 8 == 0 && it.rm() % 8 == 0 ? unit.release() : kNoInstruction;
  }
  if (it.reg() % 8) return kNoInstruction;
  if (it.lacks_base()) return kNoBase;
  void* const address = reinterpret_cast<void*>(it.base() + it.index());
  if (it.prefix() == Instruction::kNone) return unit.load_config(address);
  return it.prefix() == Instruction::k66 ? unit.store_config(address) : kNoInstruction;
}

const char* move(const Instruction& it, amx::TileUnit& unit) {
  if (it.vvvv() || it.mod() == 3) return kNoInstruction;
  if (!it.has_sib()) return "#UD: the address of a tile has no SIB byte";
  if (it.lacks_base()) return kNoBase;
  char* const address = reinterpret_cast<char*>(it.base());
  switch (it.prefix()) {
    case Instruction::kF2:  // tileloadd
    case Instruction::k66:  // tileloaddt1
      return unit.load(it.reg(), address, it.index());
    case Instruction::kF3:
      return unit.store(it.reg(), address, it.index());
    default:
      return kNoInstruction;
  }
}

const char* multiply(const Instruction& it, amx::TileUnit& unit) {
  if (it.mod() != 3) return kNoInstruction;
  const int sum = it.reg(), a = it.rm(), b = it.vvvv();
  if (it.opcode() == 0x5c)
    return it.prefix() == Instruction::kF3 ? unit.multiply_bf16(sum, a, b) : "#UD: a product of neither bytes nor bfloat16";
  const bool a_signed = it.prefix() == Instruction::kF2 || it.prefix() == Instruction::kF3;
  const bool b_signed = it.prefix() == Instruction::kF2 || it.prefix() == Instruction::k66;
  return unit.multiply_bytes(sum, a, b, a_signed, b_signed);
}

const char* execute(const Instruction& it, amx::TileUnit& unit) {
  if (!it.is_of_tiles()) return "neither this processor nor the emulation has this instruction";
  if (it.has_w_or_l()) return "#UD: VEX.W or VEX.L is set";
  switch (it.opcode()) {
    case 0x49:
      return configure(it, unit);
    case 0x4b:
      return move(it, unit);
    default:
      return multiply(it, unit);
  }
}

int real_sigaction(int signal, const struct sigaction* action, struct sigaction* old) {
  static const auto real = reinterpret_cast<decltype(&sigaction)>(dlsym(RTLD_NEXT, "sigaction"));
  return real(signal, action, old);
}

void say(const char* text) {
  if (write(STDERR_FILENO, text, strlen(text)) < 0) return;  // the process ends all the same
}

void end_process(const uint8_t* code, const char* why) {
  say("amx emulation: ");
  say(why);
  say("; the code is");
  for (int i = 0; i < 10; ++i) {
    const char digits[] = {' ', "0123456789abcdef"[code[i] >> 4], "0123456789abcdef"[code[i] & 15], 0};
    say(digits);
  }
  say("\n");
  struct sigaction end = {};
  end.sa_handler = SIG_DFL;
  real_sigaction(SIGILL, &end, nullptr);  // the instruction comes again
}

// One trap serves all tile instructions that follow one another: it costs more than any of them.
void on_illegal_instruction(int, siginfo_t*, void* context) {
  greg_t* const registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  for (;;) {
    const auto* code = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
    const Instruction instruction(code, registers);
    if (const char* why = execute(instruction, t_unit)) return end_process(code, why);
    g_instructions.fetch_add(1, std::memory_order_relaxed);
    registers[REG_RIP] += instruction.length();
    if (!Instruction(code + instruction.length(), registers).is_of_tiles()) return;
  }
}

__attribute__((constructor)) void install() {
  struct sigaction ours = {};
  ours.sa_sigaction = on_illegal_instruction;
  ours.sa_flags = SA_SIGINFO;
  if (real_sigaction(SIGILL, &ours, nullptr) != 0) perror("amx emulation: sigaction");
}

}  // namespace

namespace pm {
Isa isa() { return Isa::amx; }
bool has_bf16_tiles() { return true; }
}  // namespace pm

extern "C" {

// Paddle and Python's faulthandler handle SIGILL to report a crash; this one stays before them.
int sigaction(int signal, const struct sigaction* action, struct sigaction* old) noexcept {
  return real_sigaction(signal, signal == SIGILL ? nullptr : action, old);
}

// Tile instructions emulated so far, in all threads.
int64_t amx_emulated_instructions(void) { return g_instructions.load(); }

}  // extern "C"
