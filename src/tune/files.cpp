// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <filesystem>
#include <map>
#include <set>
#include <tuple>

#include "conv/known.h"
#include "conv/validate.h"
#include "core/environment.h"
#include "voxgemm/error.h"
#include "voxgemm/tune.h"

namespace voxgemm {
namespace {

namespace fs = std::filesystem;

std::string folder_or_default(const std::string& folder) {
  if (!folder.empty()) return folder;
  check(!environment().cache_folder.empty(), ErrorCode::unsupported,
        "there is no folder for measured times: set VOXGEMM_CACHE_DIR");
  return environment().cache_folder;
}

std::vector<std::string> files_of(const std::string& folder) {
  std::vector<std::string> paths;
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(folder_or_default(folder), ignored)) {
    if (entry.path().extension() == ".jsonl" && entry.is_regular_file(ignored)) {
      paths.push_back(entry.path().string());
    }
  }
  std::sort(paths.begin(), paths.end());
  return paths;
}

// The last record of each device, problem, kernel and revision.
using Key = std::tuple<std::string, std::string, std::string, int>;
using Last = std::map<Key, Record>;
void keep_last(const std::vector<Record>& records, Last* last) {
  for (const Record& record : records) {
    last->insert_or_assign({record.device, record.problem, record.kernel, record.revision}, record);
  }
}

// Those of a text; throws if a line is none.
std::vector<Record> records_of(std::string_view text) {
  std::vector<Record> records;
  int64_t number = 1;
  for (size_t at = 0; at < text.size(); ++number) {
    const size_t end = std::min(text.find('\n', at), text.size());
    const std::string_view line = text.substr(at, end - at);
    if (!line.empty()) {
      const std::optional<Record> record = read_record(line);
      check(record.has_value(), "line ", number, " is no record of a measured time: \"",
            line.substr(0, 80), "\"");
      records.push_back(*record);
    }
    at = end + 1;
  }
  return records;
}

}  // namespace

std::string times_folder() { return environment().cache_folder; }

std::vector<TimesFile> times_files(const std::string& folder) {
  std::vector<TimesFile> files;
  for (const std::string& path : files_of(folder)) {
    TimesFile& file = files.emplace_back();
    file.path = path;
    const std::vector<Record> records = read_records(path, &file.foreign);
    Last last;
    keep_last(records, &last);
    std::set<std::string> devices;
    std::set<std::string> problems;
    for (const auto& [key, record] : last) {
      devices.insert(record.device);
      problems.insert(join(record.device, "\n", record.problem));
    }
    if (devices.size() == 1) file.device = *devices.begin();
    file.records = static_cast<int64_t>(last.size());
    file.problems = static_cast<int64_t>(problems.size());
    file.superseded = static_cast<int64_t>(records.size() - last.size());
  }
  return files;
}

std::string export_times(const std::string& device, const std::string& folder) {
  Last last;
  for (const std::string& path : files_of(folder)) keep_last(read_records(path), &last);
  std::string text;
  for (const auto& [key, record] : last) {
    if (device.empty() || record.device == device) text += line_of(record);
  }
  return text;
}

int64_t import_times(std::string_view text, const std::string& folder) {
  const std::string place = folder_or_default(folder);
  std::map<std::string, std::vector<Record>> by_device;
  int64_t count = 0;
  for (Record& record : records_of(text)) {
    by_device[record.device].push_back(std::move(record));
    ++count;
  }
  for (const auto& [device, records] : by_device) {
    const std::string reason = append_records(store_path(place, device), records);
    check(reason.empty(), ErrorCode::unsupported, "the times cannot be written: ", reason);
  }
  return count;
}

int64_t clear_times(const std::string& folder) {
  int64_t count = 0;
  for (const std::string& path : files_of(folder)) {
    std::error_code error;
    fs::remove(path, error);
    check(!error, ErrorCode::unsupported, path, " cannot be removed: ", error.message());
    ++count;
  }
  return count;
}

void learn_times(const Device& device, std::string_view records) {
  validate_enumerator(device.kind, DeviceKind::cuda, "the kind of device");
  store_of(device).remember(records_of(records));
}

}  // namespace voxgemm
