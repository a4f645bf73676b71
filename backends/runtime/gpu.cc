#include "gpu.h"

#include <dlfcn.h>

#include "failure.h"

namespace gw {
namespace {

// CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
constexpr int kMajor = 75, kMinor = 76;

struct Gpu {
  std::string name, missing;
  int capability = 0;
};

template <typename... Arguments>
int Call(void* driver, const char* symbol, Arguments... arguments) {
  const auto function = reinterpret_cast<int (*)(Arguments...)>(dlsym(driver, symbol));
  return function ? function(arguments...) : -1;
}

// Device 0. The driver stays loaded: the library asks it for everything else.
Gpu FirstGpu() {
  Gpu gpu;
  void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!driver) {
    gpu.missing = "this machine has no NVIDIA driver (libcuda.so.1 does not load)";
    return gpu;
  }
  int count = 0, device = 0, major = 0, minor = 0;
  char name[100] = "";
  int status = Call(driver, "cuInit", 0u);
  if (status == 0) status = Call(driver, "cuDeviceGetCount", &count);
  if (status != 0) {
    gpu.missing = "the NVIDIA driver of this machine does not start (CUDA error " + std::to_string(status) + ")";
    return gpu;
  }
  if (count == 0) {
    gpu.missing = "this process sees no NVIDIA GPU";
    return gpu;
  }
  status = Call(driver, "cuDeviceGet", &device, 0);
  if (status == 0) status = Call(driver, "cuDeviceGetName", static_cast<char*>(name), static_cast<int>(sizeof(name)), device);
  if (status == 0) status = Call(driver, "cuDeviceGetAttribute", &major, kMajor, device);
  if (status == 0) status = Call(driver, "cuDeviceGetAttribute", &minor, kMinor, device);
  if (status != 0) {
    gpu.missing = "the NVIDIA driver of this machine does not describe device 0 (CUDA error " + std::to_string(status) + ")";
    return gpu;
  }
  gpu.name = name;
  gpu.capability = 10 * major + minor;
  return gpu;
}

}  // namespace

std::string MissingGpu(const std::string& level) {
  static const Gpu gpu = FirstGpu();
  if (!gpu.missing.empty()) return gpu.missing;
  if (level.size() != 5 || level.compare(0, 3, "sm_") != 0 || level.find_first_not_of("0123456789", 3) != std::string::npos) {
    throw Failure(Exit::kArtifact, "the manifest names the unknown GPU level '" + level + "'");
  }
  // Machine code runs on chips of its major compute capability and the same or a higher minor one.
  const int wanted = std::stoi(level.substr(3));
  if (gpu.capability / 10 == wanted / 10 && gpu.capability >= wanted) return "";
  return "this machine's GPU (" + gpu.name + ") is sm_" + std::to_string(gpu.capability);
}

}  // namespace gw
