// The NVIDIA GPU of this machine, asked through its driver alone; the twin of backends/nvidia.py.
#pragma once

#include <string>
#include <string_view>

namespace gw {

// Architecture of the targets that run on it.
constexpr std::string_view kCuda = "cuda";

// What this machine lacks to run code for a level such as "sm_90"; empty where nothing.
std::string MissingGpu(const std::string& level);

}  // namespace gw
