#include "array.h"

#include <charconv>
#include <cstdlib>
#include <cstring>

#include "failure.h"

namespace gw {
namespace {

// DLDataTypeCode of dlpack.h, named here so that this file needs no TVM header.
constexpr uint8_t kInt = 0, kUInt = 1, kFloat = 2, kBool = 6;
constexpr DType kTypes[] = {
    {"float16", "<f2", kFloat, 16}, {"float32", "<f4", kFloat, 32}, {"float64", "<f8", kFloat, 64},
    {"int8", "|i1", kInt, 8},       {"int16", "<i2", kInt, 16},     {"int32", "<i4", kInt, 32},
    {"int64", "<i8", kInt, 64},     {"uint8", "|u1", kUInt, 8},     {"bool", "|b1", kBool, 8},
};
// TVM's kAllocAlignment; generated code loads whole vectors from aligned addresses.
constexpr size_t kAlignment = 64;
constexpr int64_t kMaxBytes = int64_t{1} << 40;
constexpr size_t kMaxRank = 16;

// Reads the Python dict of a .npy header: {'descr': '<f4', 'fortran_order': False, 'shape': (1, 3), }
class Header {
 public:
  Header(std::string_view text, const std::string& path) : text_(text), path_(path) {}

  void Parse() {
    Expect('{');
    while (!Accept('}')) {
      const std::string key = Quoted();
      Expect(':');
      if (key == "descr" && !has_descr_) {
        descr = Quoted();
        has_descr_ = true;
      } else if (key == "fortran_order" && !has_order_) {
        fortran = Boolean();
        has_order_ = true;
      } else if (key == "shape" && !has_shape_) {
        Tuple();
        has_shape_ = true;
      } else {
        Fail();
      }
      if (!Accept(',') && Peek() != '}') Fail();
    }
    if (!has_descr_ || !has_order_ || !has_shape_ || Peek() != '\0') Fail();
  }

  std::string descr;
  bool fortran = false;
  std::vector<int64_t> shape;

 private:
  [[noreturn]] void Fail() const {
    throw Failure(Exit::kInput, "'" + path_ + "' has a malformed .npy header; write it with numpy.save");
  }
  char Peek() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n')) ++at_;
    return at_ < text_.size() ? text_[at_] : '\0';
  }
  bool Accept(char c) {
    if (Peek() != c) return false;
    ++at_;
    return true;
  }
  void Expect(char c) {
    if (!Accept(c)) Fail();
  }
  std::string Quoted() {
    const char quote = Peek();
    if (quote != '\'' && quote != '"') Fail();  // a structured dtype is a list
    const size_t end = text_.find(quote, ++at_);
    if (end == std::string_view::npos) Fail();
    const std::string out(text_.substr(at_, end - at_));
    at_ = end + 1;
    return out;
  }
  bool Boolean() {
    Peek();
    for (const std::string_view word : {"False", "True"}) {
      if (text_.substr(at_, word.size()) == word) {
        at_ += word.size();
        return word == "True";
      }
    }
    Fail();
  }
  void Tuple() {
    Expect('(');
    while (!Accept(')')) {
      Peek();
      int64_t value = 0;
      const char* start = text_.data() + at_;
      const auto [end, error] = std::from_chars(start, text_.data() + text_.size(), value);
      if (error != std::errc() || value < 0 || shape.size() == kMaxRank) Fail();
      at_ += end - start;
      shape.push_back(value);
      if (!Accept(',') && Peek() != ')') Fail();
    }
  }

  std::string_view text_;
  const std::string& path_;
  size_t at_ = 0;
  bool has_descr_ = false, has_order_ = false, has_shape_ = false;
};

}  // namespace

const DType* FindDType(std::string_view name) {
  for (const DType& type : kTypes) {
    if (name == type.name) return &type;
  }
  return nullptr;
}

const DType* FindDType(uint8_t code, uint8_t bits) {
  for (const DType& type : kTypes) {
    if (code == type.code && bits == type.bits) return &type;
  }
  return nullptr;
}

const DType* FindNpyDType(std::string_view descr) {
  for (const DType& type : kTypes) {
    // One-byte types have no byte order: both '|' and '<' occur.
    if (descr == type.npy || (type.bits == 8 && descr.size() == 3 && descr[0] == '<' && descr.substr(1) == type.npy + 1)) {
      return &type;
    }
  }
  return nullptr;
}

