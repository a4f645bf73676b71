#include "container.h"

#include <cstdint>

#include "failure.h"
#include "sha256.h"

namespace gw {
namespace {

constexpr std::string_view kManifest = "manifest.json";
constexpr std::string_view kSealPrefix = "graphwright seal sha256:";
constexpr size_t kSealSize = kSealPrefix.size() + 64;
constexpr size_t kLocalSize = 30, kCentralSize = 46, kEndSize = 22;
constexpr size_t kMemberLimit = 1000;

[[noreturn]] void Damaged(const std::string& reason) {
  throw Failure(Exit::kArtifact, "not a whole graphwright artifact: " + reason + "; copy or build the artifact again");
}

void Check(bool condition, const std::string& reason) {
  if (!condition) Damaged(reason);
}

// A little-endian field; the caller has checked that it lies inside the file.
uint64_t Field(std::string_view file, size_t at, int bytes) {
  uint64_t value = 0;
  for (int i = bytes - 1; i >= 0; --i) value = value << 8 | static_cast<uint8_t>(file[at + i]);
  return value;
}

bool NameAllowed(std::string_view name) {
  bool first = true;  // of a path component: letters and digits only, so that no component is ".." or hidden
  for (char c : name) {
    const bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
    if (!letter && (first || (c != '.' && c != '_' && c != '-' && c != '/'))) return false;
    first = c == '/';
  }
  return !first;
}

// Checks the central header at `at` against its local twin. `position` is where the member must start, `limit` the directory.
Member ReadMember(std::string_view file, size_t at, size_t position, size_t limit) {
  const size_t name_size = Field(file, at + 28, 2);
  const std::string_view raw = file.substr(at + kCentralSize, name_size);
  Check(NameAllowed(raw), "a member name is not allowed");
  const std::string name(raw);
  Check(file.substr(at, 4) == "PK\1\2" && Field(file, at + 30, 4) == 0 && Field(file, at + 8, 2) == 0,
        "the header of '" + name + "' is wrong");
  const size_t size = Field(file, at + 24, 4), start = position + kLocalSize + name_size;
  Check(Field(file, at + 10, 2) == 0 && Field(file, at + 20, 4) == size, "'" + name + "' is compressed; members are stored");
  Check(Field(file, at + 42, 4) == position && start <= limit, "'" + name + "' is not where the directory says");
  // Fields both headers hold: 22 bytes from the version to the uncompressed size, then the lengths and the name.
  const bool twins = file.substr(position, 4) == "PK\3\4" && file.substr(position + 4, 22) == file.substr(at + 6, 22) &&
                     Field(file, position + 26, 2) == name_size && Field(file, position + 28, 2) == 0 &&
                     file.substr(position + kLocalSize, name_size) == raw;
  Check(twins, "the two headers of '" + name + "' differ");
  Check(size <= limit - start, "'" + name + "' reaches past the end");
  return {name, file.substr(start, size), start};
}

std::vector<Member> ReadDirectory(std::string_view file) {
  Check(file.size() >= kEndSize + kSealSize, "it is truncated, or not a .gw file");
  const size_t end = file.size() - kSealSize - kEndSize;
  Check(file.substr(end, 4) == "PK\5\6", "it is truncated, or not a .gw file");
  Check(Field(file, end + 20, 2) == kSealSize && file.substr(end + kEndSize, kSealPrefix.size()) == kSealPrefix,
        "it carries no seal");
  const size_t count = Field(file, end + 10, 2), start = Field(file, end + 16, 4);
  Check(Field(file, end + 4, 4) == 0 && Field(file, end + 8, 2) == count && count <= kMemberLimit &&
            start + Field(file, end + 12, 4) == end,
        "its end record is wrong");
  std::vector<Member> members;
  size_t at = start, position = 0;
  for (size_t i = 0; i < count; ++i) {
    Check(at + kCentralSize <= end && at + kCentralSize + Field(file, at + 28, 2) <= end, "its directory ends early");
    members.push_back(ReadMember(file, at, position, start));
    at += kCentralSize + members.back().name.size();
    position = members.back().start + members.back().data.size();
    for (size_t other = 0; other < i; ++other) Check(members[other].name != members[i].name, "two members have one name");
  }
  Check(at == end && position == start, "its directory does not match its members");
  Check(!members.empty() && members[0].name == kManifest, "it does not start with manifest.json");
  return members;
}

}  // namespace

std::vector<Member> ReadContainer(std::string_view file) {
  std::vector<Member> members = ReadDirectory(file);
  Sha256 digest;
  size_t position = 0;
  for (const Member& member : members) {
    if (member.name == kManifest) continue;
    digest.Update(file.substr(position, member.start - position));
    position = member.start + member.data.size();
  }
  digest.Update(file.substr(position, file.size() - kSealSize - position));
  Check(digest.Finish() == file.substr(file.size() - 64), "its manifest or structure does not match its seal");
  return members;
}

}  // namespace gw
