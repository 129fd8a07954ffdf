# Flags shared by every target, and the table of instruction sets that the host kernels are compiled for.
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
# The same flags in Release wherever the library is built (by CMake alone or for a wheel), so that ccache serves both.
string(REGEX REPLACE "-O2" "-O3" CMAKE_CXX_FLAGS_RELEASE "${CMAKE_CXX_FLAGS_RELEASE}")

find_package(OpenMP REQUIRED COMPONENTS CXX)

add_library(heddle_flags INTERFACE)
target_compile_options(
  heddle_flags
  INTERFACE
    # Parameter structs are filled by designated initializers, and what is left out keeps its default on purpose.
    $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wshadow;-Wnon-virtual-dtor;-Wno-missing-field-initializers>
    # errno and trapping exceptions are never read; every other IEEE rule stays (NaN and infinities carry meaning here).
    $<$<COMPILE_LANGUAGE:CXX>:-fno-math-errno;-fno-trapping-math>
    # Paths in messages and binaries are relative to the source tree, whatever machine built them.
    $<$<COMPILE_LANGUAGE:CXX>:-ffile-prefix-map=${PROJECT_SOURCE_DIR}/=>
    $<$<AND:$<BOOL:${HEDDLE_WERROR}>,$<COMPILE_LANGUAGE:CXX>>:-Werror>)
if(HEDDLE_SANITIZE)
  string(REPLACE ";" "," heddle_sanitizers "${HEDDLE_SANITIZE}")
  # -O1: the kernels' templates under sanitizers take minutes to optimize further.
  target_compile_options(
    heddle_flags INTERFACE -fsanitize=${heddle_sanitizers} -fno-sanitize-recover=all -fno-omit-frame-pointer -O1 -g1)
  target_link_options(heddle_flags INTERFACE -fsanitize=${heddle_sanitizers})
endif()

# Host kernels (cpp/src/host/kernels) are compiled once for each of these; the core picks one at run time. The name is
# the namespace that the copy lives in. Each level includes the ones below it.
set(HEDDLE_ISAS portable)
set(HEDDLE_ISA_FLAGS_portable "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(HEDDLE_ISA_FLAGS_avx2 -mavx2 -mfma -mf16c)
  set(HEDDLE_ISA_FLAGS_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512cd -mfma -mf16c)
  set(HEDDLE_ISA_FLAGS_avx512_bf16 ${HEDDLE_ISA_FLAGS_avx512} -mavx512bf16 -mavx512vnni)
  set(HEDDLE_ISA_FLAGS_amx ${HEDDLE_ISA_FLAGS_avx512_bf16} -mamx-tile -mamx-bf16 -mamx-int8)
  include(CheckCXXCompilerFlag)
  foreach(isa IN ITEMS avx2 avx512 avx512_bf16 amx)
    string(REPLACE ";" " " flags "${HEDDLE_ISA_FLAGS_${isa}}")
    check_cxx_compiler_flag("${flags}" HEDDLE_COMPILES_${isa})
    if(HEDDLE_COMPILES_${isa})
      list(APPEND HEDDLE_ISAS ${isa})
    endif()
  endforeach()
endif()
set(HEDDLE_ISA_LEVEL_portable 0)
set(HEDDLE_ISA_LEVEL_avx2 1)
set(HEDDLE_ISA_LEVEL_avx512 2)
set(HEDDLE_ISA_LEVEL_avx512_bf16 3)
set(HEDDLE_ISA_LEVEL_amx 4)
