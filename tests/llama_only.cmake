# Read by llama-cpp-python's CMakeLists.txt (CMAKE_PROJECT_INCLUDE): builds the library that the server loads and leaves
# out llama.cpp's own tools. The files of the many architectures are compiled 16 at a time, as most of a compilation is
# reading their headers.
set(LLAMA_BUILD_COMMON OFF)
cmake_language(DEFER DIRECTORY ${CMAKE_SOURCE_DIR} CALL
  set_target_properties llama PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 16)
