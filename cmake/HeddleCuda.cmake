# Turns the CUDA language on and provides heddle_add_cuda_kernel().
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  message(FATAL_ERROR "HEDDLE_CUDA=ON needs nvcc: put it on PATH or set CMAKE_CUDA_COMPILER (or build with HEDDLE_CUDA=OFF)")
endif()
foreach(arch IN LISTS HEDDLE_CUDA_ARCHS)
  if(NOT arch MATCHES "^(89|90a|100a)$")
    message(FATAL_ERROR "HEDDLE_CUDA_ARCHS holds '${arch}'; allowed are 89, 90a and 100a")
  endif()
endforeach()
# Machine code only: a kernel written for one architecture has no business being compiled by the driver for another.
list(TRANSFORM HEDDLE_CUDA_ARCHS APPEND "-real" OUTPUT_VARIABLE CMAKE_CUDA_ARCHITECTURES)
enable_language(CUDA)
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25.1 does not know yet that nvcc 12 and later speak C++20
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
endif()
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
# Linked by name below, so that the exported package can say what a static library needs.
set(CMAKE_CUDA_RUNTIME_LIBRARY None)
find_package(HeddleCudart REQUIRED)
include(cutlass)

target_compile_options(
  heddle_flags
  INTERFACE
    # Machine code with line numbers shrinks to a fifth when compressed; it is unpacked once, when it is loaded.
    $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr;-lineinfo;-Xfatbin=-compress-all;-Xptxas=-warn-spills;-Xcompiler=-Wall,-Wextra>
    $<$<AND:$<BOOL:${HEDDLE_WERROR}>,$<COMPILE_LANGUAGE:CUDA>>:-Werror=all-warnings>)

# What everything below cuda/ compiles with.
add_library(heddle_cuda_private INTERFACE)
target_include_directories(heddle_cuda_private INTERFACE "${PROJECT_SOURCE_DIR}" "${PROJECT_SOURCE_DIR}/cpp/src" "${PROJECT_SOURCE_DIR}/cpp/include")
target_link_libraries(heddle_cuda_private INTERFACE heddle_flags heddle::cudart_static)

# heddle_add_cuda_kernel(<folder> ARCHS <arch>... [CUTLASS])
#
# Compiles the .cu files of cuda/<folder> for those of ARCHS that HEDDLE_CUDA_ARCHS asks for, and adds them to the
# library. CUTLASS says that the kernel includes CUTLASS or CuTe headers.
function(heddle_add_cuda_kernel folder)
  cmake_parse_arguments(PARSE_ARGV 1 arg "CUTLASS" "" "ARCHS")
  set(archs "")
  foreach(arch IN LISTS arg_ARCHS)
    if(arch IN_LIST HEDDLE_CUDA_ARCHS)
      list(APPEND archs ${arch}-real)
    endif()
  endforeach()
  if(NOT archs)
    return()
  endif()
  string(REPLACE "/" "_" name "heddle_cuda_${folder}")
  file(GLOB_RECURSE sources CONFIGURE_DEPENDS "${folder}/*.cu")
  add_library(${name} OBJECT ${sources})
  set_target_properties(${name} PROPERTIES CUDA_ARCHITECTURES "${archs}")
  target_link_libraries(${name} PRIVATE heddle_cuda_private)
  if(arg_CUTLASS)
    if(NOT TARGET heddle_cutlass)
      message(FATAL_ERROR "cuda/${folder} needs CUTLASS: pip install --no-deps nvidia-cutlass==4.2.0.0, or set HEDDLE_CUTLASS_DIR")
    endif()
    target_link_libraries(${name} PRIVATE heddle_cutlass)
  endif()
  set_property(GLOBAL APPEND PROPERTY HEDDLE_CUDA_OBJECTS $<TARGET_OBJECTS:${name}>)
endfunction()
