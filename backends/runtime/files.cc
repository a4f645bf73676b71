#include "files.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace gw {
namespace {

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() { Close(); }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }
  int Close() {
    const int result = fd_ >= 0 ? close(fd_) : 0;
    fd_ = -1;
    return result;
  }

 private:
  int fd_;
};

bool WriteAll(int fd, std::string_view content) {
  while (!content.empty()) {
    const ssize_t count = write(fd, content.data(), content.size());
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return false;
    content.remove_prefix(static_cast<size_t>(count));
  }
  return true;
}

bool IsFolder(const std::string& path) {
  struct stat info{};
  return stat(path.c_str(), &info) == 0 && S_ISDIR(info.st_mode);
}

}  // namespace

std::string ReadFile(const std::string& path, Exit code) {
  const auto fail = [&] { throw Failure(code, "cannot read '" + path + "': " + std::strerror(errno)); };
  Descriptor file(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  struct stat info{};
  if (file.get() < 0 || fstat(file.get(), &info) != 0) fail();
  if (!S_ISREG(info.st_mode)) throw Failure(code, "cannot read '" + path + "': not a file");
  std::string content(static_cast<size_t>(info.st_size), '\0');
  size_t done = 0;
  while (done < content.size()) {
    const ssize_t count = read(file.get(), content.data() + done, content.size() - done);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) fail();
    if (count == 0) break;  // the file shrank: what is left is checked like any truncated file
    done += static_cast<size_t>(count);
  }
  content.resize(done);
  return content;
}

void CheckOutput(const std::string& path) {
  const size_t slash = path.rfind('/');
  const std::string folder = slash == std::string::npos ? "." : path.substr(0, slash + 1);
  if (IsFolder(path)) throw Failure(Exit::kOutput, "cannot write '" + path + "': it is a folder; name a file inside it");
  if (!IsFolder(folder)) {
    throw Failure(Exit::kOutput, "cannot write '" + path + "': the folder '" + folder + "' does not exist; create it first");
  }
  if (access(folder.c_str(), W_OK) != 0) {
    throw Failure(Exit::kOutput, "cannot write '" + path + "': no write permission in '" + folder + "'");
  }
}

void WriteFile(const std::string& path, std::string_view content) {
  const std::string temporary = path + ".part" + std::to_string(getpid());
  Descriptor file(open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666));
  const bool opened = file.get() >= 0;
  if (opened && WriteAll(file.get(), content) && file.Close() == 0 && rename(temporary.c_str(), path.c_str()) == 0) return;
  const std::string reason = std::strerror(errno);
  if (opened) unlink(temporary.c_str());
  throw Failure(Exit::kOutput, "cannot write '" + path + "': " + reason);
}

}  // namespace gw
