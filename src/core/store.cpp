// SPDX-License-Identifier: Apache-2.0
#include "core/store.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <unordered_set>

#include "voxgemm/error.h"

namespace voxgemm {
namespace {

// Nobody measures that much: such a file is not ours.
constexpr int64_t most_bytes = int64_t{256} << 20;

struct File {
  int number = -1;
  explicit File(int opened) : number(opened) {}
  ~File() {
    if (number >= 0) close(number);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
};

// A reader of one flat JSON object.
class Reader {
 public:
  explicit Reader(std::string_view text) : rest_(text) {}

  bool take(char wanted) {
    blanks();
    if (!rest_.starts_with(wanted)) return false;
    rest_.remove_prefix(1);
    return true;
  }

  std::optional<std::string> string() {
    if (!take('"')) return std::nullopt;
    std::string text;
    while (!rest_.empty()) {
      char c = rest_.front();
      rest_.remove_prefix(1);
      if (c == '"') return text;
      if (c == '\\') {
        if (rest_.empty() || (rest_.front() != '"' && rest_.front() != '\\')) return std::nullopt;
        c = rest_.front();
        rest_.remove_prefix(1);
      }
      if (static_cast<unsigned char>(c) < 0x20) return std::nullopt;
      text.push_back(c);
    }
    return std::nullopt;
  }

  std::optional<double> number() {
    blanks();
    double value = 0;
    const auto [end, error] = std::from_chars(rest_.data(), rest_.data() + rest_.size(), value);
    if (error != std::errc{}) return std::nullopt;
    rest_.remove_prefix(end - rest_.data());
    return value;
  }

  bool at_string() {
    blanks();
    return rest_.starts_with('"');
  }
  bool ended() {
    blanks();
    return rest_.empty();
  }

 private:
  void blanks() {
    const size_t first = rest_.find_first_not_of(" \t\r");
    rest_.remove_prefix(std::min(first, rest_.size()));
  }
  std::string_view rest_;
};

bool write_once(int file, std::string_view text) {
  ssize_t written = 0;
  do {
    written = write(file, text.data(), text.size());
  } while (written < 0 && errno == EINTR);
  return written == static_cast<ssize_t>(text.size());
}

// Whether a file's last line has no end: a process was killed inside its write, or a disk was full.
bool is_torn(int file) {
  struct stat facts = {};
  char last = '\n';
  if (fstat(file, &facts) != 0 || facts.st_size == 0) return false;
  return pread(file, &last, 1, facts.st_size - 1) == 1 && last != '\n';
}

std::string text_of(const std::string& path) {
  // A pipe of that name must not stop the caller.
  const File file(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  struct stat facts = {};
  if (file.number < 0 || fstat(file.number, &facts) != 0) return {};
  if (!S_ISREG(facts.st_mode) || facts.st_size > most_bytes) return {};
  std::string text(static_cast<size_t>(facts.st_size), '\0');
  size_t have = 0;
  while (have < text.size()) {
    const ssize_t got = read(file.number, text.data() + have, text.size() - have);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) break;
    have += static_cast<size_t>(got);
  }
  text.resize(have);
  return text;
}

}  // namespace

std::string json_string(std::string_view text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') result.push_back('\\');
    result.push_back(static_cast<unsigned char>(c) < 0x20 ? ' ' : c);
  }
  return result + "\"";
}

std::optional<Record> read_record(std::string_view line) {
  Reader reader(line);
  Record record;
  double revision = 0;
  double seconds = 0;
  if (!reader.take('{')) return std::nullopt;
  do {
    const std::optional<std::string> key = reader.string();
    if (!key || !reader.take(':')) return std::nullopt;
    if (reader.at_string()) {
      const std::optional<std::string> value = reader.string();
      if (!value) return std::nullopt;
      if (*key == "device") record.device = *value;
      if (*key == "problem") record.problem = *value;
      if (*key == "kernel") record.kernel = *value;
    } else {
      const std::optional<double> value = reader.number();
      if (!value) return std::nullopt;
      if (*key == "revision") revision = *value;
      if (*key == "seconds") seconds = *value;
    }
  } while (reader.take(','));
  if (!reader.take('}') || !reader.ended()) return std::nullopt;
  const bool named = !record.device.empty() && !record.problem.empty() && !record.kernel.empty();
  const bool whole = revision >= 1 && revision < 1e9 && revision == std::floor(revision);
  if (!named || !whole || !std::isfinite(seconds) || seconds <= 0) return std::nullopt;
  record.revision = static_cast<int>(revision);
  record.seconds = seconds;
  return record;
}

std::string line_of(const Record& record) {
  char seconds[32];
  const auto end = std::to_chars(seconds, seconds + sizeof seconds, record.seconds,
                                 std::chars_format::scientific, 4);
  return join("{\"device\":", json_string(record.device),
              ",\"problem\":", json_string(record.problem),
              ",\"kernel\":", json_string(record.kernel), ",\"revision\":", record.revision,
              ",\"seconds\":", std::string_view(seconds, end.ptr - seconds), "}\n");
}

std::vector<Record> read_records(const std::string& path, int64_t* skipped) {
  const std::string text = text_of(path);
  std::vector<Record> records;
  int64_t others = 0;
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find('\n', at), text.size());
    const std::string_view line = std::string_view(text).substr(at, end - at);
    if (std::optional<Record> record = read_record(line)) {
      records.push_back(std::move(*record));
    } else if (!line.empty()) {
      ++others;
    }
    at = end + 1;
  }
  if (skipped != nullptr) *skipped = others;
  return records;
}

