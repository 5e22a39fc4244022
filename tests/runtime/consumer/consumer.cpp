// consumer MEMORY THREADS IMAGES SHAPE... OUT PACKAGE...: explains raw float32 images [B, C, H, W] in THREADS threads
// for each package at once, which all must get the same numbers, and writes those of the first package as raw float64
// to OUT: logits, targets, values, relevance, then scores and gates block by block, then the heat maps.
#include <fga_fast/session.h>

#include <array>
#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

#include "device_copy.h"

namespace {

std::vector<double> numbers_of(const fga::Result& r) {
  std::vector<double> all = r.logits.values;
  all.insert(all.end(), r.targets.begin(), r.targets.end());
  all.insert(all.end(), r.values.begin(), r.values.end());
  all.insert(all.end(), r.relevance.values.begin(), r.relevance.values.end());
  for (const auto& [layer, scores] : r.scores) {
    all.insert(all.end(), scores.values.begin(), scores.values.end());
    const auto& gates = r.gates.at(layer).values;
    all.insert(all.end(), gates.begin(), gates.end());
  }
  const fga::Heatmaps heat = r.heatmap();
  all.insert(all.end(), heat.values.begin(), heat.values.end());
  return all;
}

struct Answer {
  std::vector<double> numbers;
  std::string error;
};

void explain(const fga::Session& session, const fga::Images& images, Answer& answer) {
  try {
    for (int i = 0; i < 3; ++i) answer.numbers = numbers_of(session.explain(images));
  } catch (const std::exception& error) {
    answer.error = error.what();
  }
}

// MEMORY is "host" or "device". A package of the CPU must refuse device memory before it looks at it, so any address
// will do.
fga::Images images_of(const std::string& bytes, const std::array<int64_t, 4>& shape, const std::string& memory,
                      const fga::Session& session) {
  const auto* values = reinterpret_cast<const float*>(bytes.data());
  if (memory == "host") return fga::Images::normalised(values, shape);
  if (session.metadata().device == "cuda") {
    static const DeviceCopy copy(bytes.data(), bytes.size());
    values = copy.values();
  }
  return fga::Images::normalised(values, shape, fga::Memory::device);
}

int run(char** argv, int count) {
  std::ifstream file(argv[3], std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  std::vector<fga::Session> sessions;
  for (int i = 0; i < count; ++i) sessions.emplace_back(argv[9 + i]);
  const fga::Images images =
      images_of(bytes, {std::stoll(argv[4]), std::stoll(argv[5]), std::stoll(argv[6]), std::stoll(argv[7])}, argv[1],
                sessions[0]);

  const int each = std::stoi(argv[2]);
  std::vector<Answer> answers(sessions.size() * each);
  std::vector<std::thread> threads;
  for (size_t i = 0; i < answers.size(); ++i)
    threads.emplace_back([&, i] { explain(sessions[i / each], images, answers[i]); });
  for (std::thread& thread : threads) thread.join();
  for (const Answer& answer : answers) {
    if (!answer.error.empty()) throw fga::Error(answer.error);
    if (answer.numbers != answers[0].numbers) throw fga::Error("threads got different numbers");
  }
  std::ofstream out(argv[8], std::ios::binary);
  const auto& numbers = answers[0].numbers;
  out.write(reinterpret_cast<const char*>(numbers.data()),
            static_cast<std::streamsize>(numbers.size() * sizeof(double)));
  return out.flush() ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 10) return 2;
  try {
    return run(argv, argc - 9);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "consumer: %s\n", error.what());
    return 1;
  }
}
