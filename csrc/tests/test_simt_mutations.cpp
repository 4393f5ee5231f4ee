// Whether a missing barrier, wait or bounds test would be seen: every such place that the kernels
// come to is turned off, one at a time, and some seed must then give another result, an error of
// the shim, or one of AddressSanitizer.
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <set>

#include "attention_problem.h"
#include "cuda_table.h"
#include "simt/cuda.h"

using namespace smartkv;

namespace {

const KernelTable CUDA = testing::cuda_table();
constexpr int NUM_SEEDS = 5;
constexpr rlimit LIMIT{20, 20};  // seconds of CPU time for a place; a busy machine is no mutation

// What a run leaves behind. Equal for every seed, unless something is wrong.
using Bytes = std::vector<unsigned char>;

template <typename T>
void add(Bytes& bytes, const std::vector<T>& values) {
  const size_t size = values.size() * sizeof(T), at = bytes.size();
  bytes.resize(at + size);
  if (size > 0) std::memcpy(bytes.data() + at, values.data(), size);
}

// More pages than the grid has blocks.
Bytes run_pages() {
  constexpr int64_t TOKENS = 16 * PAGE_SIZE + 22, PAGES = 17;
  Dense rows(DType::BFLOAT16, 1, 2, TOKENS, 64), k(DType::FLOAT32, 1, 2, PAGES * PAGE_SIZE, 64);
  rows.fill_normal();
  Dense v = k;
  const std::vector<float> mean = testing::normals(2 * 64), scores = testing::normals(2 * TOKENS);
  const std::vector<int32_t> positions(2 * TOKENS, 5);
  const int64_t page_bytes = page_layout(2, 64).page_bytes;
  std::vector<uint8_t> pages(2 * PAGES * page_bytes);
  CUDA.quantize_kv({rows.view(), rows.view(), mean.data(), positions.data(), scores.data(),
                    pages.data(), page_bytes, 1, 2, 64, 2, TOKENS, Levels::GAUSSIAN},
                   testing::parallel());
  CUDA.dequantize_kv({pages.data(), page_bytes, mean.data(), k.bytes.data(), v.bytes.data(),
                      DType::FLOAT32, 1, 2, 64, 2, PAGES, Levels::GAUSSIAN},
                     testing::parallel());
  Bytes bytes;
  add(bytes, pages);
  add(bytes, k.bytes);
  add(bytes, v.bytes);
  return bytes;
}

// Long enough for several warps of the plan.
void compact_long_list(Bytes& bytes) {
  Cache cache({4}, 1, 1, 64, 20, DType::BFLOAT16, Levels::GAUSSIAN);
  Dense rows(DType::BFLOAT16, 1, 1, 1250, 64);
  rows.fill_normal();
  cache.append(cpu_kernels(), rows, rows, std::vector<int8_t>(1250), 0);
  std::vector<int8_t> targets(20 * PAGE_SIZE);
  for (int8_t& target : targets) target = static_cast<int8_t>(testing::random_int(-1, 0));
  CUDA.compact_kv({cache.view(), targets.data()}, testing::parallel());
  add(bytes, cache.pools[0]);
  add(bytes, cache.seqlens);
}

// A cache that overflows in append_kv, and in compact_kv by what falls from other tiers, some of it
// with the codes of its keys or values as they are: those of a row whose rotation is one channel
// would be others if they were encoded anew.
Bytes run_cache() {
  const std::vector<int> kinds = {2, 302, 3, 8, 16};
  const int num_tiers = static_cast<int>(kinds.size());
  constexpr int64_t TOKENS = 380;
  Dense rows(DType::BFLOAT16, 1, 2, TOKENS, 64);
  rows.fill_normal();
  for (int64_t i = 0; i < 2 * TOKENS * 64; ++i) {
    if (i / 64 % 2 == 0) rows.set(i, 30);
  }
  Cache cache(kinds, 1, 2, 64, 1, DType::BFLOAT16, Levels::GAUSSIAN);
  std::vector<int8_t> tiers(2 * TOKENS), targets(2 * num_tiers * PAGE_SIZE);
  for (int8_t& tier : tiers) tier = static_cast<int8_t>(testing::random_int(-1, num_tiers - 1));
  tiers[7] = 100;  // no such tier
  for (size_t i = 0; i < targets.size(); ++i) {
    const int tier = static_cast<int>(i / PAGE_SIZE % num_tiers);
    targets[i] = static_cast<int8_t>(tier > 0 && tier != 3 ? testing::random_int(0, tier)
                                                           : testing::random_int(-1, tier));
  }
  const std::vector<int32_t> positions(2 * TOKENS, 5);
  const std::vector<float> scores = testing::normals(2 * TOKENS);
  CUDA.append_kv({cache.view(), rows.view(), rows.view(), positions.data(), scores.data(),
                  tiers.data(), TOKENS},
                 testing::parallel());
  Bytes bytes;
  for (const auto& pool : cache.pools) add(bytes, pool);
  CUDA.compact_kv({cache.view(), targets.data()}, testing::parallel());
  for (const auto& pool : cache.pools) add(bytes, pool);
  add(bytes, cache.seqlens);
  compact_long_list(bytes);
  return bytes;
}

Bytes attend(Problem& problem) {
  const Case& c = problem.c;
  const int64_t heads = int64_t{c.batch} * c.kv_heads, rows = heads * c.groups * c.q_len;
  const Cache& cache = problem.cache;
  Dense out(c.dtype, c.batch, c.kv_heads * c.groups, c.q_len, c.head_dim);
  std::vector<float> lse(rows), window_mass(heads * c.window_len);
  std::vector<float> mass(heads * cache.num_tiers() * cache.max_pages * PAGE_SIZE);
  DecodeAttentionParams p = problem.params();
  p.out = out.bytes.data();
  p.lse = lse.data();
  p.mass = mass.data();
  p.window_mass = window_mass.data();
  p.precision = Precision::AUTO;
  CUDA.decode_attention(p, testing::parallel());
  Bytes bytes;
  add(bytes, out.bytes);
  add(bytes, lse);
  add(bytes, mass);
  add(bytes, window_mass);
  return bytes;
}

// Ragged heads, several of them in one part; two row blocks; records behind the end of a list, and
// a window whose first slot is empty.
Bytes run_attention() {
  Problem few({1, 3, 2, 80, DType::BFLOAT16, 1, 70, 700, 0}, {3, 8, 16}, {300, 130, 1},
              Levels::GAUSSIAN, 5);
  Problem many({1, 2, 1, 64, DType::FLOAT16, 20, 70, 700, 0}, {4}, {150}, Levels::GAUSSIAN);
  Bytes bytes;
  for (Problem* problem : {&few, &many}) {
    for (int32_t& length : problem->cache.seqlens) length -= length > 1 ? 3 : 0;
    problem->window_positions[0] = -1;
    for (int d = 0; d < problem->c.head_dim; ++d) {
      problem->v_window.set(d, NAN);
    }
    add(bytes, attend(*problem));
  }
  return bytes;
}

// Lengths and page ids that lead out of the cache, a position that leads out of int32.
Bytes run_wrong_values() {
  Problem problem({1, 2, 1, 64, DType::FLOAT16, 1, 0, 700, 0}, {4}, {150}, Levels::GAUSSIAN);
  problem.cache.seqlens = {INT32_MAX, -5};
  problem.c.q_start = INT64_MAX;
  for (size_t i = 0; i < problem.cache.table.size(); ++i) {
    problem.cache.table[i] = i % 2 == 0 ? INT32_MAX : INT32_MIN;
  }
  return attend(problem);
}

void select(Bytes& bytes, int64_t heads, int64_t n, std::vector<int64_t> budgets) {
  const auto groups = static_cast<int64_t>(budgets.size());
  const std::vector<float> scores = testing::normals(groups * heads * n);
  std::vector<int8_t> current(scores.size()), tiers(scores.size());
  for (int8_t& tier : current) tier = static_cast<int8_t>(testing::random_int(-1, 3));
  SelectParams p{};
  p.scores = scores.data();
  p.current = current.data();
  p.budgets = budgets.data();
  const int64_t page_bytes[] = {4992, 7040, 9088};
  const double distortion[] = {0.1175, 0.03454, 0.009497};
  std::copy_n(page_bytes, 3, p.page_bytes);
  std::copy_n(distortion, 3, p.distortion);
  p.evict_distortion = 1;
  p.zipf_offset = 64;
  p.num_tiers = 3;
  p.tiers = tiers.data();
  p.groups = groups;
  p.heads = heads;
  p.n = n;
  CUDA.select_kv(p, testing::parallel());
  add(bytes, tiers);
}

void score(Bytes& bytes, DType dtype, int64_t n) {
  Dense keys(dtype, 1, 1, n, 64);
  keys.fill_normal();
  const HeadsView view = keys.view();
  const std::vector<float> w0 = testing::normals(64 * 40), w1 = testing::normals(40 * 24);
  const std::vector<float> w2 = testing::normals(24), b0 = testing::normals(40);
  const std::vector<float> b1 = testing::normals(24), b2 = testing::normals(1);
  std::vector<float> out(n);
  GateScoreParams g{};
  g.keys = &view;
  const float* const weights[] = {w0.data(), w1.data(), w2.data()};
  const float* const biases[] = {b0.data(), b1.data(), b2.data()};
  const int sizes[] = {64, 40, 24, 1};
  std::copy_n(weights, 3, g.weights);
  std::copy_n(biases, 3, g.biases);
  std::copy_n(sizes, 4, g.sizes);
  g.num_linear = 3;
  g.scores = out.data();
  g.num_layers = g.batch = g.num_kv_heads = 1;
  g.kv_len = n;
  CUDA.gate_score(g, testing::parallel());
  add(bytes, out);
}

// The second selection leaves tokens without a place that the second round has room for.
Bytes run_scores() {
  Bytes bytes;
  select(bytes, 3, 1000, {200000, 90000});
  select(bytes, 2, 10, {12000});
  score(bytes, DType::FLOAT32, 20);
  score(bytes, DType::FLOAT32, 1);
  score(bytes, DType::BFLOAT16, 200);
  const std::vector<float> o = testing::normals(2 * 5 * 80), lse = testing::normals(2 * 5);
  std::vector<float> out(5 * 80), out_lse(5);
  CUDA.merge_states({o.data(), lse.data(), out.data(), out_lse.data(), DType::FLOAT32, 2, 5, 80},
                    testing::parallel());
  add(bytes, out);
  add(bytes, out_lse);
  const HeadsView rows{o.data(), DType::FLOAT32, 400, 80, 80};
  const std::vector<float> matrix = testing::normals(80 * 80);
  CUDA.change_basis({rows, matrix.data(), o.data() + 80, o.data(), out.data(), 1, 5, 1, 80, 1},
                    testing::parallel());
  add(bytes, out);
  return bytes;
}

// Empty where the shim had an objection.
Bytes result_of(Bytes (*run)(), int seed) {
  testing::random().seed(7);
  simt::set_seed(seed);
  try {
    return run();
  } catch (const simt::Error&) {
    return {};
  }
}

// In a process of its own: a kernel that lacks a barrier may crash or never end.
bool differs_in_child(Bytes (*run)(), const Bytes& expected) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    setrlimit(RLIMIT_CPU, &LIMIT);
    if (std::freopen("/dev/null", "w", stderr) == nullptr) _exit(0);
    for (int seed = 0; seed < NUM_SEEDS; ++seed) {
      if (result_of(run, seed) != expected) _exit(1);
    }
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return !WIFEXITED(status) || WEXITSTATUS(status) != 0;
}