std::string append_records(const std::string& path, const std::vector<Record>& records) {
  if (records.empty()) return {};
  std::error_code ignored;
  std::filesystem::create_directories(std::filesystem::path(path).parent_path(), ignored);
  const File file(open(path.c_str(), O_RDWR | O_APPEND | O_CREAT | O_CLOEXEC | O_NONBLOCK, 0666));
  if (file.number < 0) return join(path, ": ", std::strerror(errno));
  bool torn = is_torn(file.number);
  for (const Record& record : records) {
    const std::string line = line_of(record);
    if (!write_once(file.number, torn ? "\n" + line : line)) {
      return join(path, ": ", errno == 0 ? "no room" : std::strerror(errno));
    }
    torn = false;
  }
  return {};
}

std::string store_path(const std::string& folder, std::string_view device) {
  std::string name;
  for (const char c : device) {
    const auto letter = static_cast<unsigned char>(c);
    if (std::isalnum(letter)) {
      name.push_back(static_cast<char>(std::tolower(letter)));
    } else if (!name.empty() && name.back() != '-') {
      name.push_back('-');
    }
  }
  while (!name.empty() && name.back() == '-') name.pop_back();
  return join(folder, "/", name.empty() ? "device" : name, ".jsonl");
}

Store::Store(std::string device, std::string folder, std::vector<std::string> priors)
    : device_(std::move(device)), folder_(std::move(folder)), priors_(std::move(priors)) {}

void Store::insert(const Record& record) const {
  if (record.device != device_) return;
  std::shared_ptr<std::vector<Known>>& list = by_problem_[record.problem];
  if (!list) list = std::make_shared<std::vector<Known>>();
  const auto at = std::find_if(list->begin(), list->end(),
                               [&](const Known& known) { return known.kernel == record.kernel; });
  const Known known = {record.kernel, record.revision, record.seconds};
  if (at == list->end()) {
    list->push_back(known);
  } else {
    *at = known;
  }
  ++changes_;
}

void Store::read() const {
  std::call_once(once_, [this] {
    const std::scoped_lock lock(mutex_);
    std::vector<std::string> paths;
    for (const std::string& prior : priors_) {
      std::error_code ignored;
      const bool is_folder = std::filesystem::is_directory(prior, ignored);
      paths.push_back(is_folder ? store_path(prior, device_) : prior);
    }
    if (!folder_.empty()) paths.push_back(store_path(folder_, device_));
    for (const std::string& path : paths) {
      for (const Record& record : read_records(path)) insert(record);
    }
  });
}

Store::List Store::known(std::string_view problem) const {
  if (empty()) return nullptr;
  const std::scoped_lock lock(mutex_);
  const auto found = by_problem_.find(problem);
  return found == by_problem_.end() ? nullptr : found->second;
}

bool Store::empty() const {
  read();
  return changes_ == 0;
}

void Store::remember(const std::vector<Record>& records) {
  read();
  const std::scoped_lock lock(mutex_);
  // Readers keep the lists they have: one that changes is copied first, whoever still has it, since
  // a count of owners does not say that another thread's reading has ended.
  std::unordered_set<std::string_view> copied;
  for (const Record& record : records) {
    const auto found = by_problem_.find(record.problem);
    if (copied.insert(record.problem).second && found != by_problem_.end()) {
      found->second = std::make_shared<std::vector<Known>>(*found->second);
    }
    insert(record);
  }
}

std::string Store::add(std::vector<Record> records) {
  for (Record& record : records) record.device = device_;
  remember(records);
  if (folder_.empty()) return "there is no folder for what is measured";
  return append_records(store_path(folder_, device_), records);
}

}  // namespace voxgemm