std::string Describe(std::string_view dtype, const std::vector<int64_t>& shape) {
  std::string out(dtype);
  out += '[';
  for (size_t i = 0; i < shape.size(); ++i) {
    if (i > 0) out += 'x';
    out += shape[i] < 0 ? "?" : std::to_string(shape[i]);
  }
  return out + ']';
}

void Array::Free::operator()(void* memory) const { std::free(memory); }

Array::Array(const DType* dtype, std::vector<int64_t> shape) : dtype_(dtype), shape_(std::move(shape)) {
  int64_t bytes = dtype->bits / 8;
  for (int64_t dimension : shape_) {
    if (__builtin_mul_overflow(bytes, dimension, &bytes) || bytes > kMaxBytes) {
      throw Failure(Exit::kInput, "an array of " + Describe(dtype->name, shape_) + " is too large");
    }
  }
  bytes_ = static_cast<size_t>(bytes);
  const size_t rounded = (bytes_ / kAlignment + 1) * kAlignment;
  data_.reset(std::aligned_alloc(kAlignment, rounded));
  if (!data_) throw Failure(Exit::kInput, "out of memory for an array of " + Describe(dtype->name, shape_));
}

Array Array::Row(int64_t index) const {
  Array row(dtype_, {shape_.begin() + 1, shape_.end()});
  std::memcpy(row.data(), static_cast<const char*>(data()) + static_cast<size_t>(index) * row.bytes(), row.bytes());
  return row;
}

void Array::SetRow(int64_t index, const Array& row) {
  std::memcpy(static_cast<char*>(data()) + static_cast<size_t>(index) * row.bytes(), row.data(), row.bytes());
}

Array ParseNpy(std::string_view file, const std::string& path) {
  const auto fail = [&path](const std::string& what) { throw Failure(Exit::kInput, "'" + path + "' " + what); };
  if (file.size() < 10 || file.substr(0, 6) != "\x93NUMPY") fail("is not a .npy file; write it with numpy.save");
  const auto byte = [&file](size_t at) { return static_cast<size_t>(static_cast<uint8_t>(file[at])); };
  const bool wide = byte(6) == 2;
  if ((byte(6) != 1 && !wide) || byte(7) != 0) fail("has a .npy format this program does not read; it reads 1.0 and 2.0");
  const size_t start = wide ? 12 : 10;
  if (file.size() < start) fail("is truncated; write it again");
  const size_t size = byte(8) | byte(9) << 8 | (wide ? byte(10) << 16 | byte(11) << 24 : 0);
  if (size > file.size() - start) fail("is truncated; write it again");
  Header header(file.substr(start, size), path);
  header.Parse();
  const DType* dtype = FindNpyDType(header.descr);
  if (!dtype) fail("holds elements of type '" + header.descr + "', which no model takes; convert it with astype");
  if (header.fortran) fail("is in Fortran order; save numpy.ascontiguousarray(x)");
  Array array(dtype, header.shape);
  const std::string_view payload = file.substr(start + size);
  if (payload.size() != array.bytes()) {
    fail("holds " + std::to_string(payload.size()) + " bytes of data, but its header says " + std::to_string(array.bytes()) +
         "; it is truncated or damaged, write it again");
  }
  // An empty array has no bytes, and memcpy from a null view is undefined.
  if (!payload.empty()) std::memcpy(array.data(), payload.data(), payload.size());
  return array;
}

std::string FormatNpy(const Array& array) {
  std::string shape;
  for (int64_t dimension : array.shape()) shape += std::to_string(dimension) + (array.shape().size() == 1 ? "," : ", ");
  if (array.shape().size() > 1) shape.resize(shape.size() - 2);
  std::string header = "{'descr': '" + std::string(array.dtype()->npy) + "', 'fortran_order': False, 'shape': (" + shape + "), }";
  header.append((64 - (10 + header.size() + 1) % 64) % 64, ' ');
  header += '\n';
  std::string out("\x93NUMPY\x01\x00", 8);
  out.push_back(static_cast<char>(header.size() & 0xff));
  out.push_back(static_cast<char>(header.size() >> 8));
  out += header;
  out.append(static_cast<const char*>(array.data()), array.bytes());
  return out;
}

}  // namespace gw
