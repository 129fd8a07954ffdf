# heddle_python_package_dir(<package> <out>): the directory of an installed Python package, without importing it; empty
# when there is none. The Python is the one in use: an active environment's, or Python_EXECUTABLE.
include_guard(DIRECTORY)
set(Python_FIND_VIRTUALENV FIRST)
if(HEDDLE_PYTHON)
  find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)
else()
  find_package(Python 3.10 COMPONENTS Interpreter)
endif()

function(heddle_python_package_dir package out)
  set(${out} "" PARENT_SCOPE)
  if(NOT Python_Interpreter_FOUND)
    return()
  endif()
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
            "import importlib.util as u; s = u.find_spec('${package}'); print(s.submodule_search_locations[0] if s else '')"
    OUTPUT_VARIABLE directory OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
  set(${out} "${directory}" PARENT_SCOPE)
endfunction()
