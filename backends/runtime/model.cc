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

namespace gw {
namespace ffi = tvm::ffi;
namespace {

constexpr size_t kAlignment = 64;
constexpr int kPooledAllocator = 2;
// ThreadGroup::kSpecifyThreadShareAllCore: workers float over the cores given instead of being pinned to one each.
constexpr int kShareCores = -3;

struct AlignedAllocator {
  void AllocData(DLTensor* tensor) {
    tensor->data = std::aligned_alloc(kAlignment, (ffi::GetDataSize(*tensor) / kAlignment + 1) * kAlignment);
    if (!tensor->data) throw Failure(Exit::kInput, "out of memory for an input");
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

ffi::Function Required(const ffi::Module& module, const char* name) {
  ffi::Optional<ffi::Function> function = module->GetFunction(name);
  if (!function.has_value()) throw Failure(Exit::kArtifact, "the library has no function '" + std::string(name) + "'");
  return *function;
}

}  // namespace

struct Model::State {
  explicit State(std::string_view code) : file(code) {}

  MemoryFile file;  // open as long as the code is mapped: the dynamic linker knows libraries by path
  ffi::Optional<ffi::Module> library, machine;  // the machine calls into the library: it goes first
  ffi::Function main;
  std::vector<ffi::Tensor> inputs;
  std::vector<ffi::AnyView> arguments;
  ffi::Any result;
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
    state_->machine = Required(*state_->library, "vm_load_executable")().cast<ffi::Module>();
    Required(*state_->machine, "vm_initialization")(static_cast<int>(kDLCPU), 0, kPooledAllocator);
    state_->main = Required(*state_->machine, "main");
  } catch (const ffi::Error& error) {
    throw Failure(Exit::kArtifact, "TVM's runtime cannot load the library: " + Reason(error));
  }
}

Model::~Model() = default;
Model::Model(Model&&) noexcept = default;

void Model::SetInputs(const std::vector<Array>& inputs) {
  state_->inputs.clear();
  state_->arguments.clear();
  for (const Array& array : inputs) {
    const DLDataType dtype{array.dtype()->code, array.dtype()->bits, 1};
    const ffi::ShapeView shape(array.shape().data(), array.shape().size());
    ffi::Tensor tensor = ffi::Tensor::FromNDAlloc(AlignedAllocator(), shape, dtype, DLDevice{kDLCPU, 0});
    std::memcpy(tensor.data_ptr(), array.data(), array.bytes());
    state_->inputs.push_back(std::move(tensor));
  }
  for (const ffi::Tensor& tensor : state_->inputs) state_->arguments.emplace_back(tensor);
}

void Model::Run() {
  try {
    state_->main.CallPacked(state_->arguments.data(), static_cast<int32_t>(state_->arguments.size()), &state_->result);
  } catch (const std::exception& error) {
    throw Failure(Exit::kInternal, "the model failed: " + Reason(error));
  }
}

std::vector<Array> Model::Outputs() const {
  std::vector<ffi::Tensor> tensors;
  if (auto single = state_->result.as<ffi::Tensor>()) {
    tensors.push_back(*single);
  } else {
    for (const ffi::Tensor& tensor : state_->result.cast<ffi::Array<ffi::Tensor>>()) tensors.push_back(tensor);
  }
  std::vector<Array> arrays;
  for (const ffi::Tensor& tensor : tensors) {
    const DType* dtype = FindDType(tensor.dtype().code, tensor.dtype().bits);
    if (!dtype || tensor.dtype().lanes != 1 || !tensor.IsContiguous()) {
      throw Failure(Exit::kInternal, "the model returned a tensor of a type or layout that .npy files do not have");
    }
    arrays.emplace_back(dtype, std::vector<int64_t>(tensor.shape().begin(), tensor.shape().end()));
    if (arrays.back().bytes() == 0) continue;
    std::memcpy(arrays.back().data(), static_cast<const char*>(tensor.data_ptr()) + tensor.byte_offset(), arrays.back().bytes());
  }
  return arrays;
}

int Model::AllowedCores() {
  const cpu_set_t set = Affinity();
  return CPU_COUNT(&set);
}

}  // namespace gw
