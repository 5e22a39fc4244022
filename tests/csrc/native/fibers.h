// Threads of a CUDA block as fibers of the CPU, which meet where CUDA's threads wait for each other. See
// cuda_on_host.h.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};

namespace on_host {

enum class Order { forward, backward, shuffled };
struct Settings {
  Order order = Order::forward;
  bool copies_at_once = false;
};
inline Settings settings;
inline std::string failure;                // of the last kernel; empty if it ran through
inline std::size_t most_shared_bytes = 0;  // that any launch so far asked for

constexpr int kLanes = 32;
constexpr std::size_t kStackBytes = 256 * 1024;

// A place where a number of threads wait for each other.
struct Meeting {
  const char* what = nullptr;
  int arrived = 0;
  uint64_t rounds = 0;
};

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool valid;
  void run() const {
    if (valid)
      std::memcpy(to, from, bytes);
    else
      std::memset(to, 0, bytes);
  }
};

struct Thread {
  ucontext_t context;
  std::vector<unsigned char> stack = std::vector<unsigned char>(kStackBytes);
  uint3 index;
  bool done = false;
  const Meeting* waits_for = nullptr;
  uint64_t until_round = 0;
  std::vector<std::vector<Copy>> groups;  // closed groups of copies under way, oldest first
  std::vector<Copy> open;
  uint32_t in[8];  // what the lane brings to a warp's meeting, and what it takes away
  uint32_t out[4];
  void* sanitizer_stack = nullptr;
  bool runnable() const { return !done && (waits_for == nullptr || waits_for->rounds != until_round); }
};

struct Block {
  uint3 index, size, grid;
  std::vector<Thread> threads;
  std::vector<Meeting> warps;
  Meeting all;
  std::vector<unsigned char> shared;
  std::function<void()> body;
  ucontext_t scheduler;
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_stack_bytes = 0;
  int now = 0;
  int vote = 0;
  bool failed = false;

  Thread& current() { return threads[now]; }
  Thread* warp_of_current() { return &threads[now / kLanes * kLanes]; }

  void leave() {
    Thread& t = current();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(t.done ? nullptr : &t.sanitizer_stack, scheduler_stack, scheduler_stack_bytes);
#endif
    swapcontext(&t.context, &scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(t.sanitizer_stack, &scheduler_stack, &scheduler_stack_bytes);
#endif
  }

  void fail(const std::string& why) {
    if (failure.empty()) failure = why;
    failed = true;
    leave();  // never to return
  }

  // The last of `count` threads to arrive does `work` for all; then all go on.
  template <class F>
  void meet(Meeting& meeting, int count, const char* what, const F& work) {
    if (meeting.arrived == 0) meeting.what = what;
    if (meeting.what != what)
      fail(std::string("threads of one warp or block met in ") + meeting.what + " and in " + what);
    if (++meeting.arrived == count) {
      work();
      meeting.arrived = 0;
      ++meeting.rounds;
      return;
    }
    current().waits_for = &meeting;
    current().until_round = meeting.rounds;
    leave();
    current().waits_for = nullptr;
  }
  template <class F>
  void meet_warp(const char* what, const F& work) {
    meet(warps[now / kLanes], kLanes, what, work);
  }
};

inline Block* block = nullptr;

inline void enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_stack, &block->scheduler_stack_bytes);
#endif
  block->body();
  Thread& t = block->current();
  if (!t.open.empty() || !t.groups.empty()) {
    const auto unfinished = [](const std::vector<Copy>& group) { return !group.empty(); };
    if (!t.open.empty() || std::any_of(t.groups.begin(), t.groups.end(), unfinished))
      failure = "a thread ended with copies under way";
  }
  t.done = true;
  block->leave();
}

inline void resume(Block& b, int thread) {
  b.now = thread;
  Thread& t = b.threads[thread];
#if defined(__SANITIZE_ADDRESS__)
  void* own = nullptr;
  __sanitizer_start_switch_fiber(&own, t.stack.data(), t.stack.size());
#endif
  swapcontext(&b.scheduler, &t.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(own, nullptr, nullptr);
#endif
}

inline std::vector<int> run_order(int threads, uint32_t seed) {
  std::vector<int> order(threads);
  for (int i = 0; i < threads; ++i) order[i] = settings.order == Order::backward ? threads - 1 - i : i;
  if (settings.order == Order::shuffled)
    for (int i = threads - 1; i > 0; --i) {
      seed = seed * 1664525U + 1013904223U;
      std::swap(order[i], order[(seed >> 8) % (i + 1)]);
    }
  return order;
}

inline void run_block(Block& b) {
  block = &b;
  b.warps.resize((b.threads.size() + kLanes - 1) / kLanes);
  for (std::size_t i = 0; i < b.threads.size(); ++i) {
    Thread& t = b.threads[i];
    t.index.x = static_cast<unsigned>(i);
    t.done = false;
    t.waits_for = nullptr;
    t.groups.clear();
    t.open.clear();
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.data();
    t.context.uc_stack.ss_size = t.stack.size();
    t.context.uc_link = nullptr;
    makecontext(&t.context, enter, 0);
  }
  uint32_t round = 0;
  for (bool moved = true; moved && !b.failed;) {
    moved = false;
    for (const int i : run_order(static_cast<int>(b.threads.size()), ++round))
      if (!b.failed && b.threads[i].runnable()) {
        resume(b, i);
        moved = true;
      }
  }
  for (const Thread& t : b.threads)
    if (!t.done && failure.empty())
      failure = std::string("threads wait forever in ") + (t.waits_for ? t.waits_for->what : "?");
}

inline Thread& me() {
  return block->current();
}

}  // namespace on_host