std::string place_of(const simt::Site& site) {
  return site.path.substr(site.path.rfind('/') + 1) + ":" + std::to_string(site.line);
}

// Without blanks at its ends.
std::string source_of(const simt::Site& site) {
  std::ifstream file(site.path);
  std::string line;
  for (unsigned i = 0; i < site.line; ++i) std::getline(file, line);
  return line.substr(line.find_first_not_of(' '));
}

// Places whose absence cannot show, each with the reason.
constexpr const char* SHUFFLES =
    "shuffles or votes of the whole warp follow: the shim, unlike CUDA, lets them order memory";
const std::map<std::string, const char*> EXCUSED = {
    {"__syncwarp();  // the record before this one is packed", SHUFFLES},
    {"__syncwarp();  // the stages are free", SHUFFLES},
    {"__syncwarp();  // the stage has come for all lanes", SHUFFLES},
    {"__syncwarp();  // the stage has been read", SHUFFLES},
    {"__syncwarp();  // the counts are clear", SHUFFLES},
    {"__syncwarp();  // all have read their slots", SHUFFLES},
    {"__syncwarp();  // the slots are taken", SHUFFLES},
    {"if (!is_within(row, run.num_rows)) return {0, -1};",
     "saves work: what rows find that only fill up a block is written nowhere"},
    {"copy_async(to, valid ? k : rows.k, valid);",
     "saves a read: whatever score an unseen token gets, a mask replaces it"},
};

