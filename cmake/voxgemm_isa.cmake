# SPDX-License-Identifier: Apache-2.0
# voxgemm_isa(name flags...) compiles VOXGEMM_SIMD_SOURCES once more with `flags` into the library. Those
# sources put everything into namespace voxgemm::cpu::VOXGEMM_ISA (= name), so the copies do not meet;
# tools/check_symbols.py fails on a weak symbol outside it, since the linker keeps one copy of such a
# symbol and might keep the one that an older CPU cannot run.
function(voxgemm_isa name)
  add_library(voxgemm_${name} OBJECT ${VOXGEMM_SIMD_SOURCES})
  target_include_directories(voxgemm_${name} PRIVATE "${PROJECT_SOURCE_DIR}/include" "${PROJECT_SOURCE_DIR}/src")
  target_compile_definitions(voxgemm_${name} PRIVATE VOXGEMM_ISA=${name})
  target_compile_options(voxgemm_${name} PRIVATE ${ARGN} -ffp-contract=fast)
  set_property(GLOBAL APPEND PROPERTY VOXGEMM_ISA_TARGETS voxgemm_${name})
endfunction()
