# Installs the build tree BUILD_DIR into a clean prefix, then configures, builds and runs the project beside this file
# against that prefix alone.
set(work "${BUILD_DIR}/consumer")
file(REMOVE_RECURSE "${work}")
function(run)
  execute_process(COMMAND ${ARGN} COMMAND_ECHO STDOUT COMMAND_ERROR_IS_FATAL ANY)
endfunction()

run("${CMAKE_COMMAND}" --install "${BUILD_DIR}" --prefix "${work}/prefix")
run("${CMAKE_COMMAND}" -S "${CMAKE_CURRENT_LIST_DIR}" -B "${work}/build" -G "${GENERATOR}" "-DCMAKE_CXX_COMPILER=${CXX}"
    "-DCMAKE_CXX_FLAGS=${FLAGS}" "-DCMAKE_PREFIX_PATH=${work}/prefix" -DCMAKE_BUILD_TYPE=Release)
run("${CMAKE_COMMAND}" --build "${work}/build")
run("${work}/build/consumer" "${VERSION}")
execute_process(COMMAND "${work}/build/example" OUTPUT_VARIABLE said COMMAND_ECHO STDOUT ECHO_OUTPUT_VARIABLE
                COMMAND_ERROR_IS_FATAL ANY)
if(NOT said MATCHES "^503 tokens, 272 bytes each, host/[a-z0-9_]+/decode fp32 int8 int8: 0\\.500\n$")
  message(FATAL_ERROR "the example said: ${said}")
endif()
