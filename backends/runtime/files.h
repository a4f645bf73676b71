// Whole files in and out.
#pragma once

#include <string>
#include <string_view>

#include "failure.h"

namespace gw {

// Throws Failure(code).
std::string ReadFile(const std::string& path, Exit code);

// Writes under a temporary name and renames, so that no part of a file is ever seen. Throws Failure(kOutput).
void WriteFile(const std::string& path, std::string_view content);

// Throws Failure(kOutput) where `path` is a folder or its folder does not exist or cannot be written.
void CheckOutput(const std::string& path);

}  // namespace gw
