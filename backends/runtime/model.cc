#include "model.h"

#include <sched.h>
#include <sys/mman.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "failure.h"
#include "json.h"

namespace gw {
namespace ffi = tvm::ffi;
namespace {

constexpr size_t kAlignment = 64;
// ThreadGroup::kSpecifyThreadShareAllCore: workers float over the cores given instead of being pinned to one each.
constexpr int kShareCores = -3;

struct AlignedAllocator {
  void AllocData(DLTensor* tensor) {
    tensor->data = std::aligned_alloc(kAlignment, (ffi::GetDataSize(*tensor) / kAlignment + 2) * kAlignment);
    if (!tensor->data) throw Failure(Exit::kInternal, "out of memory for a tensor");
  }
  void FreeData(DLTensor* tensor) { std::free(tensor->data); }
};

// A file that exists only while it is open, so that nothing is left behind however the process ends.
class MemoryFile {
 public:
  explicit MemoryFile(std::string_view content) : fd_(memfd_create("gw-model", MFD_CLOEXEC)) {
    while (fd_ >= 0 && !content.empty()) {
      const ssize_t count = write(fd_, content.data(), content.size());
      if (count < 0 && errno == EINTR) continue;
      if (count < 0) break;
      content.remove_prefix(static_cast<size_t>(count));
    }
    if (fd_ >= 0 && content.empty()) return;
    const std::string reason = std::strerror(errno);
    if (fd_ >= 0) close(fd_);
    throw Failure(Exit::kInternal, "cannot hold the library in memory: " + reason);
  }
  ~MemoryFile() { close(fd_); }
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;
  std::string Path() const { return "/proc/self/fd/" + std::to_string(fd_); }

 private:
  int fd_;
};

cpu_set_t Affinity() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) != 0 || CPU_COUNT(&set) == 0) CPU_SET(0, &set);
  return set;
}

void ConfigureThreads(int threads) {
  const cpu_set_t set = Affinity();
  ffi::Array<ffi::String> cores;
  for (int core = 0; core < CPU_SETSIZE; ++core) {
    if (CPU_ISSET(core, &set)) cores.push_back(std::to_string(core));
  }
  ffi::Function::GetGlobalRequired("runtime.config_threadpool")(kShareCores, threads, cores);
}

// The last line of TVM's message; the lines before it are its own stack.
std::string Reason(const std::exception& error) {
  std::string text = error.what();
  while (!text.empty() && (text.back() == '\n' || text.back() == ' ')) text.pop_back();
  const size_t newline = text.rfind('\n');
  return newline == std::string::npos ? text : text.substr(newline + 1);
}

// 64-byte aligned, as every kernel expects.
ffi::Tensor Allocate(DLDataType dtype, const std::vector<int64_t>& shape) {
  const ffi::ShapeView view(shape.data(), shape.size());
  return ffi::Tensor::FromNDAlloc(AlignedAllocator(), view, dtype, DLDevice{kDLCPU, 0});
}

DLDataType TypeOf(const DType* dtype) { return DLDataType{dtype->code, dtype->bits, 1}; }

ffi::Function Required(const ffi::Module& module, const char* name) {
  ffi::Optional<ffi::Function> function = module->GetFunction(name);
  if (!function.has_value()) throw Failure(Exit::kArtifact, "the library has no function '" + std::string(name) + "'");
  return *function;
}

}  // namespace

struct Model::State {
  explicit State(std::string_view code) : file(code) {}

  MemoryFile file;  // open as long as the code is mapped: the dynamic linker knows libraries by path
  ffi::Optional<ffi::Module> library;
  ffi::Function main, profile;
  std::vector<std::string> steps;
  std::vector<ffi::Tensor> inputs, outputs;
  ffi::Tensor arena, times;
  // The arena, the inputs, the outputs; the profile's times come before them.
  std::vector<ffi::AnyView> arguments;
};

