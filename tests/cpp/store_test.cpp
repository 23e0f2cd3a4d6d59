// SPDX-License-Identifier: Apache-2.0
//
// Made-up records and torn files: no clock, no device.
#include "core/store.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>
#include <thread>

namespace voxgemm {
namespace {

namespace fs = std::filesystem;

class StoreTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string name = (fs::temp_directory_path() / "voxgemm-store-XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    folder = name;
    path = store_path(folder, device);
  }
  void TearDown() override {
    fs::permissions(folder, fs::perms::owner_all);
    fs::remove_all(folder);
  }

  Store store(const std::vector<std::string>& priors = {}) const {
    return {device, folder, priors};
  }
  void append(const std::string& text) const {
    std::ofstream(path, std::ios::app | std::ios::binary) << text;
  }

  std::string device = "NVIDIA H200";
  std::string folder;
  std::string path;
};

Record record(const std::string& problem, const std::string& kernel, double seconds) {
  return {"NVIDIA H200", problem, kernel, 1, seconds};
}

double seconds(const Store& store, const std::string& problem, const std::string& kernel) {
  const Store::List list = store.known(problem);
  if (!list) return 0;
  for (const Store::Known& known : *list) {
    if (known.kernel == kernel) return known.seconds;
  }
  return 0;
}

TEST(Record, IsALineThatReadsBack) {
  const Record given = {R"(a "quoted" \ name)", "forward f16 subm3 64->64 2^17->2^17", "k/f16/1x2",
                        3, 1.25e-5};
  const std::string line = line_of(given);
  EXPECT_EQ(line.back(), '\n');
  const auto read = read_record(std::string_view(line).substr(0, line.size() - 1));
  ASSERT_TRUE(read);
  EXPECT_EQ(read->device, given.device);
  EXPECT_EQ(read->problem, given.problem);
  EXPECT_EQ(read->kernel, given.kernel);
  EXPECT_EQ(read->revision, 3);
  EXPECT_EQ(read->seconds, 1.25e-5);
  EXPECT_EQ(json_string("a\tb\"\\"), R"("a b\"\\")");
}

TEST(Record, LeavesRoomForOtherKeys) {
  EXPECT_TRUE(read_record(R"( { "new" : "x" , "device":"d","problem":"p","kernel":"k",)"
                          R"("revision":1,"seconds":1e-3, "n": -2.5 } )"));
}

TEST(Record, IsRefusedUnlessWhole) {
  const std::string line = line_of(record("p", "k", 1e-3));
  // A torn line is any beginning of one.
  for (size_t end = 0; end + 1 < line.size(); ++end) {
    EXPECT_FALSE(read_record(std::string_view(line).substr(0, end))) << line.substr(0, end);
  }
  const std::string head = R"({"device":"d","problem":"p","kernel":"k",)";
  for (const char* tail :
       {R"("revision":1})", R"("seconds":1})", R"("revision":0,"seconds":1})",
        R"("revision":1.5,"seconds":1})", R"("revision":1,"seconds":0})",
        R"("revision":1,"seconds":-1})", R"("revision":1,"seconds":inf})",
        R"("revision":1,"seconds":nan})", R"("revision":1,"seconds":"1"})",
        R"("revision":1,"seconds":1}x)", R"("revision":1,"seconds":1,})",
        R"("revision":1,"seconds":1,"x":[1]})", R"("revision":1,"seconds":1,"x":{"y":1}})"}) {
    EXPECT_FALSE(read_record(head + tail)) << tail;
  }
  EXPECT_FALSE(read_record(R"({"device":"","problem":"p","kernel":"k","revision":1,"seconds":1})"));
  EXPECT_FALSE(read_record("{}"));
  EXPECT_FALSE(read_record(std::string(1000, '{')));
}

TEST_F(StoreTest, FileNamesAreOfTheDevice) {
  EXPECT_EQ(store_path("/x", "NVIDIA H200"), "/x/nvidia-h200.jsonl");
  EXPECT_EQ(store_path("/x", "AMD EPYC 9B45 (TM) 128-Core"), "/x/amd-epyc-9b45-tm-128-core.jsonl");
  EXPECT_EQ(store_path("/x", "../.."), "/x/device.jsonl");
}

TEST_F(StoreTest, MissingFoldersAreMadeWhenSomethingIsKept) {
  const std::string deep = folder + "/a/b";
  Store store(device, deep, {});
  EXPECT_TRUE(store.empty());
  EXPECT_EQ(store.known("p"), nullptr);
  EXPECT_FALSE(fs::exists(deep));
  EXPECT_EQ(store.add({record("p", "k", 1e-3)}), "");
  EXPECT_EQ(seconds(store, "p", "k"), 1e-3);
  EXPECT_EQ(seconds(Store(device, deep, {}), "p", "k"), 1e-3);
}

TEST_F(StoreTest, TheLastLineWins) {
  Store first = store();
  first.add({record("p", "k", 3e-3), record("p", "l", 5e-3), record("q", "k", 7e-3)});
  Store second = store();
  EXPECT_EQ(seconds(second, "p", "k"), 3e-3);
  second.add({record("p", "k", 2e-3)});
  EXPECT_EQ(seconds(second, "p", "k"), 2e-3);
  EXPECT_EQ(seconds(store(), "p", "k"), 2e-3);
  EXPECT_EQ(seconds(store(), "p", "l"), 5e-3);
  EXPECT_EQ(seconds(store(), "q", "k"), 7e-3);
  EXPECT_EQ(seconds(first, "p", "k"), 3e-3) << "files are read once";
  EXPECT_EQ(read_records(path).size(), 4U) << "nothing is taken away";
}

TEST_F(StoreTest, AListThatSomeoneReadsDoesNotChange) {
  Store one = store();
  one.add({record("p", "k", 3e-3)});
  const Store::List before = one.known("p");
  one.add({record("p", "k", 2e-3), record("p", "l", 1e-3)});
  ASSERT_EQ(before->size(), 1U);
  EXPECT_EQ(before->front().seconds, 3e-3);
}

TEST_F(StoreTest, WhatIsNotOursIsSkipped) {
  append("\n\n# a note\n{\"device\":\"NVIDIA H200\"}\n\x01\x02\xff\n" + std::string(100000, 'x') +
         "\n");
  append(line_of({"another device", "p", "k", 1, 1e-3}));
  append(std::string(3, '\0') + "\n");
  append(line_of(record("p", "k", 2e-3)));
  append("[1, 2]\n");
  int64_t skipped = 0;
  EXPECT_EQ(read_records(path, &skipped).size(), 2U);
  EXPECT_EQ(skipped, 6);
  EXPECT_EQ(seconds(store(), "p", "k"), 2e-3);
}

TEST_F(StoreTest, ATornEndCostsOneLine) {
  const std::string whole = line_of(record("p", "k", 1e-3));
  for (const size_t kept : {size_t{1}, whole.size() / 2, whole.size() - 1}) {
    std::ofstream(path, std::ios::trunc)
        << whole << line_of(record("q", "k", 1e-3)).substr(0, kept);
    Store one = store();
    EXPECT_EQ(one.add({record("r", "k", 3e-3), record("s", "k", 4e-3)}), "");
    EXPECT_EQ(seconds(store(), "p", "k"), 1e-3);
    EXPECT_EQ(seconds(store(), "r", "k"), 3e-3);
    EXPECT_EQ(seconds(store(), "s", "k"), 4e-3);
    // Only its end is missing: then it is whole once the next line has ended it.
    EXPECT_EQ(seconds(store(), "q", "k"), kept == whole.size() - 1 ? 1e-3 : 0);
  }
}

TEST_F(StoreTest, ForeignThingsInThePlaceOfAFile) {
  fs::create_directory(path);
  Store one = store();
  EXPECT_TRUE(one.empty());
  EXPECT_NE(one.add({record("p", "k", 1e-3)}).find(path), std::string::npos);
  EXPECT_EQ(seconds(one, "p", "k"), 1e-3) << "this process knows it all the same";
  fs::remove(path);
  ASSERT_EQ(mkfifo(path.c_str(), 0600), 0);
  EXPECT_TRUE(store().empty()) << "a pipe is not waited for";
  fs::remove(path);
  fs::create_symlink("nowhere/at/all", path);
  EXPECT_TRUE(store().empty());
}

TEST_F(StoreTest, ReadOnlyFolders) {
  if (geteuid() == 0) {
    // Root may write anywhere but here.
    Store one(device, "/proc/voxgemm", {});
    EXPECT_TRUE(one.empty());
    EXPECT_NE(one.add({record("p", "k", 1e-3)}), "");
    EXPECT_EQ(seconds(one, "p", "k"), 1e-3);
    return;
  }
  fs::permissions(folder, fs::perms::owner_read | fs::perms::owner_exec);
  Store one = store();
  EXPECT_NE(one.add({record("p", "k", 1e-3)}).find("ermission"), std::string::npos);
  EXPECT_EQ(seconds(one, "p", "k"), 1e-3);
}

TEST_F(StoreTest, AFullDiskIsSaidAndNothingElseHappens) {
  if (!fs::exists("/dev/full")) GTEST_SKIP() << "there is no /dev/full";
  EXPECT_NE(append_records("/dev/full", {record("p", "k", 1e-3)}), "");
}

TEST_F(StoreTest, WithoutAFolderTheProcessRemembers) {
  Store one(device, "", {});
  EXPECT_NE(one.add({record("p", "k", 1e-3)}), "");
  EXPECT_EQ(seconds(one, "p", "k"), 1e-3);
}

TEST_F(StoreTest, PriorsAreReadOnlyAndOwnTimesGoBefore) {
  const std::string file = folder + "/prior.jsonl";
  const std::string other = folder + "/priors";
  ASSERT_EQ(append_records(file, {record("p", "k", 1e-3), record("q", "k", 1e-3)}), "");
  ASSERT_EQ(append_records(store_path(other, device), {record("q", "k", 2e-3)}), "");
  const auto size = fs::file_size(file);
  Store own(device, folder + "/own", {"/no/such/file", file, other});
  EXPECT_EQ(seconds(own, "p", "k"), 1e-3);
  EXPECT_EQ(seconds(own, "q", "k"), 2e-3);
  own.add({record("p", "k", 5e-3)});
  EXPECT_EQ(seconds(Store(device, folder + "/own", {file}), "p", "k"), 5e-3);
  EXPECT_EQ(fs::file_size(file), size);
}

// What each of many processes writes, number by number.
std::vector<Record> burst(int process, int number) {
  std::vector<Record> records;
  records.reserve(5);
  for (int k = 0; k < 5; ++k) {
    records.push_back(record("p" + std::to_string(process), "k" + std::to_string(5 * number + k),
                             1e-6 * (1 + process + 100 * (5 * number + k))));
  }
  return records;
}

TEST_F(StoreTest, SixteenWritersAtOnce) {
  constexpr int processes = 16;
  constexpr int bursts = 40;
  std::vector<pid_t> children;
  for (int p = 0; p < processes; ++p) {
    const pid_t child = fork();
    if (child == 0) {
      for (int n = 0; n < bursts; ++n) {
        if (!append_records(path, burst(p, n)).empty()) _exit(1);
      }
      _exit(0);
    }
    children.push_back(child);
  }
  for (const pid_t child : children) {
    int status = 0;
    waitpid(child, &status, 0);
    EXPECT_EQ(status, 0);
  }
  int64_t skipped = 0;
  const std::vector<Record> all = read_records(path, &skipped);
  EXPECT_EQ(skipped, 0);
  EXPECT_EQ(all.size(), static_cast<size_t>(processes * bursts * 5));
  // Each process's lines in its order.
  std::map<std::string, int> next;
  for (const Record& found : all) {
    EXPECT_EQ(found.kernel, "k" + std::to_string(next[found.problem]++));
  }
}

TEST_F(StoreTest, KilledWritersLoseAtMostTheirLastLine) {
  constexpr int processes = 8;
  std::mt19937 random(0);
  for (int round = 0; round < 10; ++round) {
    std::vector<pid_t> children;
    for (int p = 0; p < processes; ++p) {
      const pid_t child = fork();
      if (child == 0) {
        for (int n = 0;; ++n) append_records(path, burst(p, n));
      }
      children.push_back(child);
    }
    usleep(1000 + random() % 5000);
    for (const pid_t child : children) kill(child, SIGKILL);
    for (const pid_t child : children) waitpid(child, nullptr, 0);
    ASSERT_EQ(append_records(path, {record("after", std::to_string(round), 1e-3)}), "");
  }
  int64_t skipped = 0;
  const std::vector<Record> all = read_records(path, &skipped);
  EXPECT_LE(skipped, 10 * processes);
  for (int round = 0; round < 10; ++round) {
    EXPECT_EQ(seconds(store(), "after", std::to_string(round)), 1e-3);
  }
  for (const Record& found : all) {
    EXPECT_TRUE(found.problem == "after" || found.problem.size() == 2) << line_of(found);
  }
}

TEST_F(StoreTest, ThreadsReadAndAdd) {
  Store one = store();
  std::vector<std::jthread> threads;
  threads.reserve(4);
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&one, t] {
      for (int n = 0; n < 50; ++n) {
        one.add(burst(t, n));
        for (int other = 0; other < 4; ++other) seconds(one, "p" + std::to_string(other), "k0");
      }
    });
  }
  threads.clear();
  for (int t = 0; t < 4; ++t) {
    const Store::List list = one.known("p" + std::to_string(t));
    ASSERT_NE(list, nullptr);
    EXPECT_EQ(list->size(), 250U);
  }
  EXPECT_EQ(read_records(path).size(), 1000U);
}

}  // namespace
}  // namespace voxgemm
