// consumer THREADS IMAGES SHAPE... OUT PACKAGE...: explains raw float32 images [B, C, H, W] in THREADS threads for each
// package at once, which all must get the same numbers, and writes those of the first package as raw float64 to OUT:
// logits, targets, values, relevance, then scores and gates layer by layer, then the heat maps.
#include <fga_fast/session.h>

#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

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

int run(char** argv, int count) {
  std::ifstream file(argv[2], std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  const auto* values = reinterpret_cast<const float*>(bytes.data());
  const auto images = fga::Images::normalised(
      values, {std::stoll(argv[3]), std::stoll(argv[4]), std::stoll(argv[5]), std::stoll(argv[6])});
  std::vector<fga::Session> sessions;
  for (int i = 0; i < count; ++i) sessions.emplace_back(argv[8 + i]);

  const int each = std::stoi(argv[1]);
  std::vector<Answer> answers(sessions.size() * each);
  std::vector<std::thread> threads;
  for (size_t i = 0; i < answers.size(); ++i)
    threads.emplace_back([&, i] { explain(sessions[i / each], images, answers[i]); });
  for (std::thread& thread : threads) thread.join();
  for (const Answer& answer : answers) {
    if (!answer.error.empty()) throw fga::Error(answer.error);
    if (answer.numbers != answers[0].numbers) throw fga::Error("threads got different numbers");
  }
  std::ofstream out(argv[7], std::ios::binary);
  const auto& numbers = answers[0].numbers;
  out.write(reinterpret_cast<const char*>(numbers.data()),
            static_cast<std::streamsize>(numbers.size() * sizeof(double)));
  return out.flush() ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 9) return 2;
  try {
    return run(argv, argc - 8);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "consumer: %s\n", error.what());
    return 1;
  }
}
