#include "tiles.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "failure.h"

#if defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace gw {

void RequestTiles(const std::vector<std::string>& flags) {
  if (std::find(flags.begin(), flags.end(), "amx_tile") == flags.end()) return;
#if defined(__x86_64__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM; glibc's headers of 2022 lack it
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0) return;
  const std::string reason = std::strerror(errno);
#else
  const std::string reason = "not an x86 processor";
#endif
  throw Failure(Exit::kCpu, "the kernel refuses this process AMX tiles (" + reason +
                                "); use Linux 5.16 or later outside a sandbox that hides them, or build for x86:avx512-vnni");
}

}  // namespace gw
