// A reader for JSON (RFC 8259) of bounded depth; enough for a manifest, and safe on malformed text.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace gw {

// A JSON value. The accessors throw Failure(kArtifact) naming `where` if the value is of another kind.
class Json {
 public:
  using Array = std::vector<Json>;
  using Object = std::vector<std::pair<std::string, Json>>;

  Json() = default;
  template <typename T>
  explicit Json(T value) : value_(std::move(value)) {}

  bool is_null() const { return std::holds_alternative<std::monostate>(value_); }
  const std::string& String(std::string_view where) const;
  // A whole number of at least 0 that a double holds exactly.
  int64_t Count(std::string_view where) const;
  const Array& Items(std::string_view where) const;
  const Object& Fields(std::string_view where) const;
  // The field `key` of an object.
  const Json& At(std::string_view key) const;

 private:
  std::variant<std::monostate, bool, double, std::string, Array, Object> value_;
};

// Throws Failure(kArtifact) with the position of the first error.
Json ParseJson(std::string_view text);

}  // namespace gw
