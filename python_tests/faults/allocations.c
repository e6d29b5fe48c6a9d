// Lets chosen allocations of a process fail: loaded before the C library.

#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>

extern void* __libc_malloc(size_t size);
extern void* __libc_memalign(size_t alignment, size_t size);

static atomic_long countdown = 0;
static atomic_long counted = 0;
static size_t least = 0;

// The n-th allocation of at least `size` bytes from now on fails; 0: none does.
void fail_allocation(long n, size_t size) {
  least = size;
  atomic_store(&counted, 0);
  atomic_store(&countdown, n);
}

// Allocations of that size since.
long count_allocations(void) {
  return atomic_load(&counted);
}

static int fails(size_t size) {
  if (atomic_load(&countdown) <= 0 || size < least) {
    return 0;
  }
  atomic_fetch_add(&counted, 1);
  if (atomic_fetch_sub(&countdown, 1) != 1) {
    return 0;
  }
  errno = ENOMEM;
  return 1;
}

void* malloc(size_t size) {
  return fails(size) ? NULL : __libc_malloc(size);
}

void* aligned_alloc(size_t alignment, size_t size) {
  return fails(size) ? NULL : __libc_memalign(alignment, size);
}
