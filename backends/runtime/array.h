// A dense array in memory that generated code may read, its element types, and NumPy's .npy files.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace gw {

struct DType {
  const char* name;  // in the manifest
  const char* npy;   // in a .npy header
  uint8_t code;      // DLDataTypeCode
  uint8_t bits;
};

// Null where there is no such type.
const DType* FindDType(std::string_view name);
const DType* FindDType(uint8_t code, uint8_t bits);
const DType* FindNpyDType(std::string_view descr);

// "float32[1x3x224x224]"
std::string Describe(std::string_view dtype, const std::vector<int64_t>& shape);

class Array {
 public:
  // Uninitialized. Throws Failure(kInput) where the size overflows.
  Array(const DType* dtype, std::vector<int64_t> shape);

  const DType* dtype() const { return dtype_; }
  const std::vector<int64_t>& shape() const { return shape_; }
  size_t bytes() const { return bytes_; }
  void* data() const { return data_.get(); }

  // A copy of element `index` along the first dimension, and its inverse. The array has at least one dimension.
  Array Row(int64_t index) const;
  void SetRow(int64_t index, const Array& row);

 private:
  struct Free {
    void operator()(void* memory) const;
  };
  const DType* dtype_;
  std::vector<int64_t> shape_;
  size_t bytes_;
  std::unique_ptr<void, Free> data_;
};

// Parses a .npy file of format 1.0 or 2.0, C order, little-endian. `path` names it in errors. Throws Failure(kInput).
Array ParseNpy(std::string_view file, const std::string& path);

// A .npy file of format 1.0.
std::string FormatNpy(const Array& array);

}  // namespace gw
