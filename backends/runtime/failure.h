// The one error type of gw-run: what went wrong, the way out, and the exit code that tells scripts which kind it is.
#pragma once

#include <stdexcept>
#include <string>

namespace gw {

enum class Exit : int {
  kOk = 0,
  kInternal = 1,  // the compiled model itself failed
  kUsage = 2,     // the command line
  kArtifact = 3,  // the .gw file: missing, truncated, damaged, of another version
  kCpu = 4,       // the artifact is built for another CPU or GPU
  kInput = 5,     // an input array: missing, malformed, wrong shape or type
  kOutput = 6,    // an output cannot be written
};

class Failure : public std::runtime_error {
 public:
  Failure(Exit code, const std::string& message) : std::runtime_error(message), code_(code) {}
  Exit code() const { return code_; }

 private:
  Exit code_;
};

}  // namespace gw
