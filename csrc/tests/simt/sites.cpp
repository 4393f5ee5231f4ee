#include "simt/sites.h"

#include <algorithm>
#include <map>
#include <utility>

namespace simt {
namespace {

constexpr int NONE = -1;

bool is_watching = false;
int disabled = NONE;
std::vector<Site> found;
// One line of a header has several file names, one per translation unit.
std::map<std::pair<const char*, unsigned>, int> index_of;

}  // namespace

void watch_sites() {
  is_watching = true;
  found.clear();
  index_of.clear();
}

const std::vector<Site>& sites() { return found; }

void disable_site(int index) { disabled = index; }

bool is_enabled(const std::source_location& where) {
  if (!is_watching) return true;
  const auto [entry, is_new] = index_of.try_emplace({where.file_name(), where.line()}, NONE);
  if (is_new) {
    const auto site = std::find_if(found.begin(), found.end(), [&](const Site& s) {
      return s.line == where.line() && s.path == where.file_name();
    });
    entry->second = static_cast<int>(site - found.begin());
    if (site == found.end()) found.push_back({where.file_name(), where.line()});
  }
  return entry->second != disabled;
}

}  // namespace simt
