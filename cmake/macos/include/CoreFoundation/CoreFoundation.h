// The names that metal-cpp needs of a header that only Apple's SDK has.

#pragma once

typedef double CFTimeInterval;
typedef const void* CFTypeRef;
typedef const struct __CFDictionary* CFDictionaryRef;
typedef const struct __CFString* CFStringRef;
typedef const struct __CFURL* CFURLRef;
