// Which pieces of straight-line code ran, for kernels compiled with
// -fsanitize-coverage=inline-bool-flag,bb,pc-table.

#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include <string>
#include <vector>

namespace {

struct Table {
  const bool* flags = nullptr;
  size_t n = 0;
  const uintptr_t* places = nullptr;
};

std::vector<Table>& tables() {
  static std::vector<Table> tables;
  return tables;
}

} // namespace

extern "C" {

void __sanitizer_cov_bool_flag_init(bool* begin, bool* end) {
  tables().push_back({begin, size_t(end - begin), nullptr});
}

void __sanitizer_cov_pcs_init(const uintptr_t* begin, const uintptr_t*) {
  tables().back().places = begin;
}

// A line for each piece: whether it ran, library, offset.
const char* msl_coverage() {
  static std::string report;
  report.clear();
  for (auto& table : tables()) {
    for (size_t i = 0; i < table.n; i++) {
      auto* place = reinterpret_cast<const char*>(table.places[2 * i]);
      Dl_info info = {};
      dladdr(place, &info);
      char line[1024];
      snprintf(
          line,
          sizeof(line),
          "%d %s 0x%lx\n",
          table.flags[i],
          info.dli_fname ? info.dli_fname : "?",
          long(place - static_cast<char*>(info.dli_fbase)));
      report += line;
    }
  }
  return report.c_str();
}
}
