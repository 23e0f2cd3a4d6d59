# SPDX-License-Identifier: Apache-2.0
# Compiler flags of every target. No build path may reach a binary or an error text, hence the prefix map.
add_compile_options(-Wall -Wextra "-ffile-prefix-map=${PROJECT_SOURCE_DIR}/=")
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  # Seen in g++ 12's own std::string where there is nothing to see (GCC bug 105329).
  add_compile_options(-Wno-restrict)
endif()
if(VOXGEMM_WERROR)
  add_compile_options(-Werror)
endif()
if(VOXGEMM_SANITIZE)
  add_compile_options("-fsanitize=${VOXGEMM_SANITIZE}" -fno-sanitize-recover=all -fno-omit-frame-pointer)
  add_link_options("-fsanitize=${VOXGEMM_SANITIZE}")
endif()

# Sums are rounded as written, except in the SIMD kernels, which choose their fused operations.
function(voxgemm_exact_sums target)
  target_compile_options(${target} PRIVATE -ffp-contract=off)
endfunction()
