// gw-run: runs a `model.gw` without Python. See Usage below and docs/ARTIFACT.md.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "array.h"
#include "artifact.h"
#include "cpu.h"
#include "failure.h"
#include "files.h"
#include "gpu.h"
#include "model.h"
#include "tiles.h"

namespace gw {
namespace {

constexpr const char* kUsage =
    R"(usage: gw-run MODEL.gw --input X.npy [--input Y.npy ...] [--output OUT.npy] [options]
       gw-run MODEL.gw --info

  --input FILE    one .npy file for each input of the model, in order
  --output FILE   where the result goes; a model with several outputs writes FILE.0.npy, FILE.1.npy, ...
  --each-sample   every input holds many samples, stacked along a new first dimension: run one by one, stack the results
  --repeat N      run N times and print the median and minimum latency (default 1, not printed)
  --warmup W      runs before those, not counted (default 10 with --repeat, else 0)
  --profile       with --repeat: print the median time of every step of the program, too
  --threads N     worker threads (default: every core this process may use)
  --info          print what the artifact holds and whether this machine can run it
  --help          this text

exit codes: 0 done, 1 the model failed, 2 usage, 3 bad artifact, 4 other CPU or GPU, 5 bad input, 6 output not written
)";

struct Options {
  std::string model, output;
  std::vector<std::string> inputs;
  int repeat = 0, threads = 0;
  std::optional<int> warmup;
  bool info = false, help = false, each_sample = false, profile = false;
};

[[noreturn]] void BadUsage(const std::string& reason) { throw Failure(Exit::kUsage, reason + "; see gw-run --help"); }

int Number(const std::string& option, const std::string& text, int least) {
  if (text.empty() || text.size() > 9 || text.find_first_not_of("0123456789") != std::string::npos || std::stoi(text) < least) {
    BadUsage(option + " takes a whole number of at least " + std::to_string(least) + ", not '" + text + "'");
  }
  return std::stoi(text);
}

Options ParseOptions(const std::vector<std::string>& words) {
  Options options;
  for (size_t i = 0; i < words.size(); ++i) {
    const std::string& word = words[i];
    const auto value = [&]() -> const std::string& {
      if (i + 1 == words.size()) BadUsage(word + " needs a value");
      return words[++i];
    };
    if (word == "--input") {
      options.inputs.push_back(value());
    } else if (word == "--output") {
      options.output = value();
    } else if (word == "--repeat") {
      options.repeat = Number(word, value(), 1);
    } else if (word == "--warmup") {
      options.warmup = Number(word, value(), 0);
    } else if (word == "--threads") {
      options.threads = Number(word, value(), 1);
    } else if (word == "--each-sample") {
      options.each_sample = true;
    } else if (word == "--profile") {
      options.profile = true;
    } else if (word == "--info") {
      options.info = true;
    } else if (word == "--help" || word == "-h") {
      options.help = true;
    } else if (!word.empty() && word[0] == '-') {
      BadUsage("unknown option '" + word + "'");
    } else if (options.model.empty()) {
      options.model = word;
    } else {
      BadUsage("'" + word + "' is a second model");
    }
  }
  if (options.help) return options;
  if (options.model.empty()) BadUsage("no model given");
  if (!options.info && options.output.empty() && options.repeat == 0) BadUsage("nothing to do: give --output, --repeat or --info");
  if (options.each_sample && options.repeat > 0) BadUsage("--repeat times one sample; leave --each-sample out");
  if (options.profile && options.repeat == 0) BadUsage("--profile takes medians over runs; give --repeat N, too");
  return options;
}

void PrintSpecs(const char* title, const std::vector<TensorSpec>& specs) {
  for (const TensorSpec& spec : specs) std::printf("%-8s %s: %s\n", title, spec.name.c_str(), Describe(spec.dtype, spec.shape).c_str());
}

void PrintInfo(const Artifact& artifact) {
  std::printf("%-8s %s (%s)\n", "model", artifact.name.c_str(), artifact.stage.c_str());
  std::printf("%-8s %s\n", "made by", artifact.created_by.c_str());
  for (const auto& [package, version] : artifact.versions) std::printf("%-8s %s %s\n", "with", package.c_str(), version.c_str());
  if (!artifact.recipe.empty()) std::printf("%-8s %s\n", "recipe", artifact.recipe.c_str());
  PrintSpecs("input", artifact.inputs);
  PrintSpecs("output", artifact.outputs);
  const std::set<std::string> flags = HostFlags();
  for (const TargetEntry& target : artifact.targets) {
    std::string missing;
    for (const std::string& flag : Missing(target, HostArch(), flags)) missing += " " + flag;
    const std::string lack = (target.arch == kCuda ? ":" : "; needs") + missing;
    const std::string state = missing.empty() ? "runs here" : "does not run here" + lack;
    std::printf("%-8s %s: %s\n", "target", target.Name().c_str(), state.c_str());
  }
  for (const Member& member : artifact.members) std::printf("%-8s %s: %zu bytes\n", "member", member.name.c_str(), member.data.size());
}

// The files of the inputs, checked against the manifest. With `each_sample` all have one more dimension, of one size, in front.
std::vector<Array> ReadInputs(const Artifact& artifact, const Options& options) {
  const std::vector<std::string>& paths = options.inputs;
  if (paths.size() != artifact.inputs.size()) {
    std::string wanted;
    for (const TensorSpec& spec : artifact.inputs) wanted += " " + spec.name + ": " + Describe(spec.dtype, spec.shape);
    throw Failure(Exit::kInput, artifact.name + " takes " + std::to_string(artifact.inputs.size()) + " inputs, not " +
                                    std::to_string(paths.size()) + "; give one --input for each:" + wanted);
  }
  std::vector<Array> arrays;
  for (size_t i = 0; i < paths.size(); ++i) {
    arrays.push_back(ParseNpy(ReadFile(paths[i], Exit::kInput), paths[i]));
    const Array& array = arrays.back();
    TensorSpec spec = artifact.inputs[i];
    if (options.each_sample) spec.shape.insert(spec.shape.begin(), i == 0 ? -1 : arrays[0].shape()[0]);
    bool fits = array.shape().size() == spec.shape.size() && spec.dtype == array.dtype()->name;
    for (size_t d = 0; fits && d < spec.shape.size(); ++d) fits = spec.shape[d] < 0 || spec.shape[d] == array.shape()[d];
    if (!fits || (options.each_sample && array.shape()[0] == 0)) {
      throw Failure(Exit::kInput, "'" + paths[i] + "' is " + Describe(array.dtype()->name, array.shape()) + ", but input '" +
                                      spec.name + "' of " + artifact.name + " takes " + Describe(spec.dtype, spec.shape));
    }
  }
  return arrays;
}

std::vector<std::string> OutputPaths(const std::string& path, size_t count) {
  if (path.empty()) return {};
  constexpr std::string_view kSuffix = ".npy";
  const bool suffixed = path.size() > kSuffix.size() && path.compare(path.size() - kSuffix.size(), kSuffix.size(), kSuffix) == 0;
  const std::string stem = suffixed ? path.substr(0, path.size() - kSuffix.size()) : path;
  if (count == 1) return {stem + ".npy"};
  std::vector<std::string> paths;
  for (size_t i = 0; i < count; ++i) paths.push_back(stem + "." + std::to_string(i) + ".npy");
  return paths;
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return (values[(values.size() - 1) / 2] + values[values.size() / 2]) / 2;
}

void Measure(Model* model, int repeat, int warmup, int threads) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> milliseconds;
  for (int i = 0; i < repeat; ++i) {
    const auto start = Clock::now();
    model->Run();
    milliseconds.push_back(std::chrono::duration<double, std::milli>(Clock::now() - start).count());
  }
  const double least = *std::min_element(milliseconds.begin(), milliseconds.end());
  std::printf("latency ms: median %.4f min %.4f (%d runs after %d, %d threads)\n", Median(milliseconds), least, repeat, warmup,
              threads);
}

