// As much of Apple's header as metal-cpp asks for.

#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>

extern "C" {
typedef struct objc_class* Class;
typedef struct objc_object {
  Class isa;
}* id;
typedef const struct objc_selector* SEL;
typedef struct objc_protocol Protocol;
typedef struct objc_method* Method;
typedef signed char BOOL;

SEL sel_registerName(const char*);
const char* sel_getName(SEL);
Class objc_lookUpClass(const char*);
Class objc_getClass(const char*);
Protocol* objc_getProtocol(const char*);
Class object_getClass(id);
Method class_getInstanceMethod(Class, SEL);
Method class_getClassMethod(Class, SEL);
const char* method_getTypeEncoding(Method);
}
