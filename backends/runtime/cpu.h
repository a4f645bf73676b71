// What this machine's processor can do, in the Linux kernel's names (as backends/host.py reads them).
#pragma once

#include <set>
#include <string>

namespace gw {

// "x86" or "arm64".
const char* HostArch();

// Throws Failure(kCpu) where the flags cannot be read.
std::set<std::string> HostFlags();

}  // namespace gw