// A table of every step's median time. The wait for the slowest thread belongs to the step it waits in.
void Profile(Model* model, int repeat) {
  std::vector<std::string> names;
  std::vector<std::vector<double>> times;
  for (int i = 0; i < repeat; ++i) {
    const std::vector<Step> steps = model->Profile();
    times.resize(steps.size());
    names.clear();
    for (size_t s = 0; s < steps.size(); ++s) {
      names.push_back(steps[s].name);
      times[s].push_back(steps[s].microseconds);
    }
  }
  for (size_t s = 0; s < names.size(); ++s) std::printf("%10.2f us  %s\n", Median(times[s]), names[s].c_str());
}

// Runs the samples stacked in `inputs` one by one and stacks their outputs.
std::vector<Array> RunEach(Model* model, const std::vector<Array>& inputs) {
  std::vector<Array> stacked;
  const int64_t count = inputs[0].shape()[0];
  for (int64_t index = 0; index < count; ++index) {
    std::vector<Array> sample;
    for (const Array& input : inputs) sample.push_back(input.Row(index));
    model->SetInputs(sample);
    model->Run();
    const std::vector<Array> outputs = model->Outputs();
    for (size_t i = 0; i < outputs.size(); ++i) {
      if (index == 0) {
        std::vector<int64_t> shape = outputs[i].shape();
        shape.insert(shape.begin(), count);
        stacked.emplace_back(outputs[i].dtype(), std::move(shape));
      }
      stacked[i].SetRow(index, outputs[i]);
    }
  }
  return stacked;
}

