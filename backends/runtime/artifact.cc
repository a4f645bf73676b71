#include "artifact.h"

#include "array.h"
#include "failure.h"
#include "gpu.h"
#include "json.h"
#include "sha256.h"

namespace gw {
namespace {

constexpr int64_t kVersion = 2;

std::vector<TensorSpec> ParseSpecs(const Json& list, std::string_view where) {
  std::vector<TensorSpec> specs;
  for (const Json& item : list.Items(where)) {
    TensorSpec spec{item.At("name").String("name"), {}, item.At("dtype").String("dtype")};
    for (const Json& dimension : item.At("shape").Items("shape")) {
      spec.shape.push_back(dimension.is_null() ? -1 : dimension.Count("shape"));
    }
    if (!FindDType(spec.dtype)) throw Failure(Exit::kArtifact, "the manifest names the unknown type '" + spec.dtype + "'");
    specs.push_back(std::move(spec));
  }
  return specs;
}

std::vector<TargetEntry> ParseTargets(const Json& list) {
  std::vector<TargetEntry> targets;
  for (const Json& item : list.Items("targets")) {
    TargetEntry target{item.At("arch").String("arch"), item.At("level").String("level"), item.At("library").String("library"), {}};
    for (const Json& flag : item.At("requires").Items("requires")) target.requires_flags.push_back(flag.String("requires"));
    targets.push_back(std::move(target));
  }
  if (targets.empty()) throw Failure(Exit::kArtifact, "the artifact holds no compiled library; build it again");
  return targets;
}

// Every member but the manifest, which the seal covers, must be listed with its size and hash, and the other way round.
void CheckMembers(const std::vector<Member>& members, const Json& listed) {
  const Json::Object& entries = listed.Fields("members");
  for (const auto& [name, entry] : entries) {
    const Member* found = nullptr;
    for (const Member& member : members) {
      if (member.name == name) found = &member;
    }
    if (!found) throw Failure(Exit::kArtifact, "member '" + name + "' is missing; copy or build the artifact again");
    if (static_cast<int64_t>(found->data.size()) != entry.At("size").Count("size") ||
        Sha256Hex(found->data) != entry.At("sha256").String("sha256")) {
      throw Failure(Exit::kArtifact, "member '" + name + "' does not match its SHA-256; copy or build the artifact again");
    }
  }
  for (size_t i = 1; i < members.size(); ++i) {
    bool known = false;
    for (const auto& [name, entry] : entries) known = known || name == members[i].name;
    if (!known) throw Failure(Exit::kArtifact, "member '" + members[i].name + "' is not in the manifest");
  }
}

std::string Join(const std::vector<std::string>& words) {
  std::string out;
  for (const std::string& word : words) out += (out.empty() ? "" : ", ") + word;
  return out;
}

}  // namespace

std::string_view Artifact::Data(std::string_view member) const {
  for (const Member& candidate : members) {
    if (candidate.name == member) return candidate.data;
  }
  throw Failure(Exit::kArtifact, "the artifact lacks the member '" + std::string(member) + "'; build it again");
}

std::string Artifact::Version(std::string_view package) const {
  for (const auto& [candidate, version] : versions) {
    if (candidate == package) return version;
  }
  return "unknown";
}

Artifact ParseArtifact(std::string_view file) {
  Artifact artifact;
  artifact.members = ReadContainer(file);
  const Json manifest = ParseJson(artifact.members[0].data);
  if (manifest.At("format").String("format") != "graphwright-artifact") {
    throw Failure(Exit::kArtifact, "not a graphwright artifact: its manifest does not say so");
  }
  if (const int64_t version = manifest.At("version").Count("version"); version != kVersion) {
    throw Failure(Exit::kArtifact, "format version " + std::to_string(version) + "; this gw-run reads version " +
                                       std::to_string(kVersion) + ": use the gw-run of the graphwright that wrote it");
  }
  CheckMembers(artifact.members, manifest.At("members"));
  artifact.name = manifest.At("name").String("name");
  artifact.stage = manifest.At("stage").String("stage");
  artifact.created_by = manifest.At("created_by").String("created_by");
  artifact.recipe = manifest.At("recipe").String("recipe");
  for (const auto& [package, version] : manifest.At("versions").Fields("versions")) {
    artifact.versions.emplace_back(package, version.String("versions"));
  }
  artifact.inputs = ParseSpecs(manifest.At("inputs"), "inputs");
  artifact.outputs = ParseSpecs(manifest.At("outputs"), "outputs");
  artifact.targets = ParseTargets(manifest.At("targets"));
  for (const TargetEntry& target : artifact.targets) artifact.Data(target.library);  // throws where it is missing
  return artifact;
}

std::vector<std::string> Missing(const TargetEntry& target, std::string_view arch, const std::set<std::string>& flags) {
  if (target.arch == kCuda) {
    const std::string missing = MissingGpu(target.level);
    return missing.empty() ? std::vector<std::string>{} : std::vector<std::string>{missing};
  }
  if (target.arch != arch) return {target.arch};
  std::vector<std::string> missing;
  for (const std::string& flag : target.requires_flags) {
    if (!flags.count(flag)) missing.push_back(flag);
  }
  return missing;
}

const TargetEntry& Choose(const Artifact& artifact, std::string_view arch, const std::set<std::string>& flags) {
  std::string reasons;
  for (const TargetEntry& target : artifact.targets) {
    const std::vector<std::string> missing = Missing(target, arch, flags);
    if (missing.empty()) return target;
    if (target.arch == kCuda) {
      reasons += (reasons.empty() ? "" : "; ") + target.Name() + " needs a GPU, and " + missing[0];
      continue;
    }
    reasons += (reasons.empty() ? "" : "; ") + target.Name() + " needs " + Join(target.requires_flags) + ", and this CPU ";
    reasons += target.arch == arch ? "lacks " + Join(missing) : "is " + std::string(arch);
  }
  const std::string lowest = arch == "x86" ? "x86:avx2" : "arm64:generic";
  const std::string advice = "build it for a level that it has, or for target '" + lowest + "'";
  throw Failure(Exit::kCpu, "built for another machine: " + reasons + "; " + advice);
}

}  // namespace gw