Model::Model(std::string_view library, int threads) {
  if (threads < 1 || threads > AllowedCores()) {
    throw Failure(Exit::kUsage, "--threads " + std::to_string(threads) + ": this process may use 1 to " +
                                    std::to_string(AllowedCores()) + " cores");
  }
  state_ = std::make_unique<State>(library);
  try {
    ConfigureThreads(threads);
    const ffi::Function load = ffi::Function::GetGlobalRequired("ffi.Module.load_from_file.so");
    state_->library = load(state_->file.Path(), "so").cast<ffi::Module>();
    state_->main = Required(*state_->library, "main");
    state_->profile = Required(*state_->library, "profile");
    Plan(Required(*state_->library, "describe")().cast<std::string>());
  } catch (const ffi::Error& error) {
    throw Failure(Exit::kArtifact, "TVM's runtime cannot load the library: " + Reason(error));
  }
}

void Model::Plan(const std::string& description) {
  const Json plan = ParseJson(description);
  state_->arena = Allocate(DLDataType{kDLUInt, 8, 1}, {plan.At("arena").Count("arena")});
  for (const Json& output : plan.At("outputs").Items("outputs")) {
    const std::string name = output.At("dtype").String("dtype");
    const DType* dtype = FindDType(name);
    if (!dtype) throw Failure(Exit::kArtifact, "an output of the library is " + name + ", which .npy files do not have");
    std::vector<int64_t> shape;
    for (const Json& extent : output.At("shape").Items("shape")) shape.push_back(extent.Count("shape"));
    state_->outputs.push_back(Allocate(TypeOf(dtype), shape));
  }
  for (const Json& step : plan.At("steps").Items("steps")) state_->steps.push_back(step.Items("steps")[0].String("steps"));
  state_->times = Allocate(DLDataType{kDLInt, 64, 1}, {static_cast<int64_t>(state_->steps.size()) + 1});
}

Model::~Model() = default;
Model::Model(Model&&) noexcept = default;

void Model::SetInputs(const std::vector<Array>& inputs) {
  state_->inputs.clear();
  for (const Array& array : inputs) {
    state_->inputs.push_back(Allocate(TypeOf(array.dtype()), array.shape()));
    if (array.bytes() != 0) std::memcpy(state_->inputs.back().data_ptr(), array.data(), array.bytes());
  }
  state_->arguments = {state_->times, state_->arena};
  state_->arguments.insert(state_->arguments.end(), state_->inputs.begin(), state_->inputs.end());
  state_->arguments.insert(state_->arguments.end(), state_->outputs.begin(), state_->outputs.end());
}

void Model::Run() { Call(state_->main, 1); }

std::vector<Step> Model::Profile() {
  Call(state_->profile, 0);
  const auto* times = static_cast<const int64_t*>(state_->times.data_ptr());
  std::vector<Step> steps;
  for (size_t i = 0; i < state_->steps.size(); ++i) {
    steps.push_back({state_->steps[i], static_cast<double>(times[i + 1] - times[i]) / 1e3});
  }
  return steps;
}

void Model::Call(const ffi::Function& function, size_t first) {
  ffi::Any nothing;
  try {
    function.CallPacked(state_->arguments.data() + first, static_cast<int32_t>(state_->arguments.size() - first), &nothing);
  } catch (const std::exception& error) {
    throw Failure(Exit::kInternal, "the model failed: " + Reason(error));
  }
}

std::vector<Array> Model::Outputs() const {
  std::vector<Array> arrays;
  for (const ffi::Tensor& tensor : state_->outputs) {
    const std::vector<int64_t> shape(tensor.shape().begin(), tensor.shape().end());
    arrays.emplace_back(FindDType(tensor.dtype().code, tensor.dtype().bits), shape);
    if (arrays.back().bytes() != 0) std::memcpy(arrays.back().data(), tensor.data_ptr(), arrays.back().bytes());
  }
  return arrays;
}

int Model::AllowedCores() {
  const cpu_set_t set = Affinity();
  return CPU_COUNT(&set);
}

}  // namespace gw
