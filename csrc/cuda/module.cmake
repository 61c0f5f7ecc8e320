# The module _cuda, with the CUDA run time in it: it needs a driver, and no toolkit, where it runs.
#
# The compiler: CUDA_HOME's, else that of PyPI's wheels (pip install --group cuda-build), else PATH's.
if(DISAGG_NVCC AND NOT EXISTS "${DISAGG_NVCC}") # of an environment that is gone
  unset(DISAGG_NVCC CACHE)
endif()
find_program(DISAGG_NVCC nvcc NO_DEFAULT_PATH
  PATHS ENV CUDA_HOME ENV CUDA_PATH "${Python_SITELIB}/nvidia/cu13" ENV PATH /usr/local/cuda
  PATH_SUFFIXES bin "")
set(lack "")
if(DISAGG_NVCC)
  execute_process(COMMAND "${DISAGG_NVCC}" --version OUTPUT_VARIABLE version)
  string(REGEX MATCH "release ([0-9.]+)" version "${version}")
  if(CMAKE_MATCH_1 VERSION_LESS 12.5)
    set(lack "${DISAGG_NVCC} is of CUDA ${CMAKE_MATCH_1}, older than 12.5")
  endif()
else()
  set(lack "there is no nvcc")
endif()
if(lack)
  if(NOT DISAGG_CUDA STREQUAL "AUTO")
    message(FATAL_ERROR "DISAGG_CUDA=${DISAGG_CUDA}, but ${lack}: set CUDA_HOME, or pip install --group cuda-build")
  endif()
  message(STATUS "The CUDA kernels are left out: ${lack}")
  return()
endif()
message(STATUS "CUDA kernels by ${DISAGG_NVCC}")

file(REAL_PATH "${DISAGG_NVCC}" nvcc)
cmake_path(SET toolkit NORMALIZE "${nvcc}/../..")
set(CMAKE_CUDA_COMPILER "${nvcc}")
set(CMAKE_CUDA_ARCHITECTURES 90a-real) # Hopper: wgmma and the copy engine want sm_90a itself
# The wheels have their libraries in lib, where nvcc looks in lib64.
set(ENV{LIBRARY_PATH} "${toolkit}/lib:$ENV{LIBRARY_PATH}")
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 20)

file(GLOB CUDA_SOURCES CONFIGURE_DEPENDS csrc/cuda/*.cu)
file(GLOB CUDA_BINDINGS CONFIGURE_DEPENDS csrc/bindings/cuda*.cpp)
add_library(disagg_cuda STATIC ${CUDA_SOURCES})
target_include_directories(disagg_cuda PUBLIC csrc)
# A spilled register is an error of ours too. Another compiler's new warning is no reason not to install.
if(DISAGG_CUDA STREQUAL "ON")
  target_compile_options(disagg_cuda PRIVATE "SHELL:-Werror all-warnings" -Xptxas=-warn-spills,-Werror
    -Xcompiler=-Wall,-Wextra)
endif()
nanobind_add_module(_cuda NB_STATIC ${CUDA_BINDINGS})
target_include_directories(_cuda PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
target_link_directories(_cuda PRIVATE "${toolkit}/lib")
target_link_libraries(_cuda PRIVATE disagg_cuda)
set_target_properties(_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static LINKER_LANGUAGE CXX)
install(TARGETS _cuda LIBRARY DESTINATION disagg)
