// Lets a process have no more threads than it is told: loaded before the C
// library.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>

static atomic_long allowed = -1;

// So many from now on; below 0: any number.
void allow_threads(long n) {
  atomic_store(&allowed, n);
}

typedef int Create(
    pthread_t*,
    const pthread_attr_t*,
    void* (*)(void*),
    void*);

int pthread_create(
    pthread_t* thread,
    const pthread_attr_t* attributes,
    void* (*start)(void*),
    void* argument) {
  long left = atomic_load(&allowed);
  if (left == 0) {
    return EAGAIN;
  }
  if (left > 0) {
    atomic_fetch_sub(&allowed, 1);
  }
  Create* create = (Create*)dlsym(RTLD_NEXT, "pthread_create");
  return create(thread, attributes, start, argument);
}
