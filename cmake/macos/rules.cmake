# After project(), which sets them for Apple's tools. Zig's own linker would add
# a second C++ library.
set(CMAKE_CXX_CREATE_STATIC_LIBRARY
    "${HOST_PYTHON} -m ziglang ar qc <TARGET> <OBJECTS>")
set(CMAKE_CXX_CREATE_SHARED_MODULE
    "${HOST_PYTHON} ${CMAKE_CURRENT_LIST_DIR}/link.py ${MACOS_FOLDER} <TARGET> \
<OBJECTS> <LINK_LIBRARIES>")
