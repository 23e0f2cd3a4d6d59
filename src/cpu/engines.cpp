// SPDX-License-Identifier: Apache-2.0

#include "cpu/simd/isa.h"

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
constexpr unsigned avx_registers = bit(1) | bit(2);
constexpr unsigned avx512_registers = avx_registers | bit(5) | bit(6) | bit(7);
constexpr unsigned tile_registers = bit(17) | bit(18);

// Linux saves tile data only for processes that ask; without that the first tile instruction is SIGILL.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long request_permission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long tile_data = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

#endif

}  // namespace

#if defined(__x86_64__)

bool supports_v2() {
  // SSE3, SSSE3, CX16, SSE4.1, SSE4.2, POPCNT
  return has(Cpuid(1).c, bit(0) | bit(9) | bit(13) | bit(19) | bit(20) | bit(23));
}

bool supports_v3() {
  return supports_v2() && has(saved_registers(), avx_registers) &&
         has(Cpuid(1).c, bit(12) | bit(22) | bit(28) | bit(29)) &&  // FMA, MOVBE, AVX, F16C
         has(Cpuid(7).b, bit(3) | bit(5) | bit(8)) &&               // BMI1, AVX2, BMI2
         has(Cpuid(0x80000001).c, bit(5));                          // LZCNT
}

bool supports_v4() {
  return supports_v3() && has(saved_registers(), avx512_registers) &&
         has(Cpuid(7).b, bit(16) | bit(17) | bit(28) | bit(30) | bit(31));  // F, DQ, CD, BW, VL
}

namespace {

bool has_bf16_dot() { return supports_v4() && has(Cpuid(7, 1).a, bit(5)); }

// Intel's CPUs before those with AMX-FP16 have the instruction but are faster without it: vdpbf16ps runs at a
// quarter of the rate of f32 multiply-adds, at half of its FLOP/s (measured on Sapphire Rapids).
bool has_fast_bf16_dot() {
  constexpr unsigned intel = 0x756e6547;  // "Genu"
  return has_bf16_dot() && (Cpuid(0).b != intel || has(Cpuid(7, 1).a, bit(21)));
}

}  // namespace

bool supports_v4bf16() { return has_fast_bf16_dot(); }

bool supports_amx() {
  return has_bf16_dot() && has(Cpuid(7).d, bit(22) | bit(24)) &&  // AMX-BF16, AMX-TILE
         has(saved_registers(), tile_registers) && may_use_tiles();
}

bool supports_amx_fp16() { return supports_amx() && has(Cpuid(7, 1).a, bit(21)); }

#endif

bool supports_portable() { return true; }

std::span<const Engine* const> engines() {
  static constexpr const Engine* list[] = {
#if defined(__x86_64__)
      &amx::bf16, &amx::f16, &v4bf16::bf16, &v4::f32, &v4::bf16, &v4::f16, &v3::f32, &v3::bf16, &v3::f16, &v2::f32, &v2::bf16, &v2::f16,
#endif
      &portable::f32, &portable::bf16, &portable::f16,
  };
  return list;
}

}  // namespace voxgemm::cpu
