// Sends metal-cpp's messages to the objects of fake_metal.cpp, and nothing to
// null; stands in for the parts of Apple's libraries that metal-cpp names.

#define NS_PRIVATE_IMPLEMENTATION
#define CA_PRIVATE_IMPLEMENTATION
#define MTL_PRIVATE_IMPLEMENTATION
#include <Foundation/Foundation.hpp>
#include <Metal/Metal.hpp>
#include <QuartzCore/QuartzCore.hpp>

#include <set>
#include <string>

#include "fake_metal.h"

namespace {

void* answer_null() {
  return nullptr;
}

} // namespace

extern "C" {

__attribute__((used)) void* fake_metal_method(
    const fake_metal::Object* object,
    const char* selector) {
  return object ? fake_metal::method_of(object, selector)
                : reinterpret_cast<void*>(answer_null);
}

SEL sel_registerName(const char* name) {
  static std::set<std::string> names;
  return reinterpret_cast<SEL>(names.insert(name).first->c_str());
}
const char* sel_getName(SEL selector) {
  return reinterpret_cast<const char*>(selector);
}
Class objc_lookUpClass(const char*) {
  return nullptr;
}
Class objc_getClass(const char*) {
  return nullptr;
}
Protocol* objc_getProtocol(const char*) {
  return nullptr;
}
Class object_getClass(id) {
  return nullptr;
}
Method class_getInstanceMethod(Class, SEL) {
  return nullptr;
}
Method class_getClassMethod(Class, SEL) {
  return nullptr;
}
const char* method_getTypeEncoding(Method) {
  return "";
}
void objc_msgSend_stret() {
  abort();
}
void objc_msgSend_fpret() {
  abort();
}

// The arguments stay where they are for the method.
asm(R"(
.text
.globl objc_msgSend
.type objc_msgSend,@function
objc_msgSend:
  pushq %rdi
  pushq %rsi
  pushq %rdx
  pushq %rcx
  pushq %r8
  pushq %r9
  subq $8, %rsp
  call fake_metal_method@PLT
  addq $8, %rsp
  popq %r9
  popq %r8
  popq %rcx
  popq %rdx
  popq %rsi
  popq %rdi
  jmp *%rax
.size objc_msgSend, .-objc_msgSend
)");

void* _NSConcreteStackBlock[32];
void* _NSConcreteGlobalBlock[32];
void _Block_object_dispose(const void*, int) {}
void _Block_object_assign(void*, const void*, int) {}
void* _Block_copy(const void* block) {
  return const_cast<void*>(block);
}
void _Block_release(const void*) {}
}