void RunModel(const Artifact& artifact, const Options& options) {
  const TargetEntry& target = Choose(artifact, HostArch(), HostFlags());
  RequestTiles(target.requires_flags);
  const std::vector<Array> inputs = ReadInputs(artifact, options);
  const std::vector<std::string> paths = OutputPaths(options.output, artifact.outputs.size());
  for (const std::string& path : paths) CheckOutput(path);
  const int threads = options.threads ? options.threads : Model::AllowedCores();
  Model model(artifact.Data(target.library), threads);
  std::vector<Array> outputs;
  if (options.each_sample && !inputs.empty()) {
    outputs = RunEach(&model, inputs);
  } else {
    model.SetInputs(inputs);
    const int warmup = options.warmup.value_or(options.repeat > 0 ? 10 : 0);
    for (int i = 0; i < warmup; ++i) model.Run();
    if (options.repeat > 0) {
      Measure(&model, options.repeat, warmup, threads);
      if (options.profile) Profile(&model, options.repeat);
    } else {
      model.Run();
    }
    outputs = model.Outputs();
  }
  if (outputs.size() != artifact.outputs.size()) {
    throw Failure(Exit::kArtifact, "the library returns " + std::to_string(outputs.size()) + " tensors, but its manifest lists " +
                                       std::to_string(artifact.outputs.size()) + "; build the artifact again");
  }
  for (size_t i = 0; i < paths.size(); ++i) {
    WriteFile(paths[i], FormatNpy(outputs[i]));
    const std::string kind = Describe(outputs[i].dtype()->name, outputs[i].shape());
    std::printf("%s: %s -> %s\n", artifact.outputs[i].name.c_str(), kind.c_str(), paths[i].c_str());
  }
}

void Main(const std::vector<std::string>& words) {
  const Options options = ParseOptions(words);
  if (options.help) {
    std::fputs(kUsage, stdout);
    return;
  }
  const std::string file = ReadFile(options.model, Exit::kArtifact);
  std::string tvm = "unknown";
  try {
    const Artifact artifact = ParseArtifact(file);
    tvm = artifact.Version("tvm");
    if (options.info) {
      PrintInfo(artifact);
    } else {
      RunModel(artifact, options);
    }
  } catch (const Failure& failure) {
    const bool about_file = failure.code() == Exit::kArtifact || failure.code() == Exit::kCpu;
    if (!about_file) throw;
    const std::string built = tvm == "unknown" ? "" : " (built with TVM " + tvm + ", this gw-run with " GW_TVM_VERSION ")";
    throw Failure(failure.code(), "'" + options.model + "': " + failure.what() + built);
  }
}

}  // namespace
}  // namespace gw

int main(int argc, char** argv) {
  gw::Exit code = gw::Exit::kOk;
  try {
    gw::Main(std::vector<std::string>(argv + 1, argv + argc));
  } catch (const gw::Failure& failure) {
    code = failure.code();
    std::fprintf(stderr, "gw-run: error: %s\n", failure.what());
  } catch (const std::exception& error) {
    code = gw::Exit::kInternal;
    std::fprintf(stderr, "gw-run: internal error: %s\n", error.what());
  }
  if (std::fflush(stdout) != 0 && code == gw::Exit::kOk) {
    code = gw::Exit::kOutput;
    std::fputs("gw-run: error: cannot write to standard output\n", stderr);
  }
  // Everything is written. A normal exit would join TVM's workers, which spin for 60 ms before they see that they should end.
  std::_Exit(static_cast<int>(code));
}
