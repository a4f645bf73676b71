// A `model.gw`, read and checked; the twin of backends/artifact.py.
#pragma once

#include <cstdint>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "container.h"

namespace gw {

struct TensorSpec {
  std::string name;
  std::vector<int64_t> shape;  // -1: any size
  std::string dtype;
};

struct TargetEntry {
  std::string arch, level, library;
  std::vector<std::string> requires_flags;

  std::string Name() const { return arch + ":" + level; }
};

struct Artifact {
  std::string name, stage, created_by, recipe;
  std::vector<std::pair<std::string, std::string>> versions;
  std::vector<TensorSpec> inputs, outputs;
  std::vector<TargetEntry> targets;  // best first
  std::vector<Member> members;       // into the file's bytes

  std::string_view Data(std::string_view member) const;
  std::string Version(std::string_view package) const;
};

// Checks the container, the manifest and every member's SHA-256. `file` must outlive the result. Throws Failure(kArtifact).
Artifact ParseArtifact(std::string_view file);

// Flags of `target` that `flags` lacks, or its architecture where that is another one; of a GPU, what this machine lacks in words.
std::vector<std::string> Missing(const TargetEntry& target, std::string_view arch, const std::set<std::string>& flags);

// The best library this machine can run. Throws Failure(kCpu) naming what each library needs.
const TargetEntry& Choose(const Artifact& artifact, std::string_view arch, const std::set<std::string>& flags);

}  // namespace gw
