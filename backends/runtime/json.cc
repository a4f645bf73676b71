#include "json.h"

#include <charconv>
#include <cmath>

#include "failure.h"

namespace gw {
namespace {

constexpr int kMaxDepth = 64;

[[noreturn]] void WrongKind(std::string_view where, const char* wanted) {
  throw Failure(Exit::kArtifact, "the manifest is wrong at '" + std::string(where) + "': not " + wanted);
}

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Json Document() {
    Json value = Value(0);
    SkipSpace();
    if (at_ != text_.size()) Fail("more text after the value");
    return value;
  }

 private:
  [[noreturn]] void Fail(const char* reason) const {
    throw Failure(Exit::kArtifact, "the manifest is not JSON: " + std::string(reason) + " at byte " + std::to_string(at_));
  }

  void SkipSpace() {
    while (at_ < text_.size() && std::string_view(" \t\r\n").find(text_[at_]) != std::string_view::npos) ++at_;
  }

  char Peek() {
    SkipSpace();
    if (at_ == text_.size()) Fail("it ends early");
    return text_[at_];
  }

  bool Accept(char c) {
    if (Peek() != c) return false;
    ++at_;
    return true;
  }

  void Expect(char c, const char* reason) {
    if (!Accept(c)) Fail(reason);
  }

  void Word(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) Fail("unknown word");
    at_ += word.size();
  }

  Json Value(int depth) {
    if (depth > kMaxDepth) Fail("nested too deeply");
    switch (Peek()) {
      case '{':
        return ObjectValue(depth);
      case '[':
        return ArrayValue(depth);
      case '"':
        return Json(StringValue());
      case 't':
        Word("true");
        return Json(true);
      case 'f':
        Word("false");
        return Json(false);
      case 'n':
        Word("null");
        return Json();
      default:
        return Json(Number());
    }
  }

  Json ObjectValue(int depth) {
    Json::Object fields;
    Expect('{', "expected {");
    if (Accept('}')) return Json(std::move(fields));
    do {
      if (Peek() != '"') Fail("expected a key");
      std::string key = StringValue();
      Expect(':', "expected :");
      Json value = Value(depth + 1);
      fields.emplace_back(std::move(key), std::move(value));
    } while (Accept(','));
    Expect('}', "expected , or }");
    return Json(std::move(fields));
  }

  Json ArrayValue(int depth) {
    Json::Array items;
    Expect('[', "expected [");
    if (Accept(']')) return Json(std::move(items));
    do {
      items.push_back(Value(depth + 1));
    } while (Accept(','));
    Expect(']', "expected , or ]");
    return Json(std::move(items));
  }

  double Number() {
    const size_t start = at_;
    while (at_ < text_.size() && std::string_view("+-0123456789.eE").find(text_[at_]) != std::string_view::npos) ++at_;
    double value = 0;
    const auto [end, error] = std::from_chars(text_.data() + start, text_.data() + at_, value);
    if (error != std::errc() || end != text_.data() + at_ || start == at_) {
      at_ = start;
      Fail("not a value");
    }
    return value;
  }

  uint32_t Hex4() {
    uint32_t code = 0;
    const char* start = text_.data() + at_;
    if (at_ + 4 > text_.size() || std::from_chars(start, start + 4, code, 16).ptr != start + 4) Fail("bad \\u escape");
    at_ += 4;
    return code;
  }

  void AppendUtf8(uint32_t code, std::string* out) {
    if (code < 0x80) {
      out->push_back(static_cast<char>(code));
    } else if (code < 0x800) {
      out->push_back(static_cast<char>(0xc0 | code >> 6));
      out->push_back(static_cast<char>(0x80 | (code & 0x3f)));
    } else if (code < 0x10000) {
      out->push_back(static_cast<char>(0xe0 | code >> 12));
      out->push_back(static_cast<char>(0x80 | (code >> 6 & 0x3f)));
      out->push_back(static_cast<char>(0x80 | (code & 0x3f)));
    } else {
      out->push_back(static_cast<char>(0xf0 | code >> 18));
      out->push_back(static_cast<char>(0x80 | (code >> 12 & 0x3f)));
      out->push_back(static_cast<char>(0x80 | (code >> 6 & 0x3f)));
      out->push_back(static_cast<char>(0x80 | (code & 0x3f)));
    }
  }

  void Escape(std::string* out) {
    if (at_ == text_.size()) Fail("it ends early");
    const char c = text_[at_++];
    static constexpr std::string_view kFrom = "\"\\/bfnrt", kTo = "\"\\/\b\f\n\r\t";
    if (const size_t index = kFrom.find(c); index != std::string_view::npos) {
      out->push_back(kTo[index]);
      return;
    }
    if (c != 'u') Fail("unknown escape");
    uint32_t code = Hex4();
    if (code >= 0xd800 && code < 0xe000) {
      if (code >= 0xdc00 || text_.substr(at_, 2) != "\\u") Fail("half of a surrogate pair");
      at_ += 2;
      const uint32_t low = Hex4();
      if (low < 0xdc00 || low >= 0xe000) Fail("half of a surrogate pair");
      code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
    }
    AppendUtf8(code, out);
  }

  std::string StringValue() {
    ++at_;  // the opening quote
    std::string out;
    while (true) {
      if (at_ == text_.size()) Fail("it ends inside a string");
      const char c = text_[at_++];
      if (c == '"') return out;
      if (static_cast<unsigned char>(c) < 0x20) Fail("a control character in a string");
      if (c == '\\') {
        Escape(&out);
      } else {
        out.push_back(c);
      }
    }
  }

  std::string_view text_;
  size_t at_ = 0;
};

}  // namespace

const std::string& Json::String(std::string_view where) const {
  if (const auto* value = std::get_if<std::string>(&value_)) return *value;
  WrongKind(where, "a text");
}

int64_t Json::Count(std::string_view where) const {
  const auto* value = std::get_if<double>(&value_);
  if (!value || !(*value >= 0 && *value <= 9007199254740992.0) || *value != std::floor(*value)) WrongKind(where, "a whole number");
  return static_cast<int64_t>(*value);
}

const Json::Array& Json::Items(std::string_view where) const {
  if (const auto* value = std::get_if<Array>(&value_)) return *value;
  WrongKind(where, "a list");
}

const Json::Object& Json::Fields(std::string_view where) const {
  if (const auto* value = std::get_if<Object>(&value_)) return *value;
  WrongKind(where, "an object");
}

const Json& Json::At(std::string_view key) const {
  for (const auto& [name, value] : Fields(key)) {
    if (name == key) return value;
  }
  WrongKind(key, "there");
}

Json ParseJson(std::string_view text) { return Parser(text).Document(); }

}  // namespace gw
