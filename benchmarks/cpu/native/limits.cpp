// What this machine can do now: int8 multiply-adds, fp32 FMA and bytes read, for one thread and for all given.
//
//   limits THREADS    prints {"1": {"int8": {...}, "fp32": {...}, "read": GB/s}, "THREADS": {...}}; GOP/s, a
//                     multiply-add counts as two
//
// int8 is the fastest way that an instruction set can sum products of bytes, kept in registers by inline assembly:
// vpdpbusd on AVX-512 and AVX-VNNI; on AVX2 vpmaddubsw and a 16-bit sum. "avx2_chain" is for information: the three
// instructions that widen to 32 bits each time. One thread is timed by its own clock, since others may use the machine.
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace {

double now(clockid_t clock) {
  timespec t;
  clock_gettime(clock, &t);
  return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
}

// The best time of several runs of work(thread) on all threads at once.
double best_time(int threads, int runs, const std::function<void(int)>& work) {
  double best = 1e9;
  for (int run = 0; run < runs; ++run) {
    if (threads == 1) {
      const double start = now(CLOCK_THREAD_CPUTIME_ID);
      work(0);
      best = std::min(best, now(CLOCK_THREAD_CPUTIME_ID) - start);
      continue;
    }
    std::atomic<int> ready{0};
    std::vector<double> starts(static_cast<size_t>(threads)), ends(static_cast<size_t>(threads));
    std::vector<std::thread> pool;
    for (int i = 0; i < threads; ++i) {
      pool.emplace_back([&, i] {
        ++ready;
        while (ready.load() < threads) {
        }
        starts[static_cast<size_t>(i)] = now(CLOCK_MONOTONIC);
        work(i);
        ends[static_cast<size_t>(i)] = now(CLOCK_MONOTONIC);
      });
    }
    for (std::thread& t : pool) t.join();
    best = std::min(best, *std::max_element(ends.begin(), ends.end()) - *std::min_element(starts.begin(), starts.end()));
  }
  return best;
}

// ---- arithmetic --------------------------------------------------------------------------------------------------

struct Kernel {
  const char* kind;  // "int8" or "fp32"
  const char* name;
  double operations;  // of a step
  void (*run)(int64_t steps);
};

#if defined(__x86_64__)
#define EACH12(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#define LOOP(name, isa, body, ...)                                                            \
  __attribute__((target(isa), noinline)) void name(int64_t steps) {                           \
    asm volatile(body : "+r"(steps) : : __VA_ARGS__, "cc");                                   \
  }
#define YMM                                                                                                            \
  "ymm0", "ymm1", "ymm2", "ymm3", "ymm4", "ymm5", "ymm6", "ymm7", "ymm8", "ymm9", "ymm10", "ymm11", "ymm12", "ymm13", \
      "ymm14", "ymm15"
#define ZMM                                                                                                            \
  "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9", "zmm10", "zmm11", "zmm30", "zmm31"
#define TIMES(lines) "1:\n\t" lines "dec %0\n\tjnz 1b"
// Twelve chains of zeros for floats (no NaN, no subnormals); what integers hold does not matter.
#define ZERO_Y "vxorps %%ymm14, %%ymm14, %%ymm14\n\tvxorps %%ymm15, %%ymm15, %%ymm15\n\t"
#define ZERO_Z "vpxord %%zmm30, %%zmm30, %%zmm30\n\tvpxord %%zmm31, %%zmm31, %%zmm31\n\t"
#define CLEAR_Y(i) "vxorps %%ymm" #i ", %%ymm" #i ", %%ymm" #i "\n\t"
#define CLEAR_Z(i) "vpxord %%zmm" #i ", %%zmm" #i ", %%zmm" #i "\n\t"

#define FMA_Y(i) "vfmadd231ps %%ymm14, %%ymm15, %%ymm" #i "\n\t"
#define FMA_Z(i) "vfmadd231ps %%zmm30, %%zmm31, %%zmm" #i "\n\t"
#define DOT_Y(i) "%{vex%} vpdpbusd %%ymm14, %%ymm15, %%ymm" #i "\n\t"
#define DOT_Z(i) "vpdpbusd %%zmm30, %%zmm31, %%zmm" #i "\n\t"
#define PRODUCT(t) "vpmaddubsw %%ymm14, %%ymm15, %%ymm" #t "\n\t"
#define SUM(t, i) "vpaddw %%ymm" #t ", %%ymm" #i ", %%ymm" #i "\n\t"
// Six products, then their six sums: in turns the scheduler of Zen 3 gives the products' pipes to sums, 6 % slower.
#define PAIRS                                                                                                  \
  PRODUCT(8) PRODUCT(9) PRODUCT(10) PRODUCT(11) PRODUCT(12) PRODUCT(13) SUM(8, 0) SUM(9, 1) SUM(10, 2) SUM(11, 3) \
  SUM(12, 4) SUM(13, 5)
#define CHAIN(i)                                                                  \
  "vpmaddubsw %%ymm14, %%ymm15, %%ymm12\n\tvpmaddwd %%ymm12, %%ymm13, %%ymm12\n\t" \
  "vpaddd %%ymm12, %%ymm" #i ", %%ymm" #i "\n\t"

LOOP(fma_ymm, "avx2,fma", ZERO_Y EACH12(CLEAR_Y) TIMES(EACH12(FMA_Y)), YMM)
LOOP(pair_ymm, "avx2", TIMES(PAIRS PAIRS), YMM)
LOOP(chain_ymm, "avx2", TIMES(EACH12(CHAIN)), YMM)
LOOP(dot_ymm, "avx2", TIMES(EACH12(DOT_Y)), YMM)
LOOP(fma_zmm, "avx512f", ZERO_Z EACH12(CLEAR_Z) TIMES(EACH12(FMA_Z)), ZMM)
LOOP(dot_zmm, "avx512f,avx512vnni", TIMES(EACH12(DOT_Z)), ZMM)

bool has_avx_vnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __builtin_cpu_supports("avx2") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1) != 0;
}

