// SPDX-License-Identifier: Apache-2.0
#pragma once

// The widest vector of f32 that the flags allow, and what the engines do with it. GCC's vector
// extensions say most of it for every instruction set; intrinsics stand where they cannot.

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace voxgemm::cpu::VOXGEMM_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
constexpr int vector_registers = 32;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
constexpr int vector_registers = 16;
#elif defined(__aarch64__)
constexpr int vector_bytes = 16;
constexpr int vector_registers = 32;
#else
constexpr int vector_bytes = 16;
constexpr int vector_registers = 16;
#endif
constexpr int lanes = vector_bytes / 4;

using F32s [[gnu::vector_size(vector_bytes)]] = float;
using U32s [[gnu::vector_size(vector_bytes)]] = uint32_t;
using I32s [[gnu::vector_size(vector_bytes)]] = int32_t;
using U16s [[gnu::vector_size(vector_bytes / 2)]] = uint16_t;

// One element of a 16-bit matrix.
struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

// No alignment is asked for anywhere: a fixed-size memcpy is one vector move.
template <class V>
[[gnu::always_inline]] inline V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <class V>
[[gnu::always_inline]] inline void store(void* to, V v) {
  std::memcpy(to, &v, sizeof v);
}

[[gnu::always_inline]] inline F32s as_f32(U32s v) { return (F32s)v; }
[[gnu::always_inline]] inline U32s as_u32(F32s v) { return (U32s)v; }

// One 32-bit word in all lanes.
[[gnu::always_inline]] inline F32s broadcast(const void* word) {
  const float value = load<float>(word);
#if defined(__AVX512F__)
  return _mm512_set1_ps(value);
#else
  return value - F32s{};
#endif
}

[[gnu::always_inline]] inline F32s multiply_add(F32s a, F32s b, F32s sum) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, sum);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, sum);
#else
  return a * b + sum;
#endif
}

[[gnu::always_inline]] inline F32s select(I32s mask, F32s yes, F32s no) {
  return as_f32(((U32s)mask & as_u32(yes)) | (~(U32s)mask & as_u32(no)));
}

[[gnu::always_inline]] inline F32s widen(U16s v, Bf16) {
  return as_f32(__builtin_convertvector(v, U32s) << 16);
}

[[gnu::always_inline]] inline F32s widen(U16s v, F16) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(0xffff, (__m256i)v);
#elif defined(__F16C__)
  return _mm256_cvtph_ps((__m128i)v);
#else
  const U32s bits = __builtin_convertvector(v, U32s);
  const U32s magnitude = bits & 0x7fff;
  // Moving the exponent field up leaves it 112 short, and infinities and NaNs another 112.
  const U32s top = (U32s)(magnitude >= 0x7c00) & (112U << 23);
  const F32s normal = as_f32((magnitude << 13) + (112U << 23) + top);
  // Below 2^-14 the value is the integer magnitude times 2^-24.
  const F32s tiny = __builtin_convertvector((I32s)magnitude, F32s) * 0x1p-24F;
  const F32s absolute = select((I32s)(magnitude < 0x400), tiny, normal);
  return as_f32(as_u32(absolute) | (bits & 0x8000) << 16);
#endif
}

// Rounded to nearest, ties to even; NaN stays NaN.
[[gnu::always_inline]] inline U16s narrow(F32s v, Bf16) {
  const U32s bits = as_u32(v);
  const U32s rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const U32s nan = (U32s)((bits & 0x7fffffff) > 0x7f800000);
  return __builtin_convertvector((nan & (bits >> 16 | 0x40)) | (~nan & rounded), U16s);
}

[[gnu::always_inline]] inline U16s narrow(F32s v, F16) {
#if defined(__AVX512F__)
  return (U16s)_mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (U16s)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const U32s bits = as_u32(v);
  const U32s absolute = bits & 0x7fffffff;
  const U32s normal = (absolute + 0xfff + (absolute >> 13 & 1) - (112U << 23)) >> 13;
  // Adding 1/2 leaves 24 fraction bits below it: the addition rounds to multiples of 2^-24.
  const F32s half = as_f32(U32s{} + 0x3f000000);
  const U32s tiny = as_u32(as_f32(absolute) + half) - 0x3f000000;
  U32s result = (U32s)as_u32(select((I32s)(absolute < 0x38800000), as_f32(tiny), as_f32(normal)));
  const U32s huge = (U32s)(absolute >= 0x477ff000);  // 65520 and above round to infinity
  result = (huge & 0x7c00) | (~huge & result);
  const U32s nan = (U32s)(absolute > 0x7f800000);
  result = (nan & 0x7e00) | (~nan & result);
  return __builtin_convertvector(result | (bits >> 16 & 0x8000), U16s);
#endif
}

// `lanes` elements as f32, and back.
[[gnu::always_inline]] inline F32s load_f32(const float* from) { return load<F32s>(from); }
template <class T>
[[gnu::always_inline]] inline F32s load_f32(const T* from) {
  return widen(load<U16s>(from), T{});
}
[[gnu::always_inline]] inline void store_f32(float* to, F32s v) { store(to, v); }
template <class T>
[[gnu::always_inline]] inline void store_f32(T* to, F32s v) {
  store(to, narrow(v, T{}));
}

// The first `count` < lanes elements, then zeros; nothing past them is touched.
template <class T>
inline F32s load_part(const T* from, int count) {
  T part[lanes] = {};
  for (int i = 0; i < count; ++i) part[i] = from[i];
  return load_f32(part);
}
template <class T>
inline void store_part(T* to, F32s v, int count) {
  T part[lanes];
  store_f32(part, v);
  for (int i = 0; i < count; ++i) to[i] = part[i];
}

// count elements as f32, then zeros up to the next multiple of `lanes`.
template <class T>
[[gnu::always_inline]] inline void widen_row(const T* from, int count, float* to) {
  int i = 0;
  for (; i + lanes <= count; i += lanes) store(to + i, load_f32(from + i));
  if (i < count) store(to + i, load_part(from + i, count - i));
}

constexpr int round_up(int value, int unit) { return (value + unit - 1) / unit * unit; }

}  // namespace
}  // namespace voxgemm::cpu::VOXGEMM_ISA
