# The CUDA runtime as a static library: heddle::cudart_static.
#
# Static, so that libheddle and the wheel load on a machine without a driver and never meet another libcudart. CMake's
# own FindCUDAToolkit insists on libcudart.so, which the CUDA packages of PyPI do not carry. This file is installed
# with the package, since whoever links a static libheddle links the runtime too.
include(FindPackageHandleStandardArgs)
find_package(Threads REQUIRED)

set(heddle_cuda_roots ${CUDAToolkit_ROOT} $ENV{CUDAToolkit_ROOT} $ENV{CUDA_PATH} $ENV{CUDA_HOME})
find_program(HEDDLE_NVCC NAMES nvcc HINTS ${CMAKE_CUDA_COMPILER} PATHS /usr/local/cuda/bin)
if(CMAKE_CUDA_COMPILER_TOOLKIT_ROOT)
  list(APPEND heddle_cuda_roots "${CMAKE_CUDA_COMPILER_TOOLKIT_ROOT}")
elseif(HEDDLE_NVCC)
  file(REAL_PATH "${HEDDLE_NVCC}" heddle_nvcc)
  cmake_path(GET heddle_nvcc PARENT_PATH heddle_nvcc_dir)
  cmake_path(GET heddle_nvcc_dir PARENT_PATH heddle_nvcc_root)
  list(APPEND heddle_cuda_roots "${heddle_nvcc_root}")
endif()
list(APPEND heddle_cuda_roots /usr/local/cuda)

find_library(HEDDLE_CUDART_STATIC_LIBRARY NAMES cudart_static libcudart_static.a HINTS ${heddle_cuda_roots}
             PATH_SUFFIXES lib64 lib targets/x86_64-linux/lib targets/sbsa-linux/lib)
find_path(HEDDLE_CUDART_INCLUDE_DIR NAMES cuda_runtime_api.h HINTS ${heddle_cuda_roots}
          PATH_SUFFIXES include targets/x86_64-linux/include targets/sbsa-linux/include)
mark_as_advanced(HEDDLE_NVCC HEDDLE_CUDART_STATIC_LIBRARY HEDDLE_CUDART_INCLUDE_DIR)
find_package_handle_standard_args(HeddleCudart REQUIRED_VARS HEDDLE_CUDART_STATIC_LIBRARY HEDDLE_CUDART_INCLUDE_DIR)

if(HeddleCudart_FOUND AND NOT TARGET heddle::cudart_static)
  add_library(heddle::cudart_static STATIC IMPORTED)
  set_target_properties(
    heddle::cudart_static
    PROPERTIES IMPORTED_LOCATION "${HEDDLE_CUDART_STATIC_LIBRARY}"
               INTERFACE_INCLUDE_DIRECTORIES "${HEDDLE_CUDART_INCLUDE_DIR}"
               INTERFACE_LINK_LIBRARIES "Threads::Threads;${CMAKE_DL_LIBS};rt")
endif()
