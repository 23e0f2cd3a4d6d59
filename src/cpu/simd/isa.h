// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/engine.h"
#include "cpu/row_engine.h"

// The namespaces that the sources of this folder are compiled into, and the flags each needs:
//   v2         -march=x86-64-v2
//   v3         -march=x86-64-v3
//   v4         -march=x86-64-v4
//   v4bf16     -march=x86-64-v4 -mavx512bf16
//   amx        -march=x86-64-v4 -mavx512bf16 -mamx-tile -mamx-bf16
//   portable   -march=x86-64 on x86-64 (so that it is tested), none elsewhere
// and -DVOXGEMM_ISA=<namespace>, at -O2 or more. engine.cpp is the only source that is compiled per
// namespace; all that it includes is internal to the namespace, so that no copy for a new CPU can
// stand in for one of an old.
namespace voxgemm::cpu {

// Whether CPU and operating system together run the instructions, and no slower than the engine
// after.
bool supports_v2();
bool supports_v3();
bool supports_v4();
bool supports_v4bf16();
bool supports_amx();       // also asks the kernel for the use of tiles
bool supports_amx_fp16();  // the same
bool supports_portable();

namespace v2 {
constexpr const char* isa = "v2";
constexpr auto supported = supports_v2;
extern const Engine f32, bf16, f16;
}  // namespace v2
namespace v3 {
constexpr const char* isa = "v3";
constexpr auto supported = supports_v3;
extern const Engine f32, bf16, f16;
extern const RowEngine rows_f64, rows_f32, rows_bf16, rows_f16;
}  // namespace v3
namespace v4 {
constexpr const char* isa = "v4";
constexpr auto supported = supports_v4;
extern const Engine f32, bf16, f16;
extern const RowEngine rows_f64, rows_f32, rows_bf16, rows_f16;
}  // namespace v4
namespace v4bf16 {
constexpr const char* isa = "v4bf16";
constexpr auto supported = supports_v4bf16;
extern const Engine bf16;
}  // namespace v4bf16
namespace amx {
constexpr const char* isa = "amx";
extern const Engine bf16, f16;
}  // namespace amx
namespace portable {
constexpr const char* isa = "portable";
constexpr auto supported = supports_portable;
extern const Engine f32, bf16, f16;
extern const RowEngine rows_f64, rows_f32, rows_bf16, rows_f16;
}  // namespace portable

}  // namespace voxgemm::cpu
