// The zip file under a `model.gw`; the twin of backends/container.py, which states the format.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace gw {

struct Member {
  std::string name;
  std::string_view data;  // into the file's bytes
  size_t start = 0;       // offset of `data` in the file
};

// The members in file order, once the structure is checked and the seal holds. Throws Failure(kArtifact).
std::vector<Member> ReadContainer(std::string_view file);


}  // namespace gw
