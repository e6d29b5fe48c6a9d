// Appended to the text of a library: how the executor calls its kernels.

#define MSL_INLINE inline __attribute__((always_inline))
#define MSL_ENTRY extern "C" __attribute__((no_sanitize("thread", "coverage")))

struct msl_index {
  uint thread_position_in_grid[4];
  uint thread_position_in_threadgroup[4];
  uint threadgroup_position_in_grid[4];
  uint threads_per_threadgroup[4];
  uint threadgroups_per_grid[4];
  uint threads_per_grid[4];
  uint thread_index_in_simdgroup;
  uint simdgroup_index_in_threadgroup;
  uint thread_index_in_threadgroup;
  uint simdgroups_per_threadgroup;
  uint threads_per_simdgroup;
  uint thread_index_in_quadgroup;
  uint quadgroup_index_in_threadgroup;
};
struct msl_pointer {
  void* p;
  template <typename T>
  MSL_INLINE operator device T*() const {
    return (device T*)p;
  }
  template <typename T>
  MSL_INLINE operator constant T*() const {
    return (constant T*)p;
  }
  template <typename T>
  MSL_INLINE operator constant T&() const {
    return *(constant T*)p;
  }
  template <typename T>
  MSL_INLINE operator device T&() const {
    return *(device T*)p;
  }
  template <typename T>
  MSL_INLINE operator threadgroup T*() const {
    return (threadgroup T*)p;
  }
};
struct msl_position {
  const uint* p;
  MSL_INLINE operator ushort() const {
    return (ushort)p[0];
  }
  MSL_INLINE operator uint() const {
    return p[0];
  }
  MSL_INLINE operator uint2() const {
    return (::uint2){p[0], p[1]};
  }
  MSL_INLINE operator uint3() const {
    return (::uint3){p[0], p[1], p[2]};
  }
  MSL_INLINE operator ushort2() const {
    return (::ushort2){(ushort)p[0], (ushort)p[1]};
  }
  MSL_INLINE operator ushort3() const {
    return (::ushort3){(ushort)p[0], (ushort)p[1], (ushort)p[2]};
  }
};
extern "C" void* msl_threadgroup_argument(int index);
template <typename F>
struct msl_signature;
template <typename... A>
struct msl_signature<void(A...)> {
  template <int i>
  using at = __type_pack_element<i, A...>;
};
template <typename T>
constexpr int msl_target_bytes() {
  return sizeof(__remove_pointer(__remove_reference_t(T)));
}
template <typename T>
constexpr int msl_is_writable() {
  return !__is_const(__remove_pointer(__remove_reference_t(T)));
}
template <typename T>
constexpr int msl_is_reference() {
  return __is_reference(T);
}
