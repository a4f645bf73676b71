// A compiled library, loaded through TVM's runtime: the only part of gw-run that knows TVM.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "array.h"

namespace tvm::ffi {
class Function;
}

namespace gw {

// One call of a kernel and how long it took.
struct Step {
  std::string name;
  double microseconds;
};

class Model {
 public:
  // Throws Failure(kArtifact) where TVM's runtime cannot load the library, Failure(kUsage) where it cannot have `threads`.
  Model(std::string_view library, int threads);
  ~Model();
  Model(Model&&) noexcept;

  // Copies the inputs to where Run reads them.
  void SetInputs(const std::vector<Array>& inputs);
  // One inference; this is what gets timed. Throws Failure(kInternal) where the model fails.
  void Run();
  // As Run; the time of each step.
  std::vector<Step> Profile();
  // Copies of the last run's outputs.
  std::vector<Array> Outputs() const;

  // Cores this process may use; the default number of threads.
  static int AllowedCores();

 private:
  // Allocates what the library's description asks for.
  void Plan(const std::string& description);
  void Call(const tvm::ffi::Function& function, size_t first);

  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace gw
