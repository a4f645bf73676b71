#include "cpu.h"

#include <fstream>
#include <sstream>

#include "failure.h"

#if defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace gw {

#if defined(__x86_64__)

const char* HostArch() { return "x86"; }

std::set<std::string> HostFlags() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.rfind("flags", 0) != 0) continue;
    std::istringstream words(line.substr(line.find(':') + 1));
    std::set<std::string> flags;
    for (std::string flag; words >> flag;) flags.insert(flag);
    return flags;
  }
  throw Failure(Exit::kCpu, "cannot read this CPU's flags from /proc/cpuinfo; is /proc mounted?");
}

#elif defined(__aarch64__)

const char* HostArch() { return "arm64"; }

// From the kernel's auxiliary vector, which emulators fill in too; /proc/cpuinfo under an emulator shows the wrong machine.
std::set<std::string> HostFlags() {
  static constexpr struct {
    unsigned long bit;
    const char* name;
  } kFlags[] = {{HWCAP_FP, "fp"},           {HWCAP_ASIMD, "asimd"},       {HWCAP_AES, "aes"},
                {HWCAP_PMULL, "pmull"},     {HWCAP_SHA1, "sha1"},         {HWCAP_SHA2, "sha2"},
                {HWCAP_CRC32, "crc32"},     {HWCAP_ATOMICS, "atomics"},   {HWCAP_FPHP, "fphp"},
                {HWCAP_ASIMDHP, "asimdhp"}, {HWCAP_ASIMDRDM, "asimdrdm"}, {HWCAP_LRCPC, "lrcpc"},
                {HWCAP_JSCVT, "jscvt"},     {HWCAP_FCMA, "fcma"},         {HWCAP_ILRCPC, "ilrcpc"},
                {HWCAP_FLAGM, "flagm"},     {HWCAP_ASIMDDP, "asimddp"},   {HWCAP_ASIMDFHM, "asimdfhm"},
                {HWCAP_SVE, "sve"}},
    kFlags2[] = {{HWCAP2_SVE2, "sve2"}, {HWCAP2_I8MM, "i8mm"}, {HWCAP2_BF16, "bf16"}};
  std::set<std::string> flags;
  for (const auto& flag : kFlags) {
    if (getauxval(AT_HWCAP) & flag.bit) flags.insert(flag.name);
  }
  for (const auto& flag : kFlags2) {
    if (getauxval(AT_HWCAP2) & flag.bit) flags.insert(flag.name);
  }
  return flags;
}

#else
#error "gw-run is written for x86-64 and AArch64"
#endif

}  // namespace gw
