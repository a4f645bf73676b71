// Self-test of what gw-run does without TVM: hashing, JSON, the container and .npy files, built with sanitizers.

#include <cstdio>
#include <cstring>
#include <functional>
#include <string>

#include "array.h"
#include "artifact.h"
#include "container.h"
#include "failure.h"
#include "json.h"
#include "sha256.h"

namespace gw {
namespace {

int failures = 0;

void Expect(bool condition, const std::string& what) {
  if (condition) return;
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  ++failures;
}

bool Fails(Exit code, const std::function<void()>& action) {
  try {
    action();
    return false;
  } catch (const Failure& failure) {
    return failure.code() == code;
  }
}

void TestSha256() {
  // FIPS 180-4 examples and the million-letter vector of NIST's CAVP.
  Expect(Sha256Hex("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", "SHA-256 of nothing");
  Expect(Sha256Hex("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", "SHA-256 of abc");
  Expect(Sha256Hex("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq") ==
             "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1",
         "SHA-256 of two blocks");
  Sha256 pieces;
  for (int i = 0; i < 1000; ++i) pieces.Update(std::string(1000, 'a'));
  Expect(pieces.Finish() == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0", "SHA-256 of a million letters");
  const std::string text(300, 'x');
  for (size_t cut = 0; cut <= text.size(); ++cut) {
    Sha256 halves;
    halves.Update(std::string_view(text).substr(0, cut));
    halves.Update(std::string_view(text).substr(cut));
    Expect(halves.Finish() == Sha256Hex(text), "SHA-256 in two pieces");
  }
}

void TestJson() {
  const Json value = ParseJson(R"( {"a": [1, 2.5e1, -3, true, false, null], "b": {"c": "x\n\u00e9\ud83d\ude00\\"}, "d": []} )");
  Expect(value.At("a").Items("a").size() == 6, "JSON list");
  Expect(value.At("a").Items("a")[1].Count("a") == 25, "JSON number");
  Expect(value.At("a").Items("a")[5].is_null(), "JSON null");
  Expect(value.At("b").At("c").String("c") == "x\n\xc3\xa9\xf0\x9f\x98\x80\\", "JSON string");
  Expect(Fails(Exit::kArtifact, [&] { value.At("a").Items("a")[2].Count("a"); }), "a negative count");
  Expect(Fails(Exit::kArtifact, [&] { value.At("missing"); }), "a missing key");
  Expect(Fails(Exit::kArtifact, [&] { value.At("a").At("b"); }), "a list is not an object");
  for (const char* bad : {"", "{", "[", "\"", "[1,", "[1,]", "{\"a\"}", "{\"a\":}", "{\"a\":1,}", "{a:1}", "tru", "1 2", "+1", "01x",
                          "1e", "--1", "\"\\x\"", "\"\\u12\"", "\"\\ud800\"", "\"\\ud800\\u0041\"", "\"\n\"", "nan", "'a'", "1e999"}) {
    Expect(Fails(Exit::kArtifact, [&] { ParseJson(bad); }), std::string("malformed JSON ") + bad);
  }
  Expect(Fails(Exit::kArtifact, [] { ParseJson(std::string(100000, '[')); }), "JSON nested too deeply");
  const std::string text = R"({"a": [1, {"b": "\u00e9"}], "c": null})";
  for (size_t size = 0; size < text.size(); ++size) {
    Expect(Fails(Exit::kArtifact, [&] { ParseJson(text.substr(0, size)); }), "truncated JSON");
  }
}

std::string Little(uint64_t value, int bytes) {
  std::string out;
  for (int i = 0; i < bytes; ++i) out.push_back(static_cast<char>(value >> 8 * i));
  return out;
}

// A container as backends/container.py writes it; the CRC is not read and left 0.
std::string MakeContainer(const std::vector<std::pair<std::string, std::string>>& members) {
  std::string file, directory, covered;
  for (const auto& [name, data] : members) {
    const std::string common = Little(20, 2) + Little(0, 4) + Little(0, 4) + Little(0, 4) + Little(data.size(), 4) +
                               Little(data.size(), 4) + Little(name.size(), 2);
    const std::string local = "PK\3\4" + common + Little(0, 2) + name;
    directory += "PK\1\2" + Little(20, 2) + common + Little(0, 2) + Little(0, 4) + Little(0, 6) + Little(file.size(), 4) + name;
    file += local + data;
    covered += local + (name == "manifest.json" ? data : "");
  }
  const size_t start = file.size();
  const std::string prefix = "graphwright seal sha256:";
  const std::string end = "PK\5\6" + Little(0, 4) + Little(members.size(), 2) + Little(members.size(), 2) +
                          Little(directory.size(), 4) + Little(start, 4) + Little(prefix.size() + 64, 2);
  return file + directory + end + prefix + Sha256Hex(covered + directory + end);
}

std::string MakeArtifact(const std::string& library) {
  const std::string manifest =
      R"({"format": "graphwright-artifact", "version": 2, "name": "m", "stage": "integer", "created_by": "t", "versions": {},
          "recipe": "", "inputs": [{"name": "x", "shape": [null, 3], "dtype": "uint8"}], "outputs": [],
          "targets": [{"arch": "x86", "level": "avx2", "library": "lib/a.so", "requires": ["avx2"], "options": {}}],
          "members": {"lib/a.so": {"sha256": ")" +
      Sha256Hex(library) + R"(", "size": )" + std::to_string(library.size()) + "}}}";
  return MakeContainer({{"manifest.json", manifest}, {"lib/a.so", library}});
}

void TestArtifact() {
  const std::string file = MakeArtifact("library");
  const Artifact artifact = ParseArtifact(file);
  Expect(artifact.Data("lib/a.so") == "library", "a member's data");
  Expect(artifact.inputs[0].shape == std::vector<int64_t>({-1, 3}), "a symbolic dimension");
  Expect(Choose(artifact, "x86", {"avx2", "fma"}).level == "avx2", "the library that runs");
  Expect(Fails(Exit::kCpu, [&] { Choose(artifact, "x86", {"fma"}); }), "a CPU without AVX2");
  Expect(Fails(Exit::kCpu, [&] { Choose(artifact, "arm64", {"avx2"}); }), "another architecture");
  for (size_t size = 0; size < file.size(); ++size) {
    Expect(Fails(Exit::kArtifact, [&] { ParseArtifact(std::string_view(file).substr(0, size)); }), "truncated artifact");
  }
  for (size_t bit = 0; bit < 8 * file.size(); ++bit) {
    std::string damaged = file;
    damaged[bit / 8] = static_cast<char>(damaged[bit / 8] ^ 1 << bit % 8);
    Expect(Fails(Exit::kArtifact, [&] { ParseArtifact(damaged); }), "artifact with bit " + std::to_string(bit) + " flipped");
  }
  for (const char* name : {"../x", "/x", "a/../b", "a//b", ".x", "a/", "", "a\\b", "a b"}) {
    const std::string bad = MakeContainer({{"manifest.json", "{}"}, {name, "x"}});
    Expect(Fails(Exit::kArtifact, [&] { ReadContainer(bad); }), std::string("member name ") + name);
  }
  Expect(ReadContainer(MakeContainer({{"manifest.json", ""}, {"a-b/c_d.json", ""}})).size() == 2, "empty members");
  Expect(Fails(Exit::kArtifact, [] { ReadContainer(MakeContainer({{"a", ""}, {"manifest.json", ""}})); }), "manifest not first");
  Expect(Fails(Exit::kArtifact, [] { ReadContainer(MakeContainer({{"manifest.json", ""}, {"a", ""}, {"a", ""}})); }), "a name twice");
  Expect(Fails(Exit::kArtifact, [] { ParseArtifact(MakeContainer({{"manifest.json", "{}"}})); }), "an empty manifest");
}

void TestNpy() {
  Array array(FindDType("float32"), {2, 3});
  for (int i = 0; i < 6; ++i) static_cast<float*>(array.data())[i] = static_cast<float>(i);
  const std::string file = FormatNpy(array);
  Expect((file.size() - array.bytes()) % 64 == 0, ".npy data is aligned");
  const Array again = ParseNpy(file, "x");
  Expect(again.shape() == array.shape() && std::memcmp(again.data(), array.data(), array.bytes()) == 0, ".npy round trip");
  for (const std::vector<int64_t>& shape : {std::vector<int64_t>{}, {0}, {5}, {1, 0, 2}}) {
    const Array small(FindDType("int64"), shape);
    std::memset(small.data(), 1, small.bytes());
    Expect(ParseNpy(FormatNpy(small), "x").shape() == shape, ".npy shapes");
  }
  const Array row = array.Row(1);
  Expect(row.shape() == std::vector<int64_t>{3} && static_cast<float*>(row.data())[0] == 3, "a row of an array");
  array.SetRow(0, row);
  Expect(static_cast<float*>(array.data())[2] == 5, "setting a row");
  for (size_t size = 0; size < file.size(); ++size) {
    Expect(Fails(Exit::kInput, [&] { ParseNpy(std::string_view(file).substr(0, size), "x"); }), "truncated .npy");
  }
  const auto with = [](const std::string& header) {
    return std::string("\x93NUMPY\x01\x00", 8) + Little(header.size(), 2) + header;
  };
  const std::string ends = "'fortran_order': False, 'shape': (0,), }";
  Expect(ParseNpy(with("{'descr': '<f4', " + ends), "x").bytes() == 0, "the least header");
  for (const std::string& bad :
       {"{'descr': '>f4', " + ends, "{'descr': 'O', " + ends, "{'descr': [('a', '<f4')], " + ends, "{" + ends,
        "{'descr': '<f4', 'descr': '<f4', " + ends, std::string("{'descr': '<f4', 'fortran_order': True, 'shape': (0,), }"),
        std::string("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }"),
        std::string("{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999999999999,), }"),
        std::string("{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 4294967296, 4294967296), }"),
        std::string("{'descr': '<f4', 'fortran_order': False, 'shape': (0, }"), "{'descr': '<f4', " + ends + "x"}) {
    Expect(Fails(Exit::kInput, [&] { ParseNpy(with(bad), "x"); }), "malformed .npy " + bad);
  }
}

}  // namespace
}  // namespace gw

int main() {
  gw::TestSha256();
  gw::TestJson();
  gw::TestArtifact();
  gw::TestNpy();
  if (gw::failures == 0) std::puts("selftest: all passed");
  return gw::failures == 0 ? 0 : 1;
}
