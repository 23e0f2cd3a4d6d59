// SPDX-License-Identifier: Apache-2.0

#include "cpu/simd/isa.h"
#include "voxgemm/error.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace voxgemm::cpu {
namespace {

#if defined(__x86_64__)

struct Cpuid {
  unsigned a = 0, b = 0, c = 0, d = 0;
  // Zeros where the CPU has no such leaf.
  explicit Cpuid(unsigned leaf, unsigned subleaf = 0) {
    if (__get_cpuid_count(leaf, subleaf, &a, &b, &c, &d) == 0) a = b = c = d = 0;
  }
};

constexpr bool has(unsigned bits, unsigned wanted) { return (bits & wanted) == wanted; }
constexpr unsigned bit(int index) { return 1U << index; }

// Register sets that the operating system saves (XCR0); 0 where it saves none beyond SSE.
unsigned saved_registers() {
  if (!has(Cpuid(1).c, bit(27))) return 0;  // OSXSAVE
  unsigned low = 0;
  unsigned high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

// Linux saves tile data only for processes that ask; without that the first tile instruction is
// SIGILL.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long request_permission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long tile_data = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

struct Features {
  bool v2, v3, v4, bf16, fast_bf16, amx, amx_fp16;

  Features() {
    const Cpuid basic(1);
    const Cpuid extended(7);
    const Cpuid more(7, 1);
    const unsigned saved = saved_registers();
    const unsigned avx = bit(1) | bit(2);
    const unsigned avx512 = avx | bit(5) | bit(6) | bit(7);
    const unsigned tiles = bit(17) | bit(18);
    // SSE3, SSSE3, CX16, SSE4.1, SSE4.2, POPCNT
    v2 = has(basic.c, bit(0) | bit(9) | bit(13) | bit(19) | bit(20) | bit(23));
    v3 = v2 && has(saved, avx) &&
         has(basic.c, bit(12) | bit(22) | bit(28) | bit(29)) &&  // FMA, MOVBE, AVX, F16C
         has(extended.b, bit(3) | bit(5) | bit(8)) &&            // BMI1, AVX2, BMI2
         has(Cpuid(0x80000001).c, bit(5));                       // LZCNT
    // F, DQ, CD, BW, VL
    v4 = v3 && has(saved, avx512) &&
         has(extended.b, bit(16) | bit(17) | bit(28) | bit(30) | bit(31));
    bf16 = v4 && has(more.a, bit(5));
    // AMX-BF16, AMX-TILE
    amx = bf16 && has(extended.d, bit(22) | bit(24)) && has(saved, tiles) && may_use_tiles();
    amx_fp16 = amx && has(more.a, bit(21));
    // Intel's CPUs before those with AMX-FP16 are faster without vdpbf16ps: it runs at a quarter of
    // the rate of f32 multiply-adds there, so at half of their FLOP/s (116 to 233 GFLOP/s on
    // Sapphire Rapids).
    constexpr unsigned intel = 0x756e6547;  // "Genu"
    fast_bf16 = bf16 && (Cpuid(0).b != intel || has(more.a, bit(21)));
  }
};

// cpuid is slow in virtual machines.
const Features& features() {
  static const Features result;
  return result;
}

#endif

}  // namespace

#if defined(__x86_64__)
bool supports_v2() { return features().v2; }
bool supports_v3() { return features().v3; }
bool supports_v4() { return features().v4; }
bool supports_v4bf16() { return features().fast_bf16; }
bool supports_amx() { return features().amx; }
bool supports_amx_fp16() { return features().amx_fp16; }
#endif

bool supports_portable() { return true; }

std::span<const Engine* const> engines() {
  static constexpr const Engine* list[] = {
#if defined(__x86_64__)
    &amx::bf16,
    &amx::f16,
    &v4bf16::bf16,
    &v4::f32,
    &v4::bf16,
    &v4::f16,
    &v3::f32,
    &v3::bf16,
    &v3::f16,
    &v2::f32,
    &v2::bf16,
    &v2::f16,
#endif
    &portable::f32,
    &portable::bf16,
    &portable::f16,
  };
  return list;
}

std::span<const RowEngine* const> row_engines() {
  static constexpr const RowEngine* list[] = {
#if defined(__x86_64__)
    &v4::rows_f64,
    &v4::rows_f32,
    &v4::rows_bf16,
    &v4::rows_f16,
    &v3::rows_f64,
    &v3::rows_f32,
    &v3::rows_bf16,
    &v3::rows_f16,
#endif
    &portable::rows_f64,
    &portable::rows_f32,
    &portable::rows_bf16,
    &portable::rows_f16,
  };
  return list;
}

const RowEngine& row_engine(Dtype dtype) {
  const RowEngine* found = nullptr;
  for (const RowEngine* engine : row_engines()) {
    if (found == nullptr && engine->dtype == dtype && engine->supported()) found = engine;
  }
  check(found != nullptr, "dtype is ", name(dtype), ", expected f16, bf16, f32 or f64");
  return *found;
}

}  // namespace voxgemm::cpu
