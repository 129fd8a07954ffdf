# find_package(heddle 0.1 CONFIG) for whoever installs the library. The Python extension is its own component, which
# only a wheel build installs.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(heddle_config_dir "${CMAKE_INSTALL_LIBDIR}/cmake/heddle")
install(
  TARGETS heddle
  EXPORT heddle-targets
  ARCHIVE DESTINATION "${CMAKE_INSTALL_LIBDIR}" COMPONENT development
  LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}" COMPONENT runtime NAMELINK_COMPONENT development
  INCLUDES DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
install(DIRECTORY "${PROJECT_SOURCE_DIR}/cpp/include/heddle" "${PROJECT_BINARY_DIR}/include/heddle"
        DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}" COMPONENT development FILES_MATCHING PATTERN "*.h")
install(EXPORT heddle-targets NAMESPACE heddle:: DESTINATION "${heddle_config_dir}" COMPONENT development)
configure_package_config_file("${PROJECT_SOURCE_DIR}/cmake/heddle-config.cmake.in" "${PROJECT_BINARY_DIR}/heddle-config.cmake"
                              INSTALL_DESTINATION "${heddle_config_dir}")
write_basic_package_version_file("${PROJECT_BINARY_DIR}/heddle-config-version.cmake" COMPATIBILITY SameMinorVersion)
install(FILES "${PROJECT_BINARY_DIR}/heddle-config.cmake" "${PROJECT_BINARY_DIR}/heddle-config-version.cmake"
              "${PROJECT_SOURCE_DIR}/cmake/FindHeddleCudart.cmake"
        DESTINATION "${heddle_config_dir}" COMPONENT development)
install(FILES "${PROJECT_SOURCE_DIR}/LICENSE" DESTINATION "${CMAKE_INSTALL_DOCDIR}" COMPONENT development)
