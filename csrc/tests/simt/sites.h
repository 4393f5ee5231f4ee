// Places of the kernels where threads wait for others or for a copy, or test a bound. Mutation
// tests turn one off at a time, to see whether the other tests would notice that it is missing.
#pragma once

#include <source_location>
#include <string>
#include <vector>

namespace simt {

struct Site {
  std::string path;
  unsigned line;
};

// Forgets the places seen so far, and notes those that kernels come to from now on.
void watch_sites();
const std::vector<Site>& sites();
void disable_site(int index);  // -1: none
// Called by a thread: whether the place counts.
bool is_enabled(const std::source_location& where);

}  // namespace simt
