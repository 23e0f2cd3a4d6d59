# SPDX-License-Identifier: Apache-2.0
# Compiler flags of every target. No build path may reach a binary or an error text, hence the prefix map.
set(voxgemm_warnings -Wall -Wextra)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  # Seen in g++ 12's own std::string where there is nothing to see (GCC bug 105329).
  list(APPEND voxgemm_warnings -Wno-restrict)
endif()
if(VOXGEMM_WERROR)
  list(APPEND voxgemm_warnings -Werror)
endif()
foreach(option IN LISTS voxgemm_warnings ITEMS "-ffile-prefix-map=${PROJECT_SOURCE_DIR}/=")
  add_compile_options($<$<COMPILE_LANGUAGE:CXX>:${option}> $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=${option}>)
endforeach()
if(VOXGEMM_SANITIZE)
  add_compile_options("-fsanitize=${VOXGEMM_SANITIZE}" -fno-sanitize-recover=all -fno-omit-frame-pointer)
  add_link_options("-fsanitize=${VOXGEMM_SANITIZE}")
endif()

# Sums are rounded as written, except in the SIMD kernels, which choose their fused operations.
function(voxgemm_exact_sums target)
  target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-ffp-contract=off>)
endfunction()
