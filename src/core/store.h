// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace voxgemm {

// One thing that was measured, one line of a store:
//   {"device":"NVIDIA H200","problem":"forward f16 subm3 64->64 2^17->2^17","kernel":"...",
//    "revision":1,"seconds":2.75e-05}
struct Record {
  std::string device;   // its model
  std::string problem;  // of a size class (conv/known.h)
  std::string kernel;
  int revision = 1;
  double seconds = 0;  // or, of a calibration, measured over predicted
};

// Of a line without its end; nothing if it is not one of ours: a JSON object of strings and numbers
// with all of the above and, to leave room, any others.
std::optional<Record> read_record(std::string_view line);
std::string line_of(const Record& record);  // ends in a newline

std::string json_string(std::string_view text);  // with its quotation marks

// Every record of a file, in its order; of what cannot be read none. `skipped` counts other lines.
std::vector<Record> read_records(const std::string& path, int64_t* skipped = nullptr);
// Appends each record with one write, so that processes do not mix theirs and what a killed one
// leaves is at worst one torn line, which later lines do not touch. Makes missing folders. Returns
// what is in the way, empty if nothing.
std::string append_records(const std::string& path, const std::vector<Record>& records);

// <folder>/<device in small letters, digits and dashes>.jsonl
std::string store_path(const std::string& folder, std::string_view device);

// What is known of a device: the priors, which are files or folders and are only read, then the
// folder's file, then what this process adds; of two records of a problem and kernel the last
// counts. Files are read when something is first asked. Any number of threads may use it.
class Store {
 public:
  struct Known {
    std::string kernel;
    int revision;
    double seconds;
  };
  using List = std::shared_ptr<const std::vector<Known>>;

  Store(std::string device, std::string folder, std::vector<std::string> priors);

  // Null if nothing is known.
  List known(std::string_view problem) const;
  // Whether anything is known at all; cheap.
  bool empty() const;
  // Rises when something is added.
  int64_t changes() const { return changes_; }
  // Counts from now on in this process and, with the returned reason why not, in others.
  std::string add(std::vector<Record> records);
  // In this process only.
  void remember(const std::vector<Record>& records);
  const std::string& device() const { return device_; }
  const std::string& folder() const { return folder_; }

 private:
  struct Hash {
    using is_transparent = void;
    size_t operator()(std::string_view text) const { return std::hash<std::string_view>{}(text); }
  };

  void read() const;
  void insert(const Record& record) const;

  std::string device_;
  std::string folder_;
  std::vector<std::string> priors_;
  mutable std::once_flag once_;
  mutable std::mutex mutex_;
  mutable std::atomic<int64_t> changes_ = 0;
  mutable std::
      unordered_map<std::string, std::shared_ptr<std::vector<Known>>, Hash, std::equal_to<>>
          by_problem_;
};

}  // namespace voxgemm