std::vector<Kernel> kernels() {
  std::vector<Kernel> all;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    all.push_back({"int8", "avx2", 12 * 64, pair_ymm});
    all.push_back({"int8", "avx2_chain", 12 * 64, chain_ymm});
    all.push_back({"fp32", "avx2", 12 * 16, fma_ymm});
  }
  if (has_avx_vnni()) {
    all.push_back({"int8", "avxvnni", 12 * 64, dot_ymm});
    all.push_back({"fp32", "avxvnni", 12 * 16, fma_ymm});
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vnni")) {
    all.push_back({"int8", "avx512", 12 * 128, dot_zmm});
    all.push_back({"fp32", "avx512", 12 * 32, fma_zmm});
  }
  return all;
}
#else
std::vector<Kernel> kernels() { return {}; }
#endif

double arithmetic(const Kernel& kernel, int threads) {
  constexpr int64_t kSteps = 600000;
  const double seconds = best_time(threads, 20, [&](int) { kernel.run(kSteps); });
  return static_cast<double>(kSteps) * kernel.operations * threads / seconds / 1e9;
}

// ---- memory ------------------------------------------------------------------------------------------------------

using Words = int64_t __attribute__((vector_size(16)));

// The sum of everything, so that nothing can be left out; lines are asked for `ahead` bytes before.
int64_t read_all(const char* data, size_t size, size_t ahead) {
  Words a = {}, b = {}, c = {}, d = {};
  for (size_t i = 0; i < size; i += 256) {
    if (ahead != 0) {
      for (size_t line = 0; line < 256; line += 64) __builtin_prefetch(data + i + ahead + line);
    }
    const auto* words = reinterpret_cast<const Words*>(data + i);
    for (size_t j = 0; j < 16; j += 4) {
      a += words[j];
      b += words[j + 1];
      c += words[j + 2];
      d += words[j + 3];
    }
  }
  const Words sum = a + b + c + d;
  return sum[0] + sum[1];
}

class Buffer {
 public:
  explicit Buffer(size_t size) : size_(size) {
    void* all = mmap(nullptr, size + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) {
      std::perror("mmap");
      std::exit(1);
    }
    data_ = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(all) + kHuge - 1) / kHuge * kHuge);
    madvise(data_, size, MADV_HUGEPAGE);  // without huge pages the limit is what small ones give
    for (size_t i = 0; i < size; i += 64) data_[i] = 1;
  }
  const char* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  static constexpr size_t kHuge = size_t{2} << 20;
  char* data_;
  size_t size_;
};

double reading(const Buffer& buffer, int threads) {
  const size_t part = buffer.size() / static_cast<size_t>(threads) / 4096 * 4096;
  std::atomic<int64_t> sink{0};
  double best = 1e9;
  for (const size_t ahead : {size_t{0}, size_t{1024}, size_t{4096}}) {
    best = std::min(best, best_time(threads, 5, [&](int thread) {
                      sink += read_all(buffer.data() + static_cast<size_t>(thread) * part, part, ahead);
                    }));
  }
  return static_cast<double>(part) * threads / best / 1e9;
}

void print_limits(const std::vector<Kernel>& all, const Buffer& buffer, int threads) {
  std::printf("\"%d\": {", threads);
  for (const char* kind : {"int8", "fp32"}) {
    std::printf("\"%s\": {", kind);
    const char* comma = "";
    for (const Kernel& kernel : all) {
      if (std::string(kernel.kind) != kind) continue;
      std::printf("%s\"%s\": %.1f", comma, kernel.name, arithmetic(kernel, threads));
      comma = ", ";
    }
    std::printf("}, ");
  }
  std::printf("\"read\": %.2f}", reading(buffer, threads));
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::max(1, std::atoi(argv[1])) : 1;
  const std::vector<Kernel> all = kernels();
  const Buffer buffer(size_t{192} << 20);
  std::printf("{");
  print_limits(all, buffer, 1);
  if (threads > 1) {
    std::printf(", ");
    print_limits(all, buffer, threads);
  }
  std::printf("}\n");
}
