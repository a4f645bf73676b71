// The Linux kernel's permission to use AMX tiles; the twin of backends/tiles.py.
#pragma once

#include <string>
#include <vector>

namespace gw {

// Asks for the permission where `flags` holds "amx_tile". Throws Failure(kCpu) where the kernel refuses.
void RequestTiles(const std::vector<std::string>& flags);

}  // namespace gw