// Seen in one subject is enough.
std::set<std::string> seen;
std::map<std::string, std::string> source_at;
std::filesystem::path kernels;  // folder of their sources

void check_subject(const char* name, Bytes (*run)()) {
  simt::watch_sites();
  const Bytes expected = result_of(run, 0);
  CHECK(!expected.empty(), "%s fails as it is", name);
  for (int seed = 1; seed < NUM_SEEDS; ++seed) {
    CHECK(result_of(run, seed) == expected, "%s: differs with seed %d", name, seed);
  }
  const std::vector<simt::Site> sites = simt::sites();
  for (size_t i = 0; i < sites.size(); ++i) {
    const std::string place = place_of(sites[i]);
    source_at[place] = source_of(sites[i]);
    kernels = std::filesystem::path(sites[i].path).parent_path();
    if (seen.contains(place)) continue;
    simt::disable_site(static_cast<int>(i));
    if (differs_in_child(run, expected)) seen.insert(place);
    simt::disable_site(-1);
  }
  std::printf("%s: %d places\n", name, static_cast<int>(sites.size()));
}

// A barrier that no subject comes to is none whose absence would be seen.
void check_barriers() {
  int count = 0;
  for (const auto& entry : std::filesystem::directory_iterator(kernels)) {
    std::ifstream file(entry.path());
    std::string line;
    for (unsigned i = 1; std::getline(file, line); ++i) {
      const auto has = [&](const char* call) { return line.find(call) != std::string::npos; };
      if (!has("__syncwarp();") && !has("__syncthreads();")) continue;
      const std::string place = place_of({entry.path().string(), i});
      CHECK(source_at.contains(place), "no subject comes to %s", place.c_str());
      ++count;
    }
  }
  CHECK(count > 30, "only %d barriers in %s", count, kernels.c_str());
}

}  // namespace

int main() {
  simt::num_multiprocessors = 1;
  check_subject("pages", run_pages);
  check_subject("cache", run_cache);
  check_subject("attention", run_attention);
  check_subject("wrong values", run_wrong_values);
  check_subject("scores", run_scores);
  check_barriers();
  std::set<std::string> excused;
  for (const auto& [place, source] : source_at) {
    const bool is_seen = seen.contains(place);
    CHECK(is_seen != EXCUSED.contains(source), "%s: %s %s", place.c_str(), source.c_str(),
          is_seen ? "is seen after all" : "is not missed");
    excused.insert(source);
  }
  for (const auto& [source, reason] : EXCUSED)
    CHECK(excused.contains(source), "%s", source.c_str());
  return testing::report("test_simt_mutations");
}
