// Reads NAME.json and checks every entry, because the file may be damaged or of a newer version.
#include <algorithm>
#include <cmath>
#include <fstream>
#include <functional>
#include <iterator>
#include <set>

#include <fga_fast/session.h>

#include "json.h"
#include "text.h"

namespace fga {
namespace {

constexpr std::streamoff kMaxBytes = std::streamoff{64} << 20;
constexpr double kMaxSize = 2147483647;
constexpr double kMaxValues = 2147483648;  // of one batch of images

// Reads the entries of one object and names the entry in every error.
class Reader {
 public:
  Reader(const Json& json, std::string path) : path_(std::move(path)) {
    const auto* object = json.as<Json::Object>();
    if (object == nullptr) fail("", "an object");
    object_ = object;
  }

  [[noreturn]] void fail(const std::string& name, const std::string& expected) const {
    throw Error("package: " + path_ + (name.empty() ? "" : ": " + name) + ": expected " + expected);
  }
  const Json* find(const std::string& name) const {
    const auto found = object_->find(name);
    return found == object_->end() || found->second.is_null() ? nullptr : &found->second;
  }
  const Json& at(const std::string& name) const {
    const Json* json = find(name);
    if (json == nullptr) fail(name, "an entry, it is missing");
    return *json;
  }
  const Json::Object& all() const { return *object_; }

  std::string text(const std::string& name) const {
    const auto* text = at(name).as<std::string>();
    if (text == nullptr) fail(name, "a string");
    return *text;
  }
  std::string one_of(const std::string& name, const std::vector<std::string>& words) const {
    const std::string word = text(name);
    if (std::find(words.begin(), words.end(), word) != words.end()) return word;
    std::string list;
    for (const std::string& known : words) list += (list.empty() ? "" : " or ") + known;
    fail(name, list + ", got '" + word + "'");
  }
  double number(const std::string& name) const {
    const auto* number = at(name).as<double>();
    if (number == nullptr) fail(name, "a number");
    return *number;
  }
  int64_t size(const std::string& name) const { return whole(name, at(name), 1); }
  int64_t whole(const std::string& name, const Json& json, double least) const {
    const auto* number = json.as<double>();
    if (number == nullptr || *number != std::floor(*number) || *number < least || *number > kMaxSize)
      fail(name, "a whole number of at least " + std::to_string(static_cast<int64_t>(least)));
    return static_cast<int64_t>(*number);
  }
  const Json::Array& array(const std::string& name, const Json& json) const {
    const auto* array = json.as<Json::Array>();
    if (array == nullptr) fail(name, "a list");
    return *array;
  }
  std::vector<int64_t> wholes(const std::string& name, double least) const {
    std::vector<int64_t> numbers;
    for (const Json& json : array(name, at(name))) numbers.push_back(whole(name, json, least));
    return numbers;
  }
  std::array<int64_t, 2> pair(const std::string& name) const {
    const auto numbers = wholes(name, 1);
    if (numbers.size() != 2) fail(name, "two numbers");
    return {numbers[0], numbers[1]};
  }
  std::vector<double> numbers(const std::string& name) const {
    std::vector<double> numbers;
    for (const Json& json : array(name, at(name))) {
      if (json.as<double>() == nullptr) fail(name, "numbers");
      numbers.push_back(*json.as<double>());
    }
    return numbers;
  }
  std::vector<std::string> texts(const std::string& name) const {
    std::vector<std::string> texts;
    for (const Json& json : array(name, at(name))) {
      if (json.as<std::string>() == nullptr) fail(name, "strings");
      texts.push_back(*json.as<std::string>());
    }
    return texts;
  }
  bool flag(const std::string& name) const {
    const Json* json = find(name);
    if (json == nullptr) return false;
    if (json->as<bool>() == nullptr) fail(name, "true or false");
    return *json->as<bool>();
  }
  Reader inner(const std::string& name) const { return {at(name), path_ + ": " + name}; }

 private:
  std::string path_;
  const Json::Object* object_ = nullptr;
};

Preprocess read_preprocess(const Reader& in, const Metadata& m) {
  static const std::set<std::string> kKnown = {"image_size", "mean", "std", "crop_pct", "interpolation", "squash"};
  for (const auto& [name, value] : in.all())  // ignoring one would change what the model sees
    if (kKnown.count(name) == 0) in.fail(name, "no such entry; the package may need a newer runtime");
  Preprocess p;
  p.image_size = {m.height, m.width};
  p.mean = in.numbers("mean");
  p.std = in.numbers("std");
  if (in.find("image_size") != nullptr && in.pair("image_size") != p.image_size)
    in.fail("image_size", "height and width of the package, " + shown({m.height, m.width}));
  if (in.find("crop_pct") != nullptr) p.crop_pct = in.number("crop_pct");
  if (in.find("interpolation") != nullptr) p.interpolation = in.text("interpolation");
  p.squash = in.flag("squash");
  if (static_cast<int64_t>(p.mean.size()) != m.channels)
    in.fail("mean", std::to_string(m.channels) + " numbers, one for each channel");
  p.check();
  return p;
}

// The tensors that the package returns, in its order.
void read_outputs(const Reader& in, Metadata& m) {
  const std::string wide = m.dtype == "float64" ? "float64" : "float32";
  const std::vector<int64_t> each = {m.batch}, maps = {m.batch, m.patches()};
  std::map<std::string, std::vector<int64_t>> expected = {
      {"logits", {m.batch, m.classes}}, {"targets", each}, {"values", each}, {"relevance", maps}};
  for (const int64_t block : m.gated_blocks)
    for (const char* kind : {"scores.", "gates."}) expected[kind + std::to_string(block)] = maps;
  std::set<std::string> seen;
  for (const Json& json : in.array("outputs", in.at("outputs"))) {
    const Reader entry(json, "outputs");
    const std::string name = entry.text("name");
    const std::string dtype = entry.one_of("dtype", {"float32", "float64", "bfloat16", "int64"});
    const auto shape = entry.wholes("shape", 1);
    if (!seen.insert(name).second) in.fail("outputs", "every output once, got '" + name + "' again");
    if (shape.empty() || shape[0] != m.batch)
      in.fail("outputs", name + " with a row for each image, got " + shown(shape));
    // signal: only where the model pools patches; ungated: only where it was asked for
    if (name == "signal" || name == "ungated") expected[name] = maps;
    const auto found = expected.find(name);
    if (found != expected.end() && shape != found->second)
      in.fail("outputs", name + " of shape " + shown(found->second) + ", got " + shown(shape));
    const bool map = found != expected.end() && found->second == maps && name != "logits";
    if ((name == "targets" && dtype != "int64") || (map && dtype != wide))
      in.fail("outputs", name + " of dtype " + (map ? wide : "int64") + ", got " + dtype);
    m.outputs.push_back({name, dtype, shape});
  }
  for (const auto& [name, shape] : expected)
    if (seen.count(name) == 0) in.fail("outputs", "an output '" + name + "'");
}

std::string content_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) throw Error("package: cannot read " + path + "; it must lie beside the .pt2 file");
  if (file.tellg() > kMaxBytes) throw Error("package: " + path + " is too large for metadata");
  file.seekg(0);
  return {std::istreambuf_iterator<char>(file), {}};
}

void read_entries(const Reader& in, Metadata& m) {
  in.one_of("format", {"fga_fast package"});
  if (in.size("format_version") != 5)
    in.fail("format_version", "5, got " + std::to_string(in.size("format_version")) +
                                  "; export it again, or use the runtime of that version");
  m.device = in.one_of("device", {"cpu", "cuda"});
  m.dtype = in.one_of("dtype", {"float32", "float64", "bfloat16"});
  m.batch = in.size("batch");
  m.channels = in.size("channels");
  m.height = in.size("height");
  m.width = in.size("width");
  if (static_cast<double>(m.batch) * static_cast<double>(m.channels) * static_cast<double>(m.height) *
          static_cast<double>(m.width) >
      kMaxValues)
    in.fail("batch", "a batch of images of at most 2^31 values");
  m.grid = in.pair("grid");
  m.classes = in.size("classes");
  m.predicts = in.flag("predicts");
  if (in.find("class_names") != nullptr) m.class_names = in.texts("class_names");
  if (!m.class_names.empty() && static_cast<int64_t>(m.class_names.size()) != m.classes)
    in.fail("class_names", std::to_string(m.classes) + " names");
  m.targets_given = in.one_of("target_mode", {"predicted", "given"}) == "given";
  m.gated_blocks = in.wholes("gated_blocks", 0);
  if (in.find("preprocessing") != nullptr) m.preprocess = read_preprocess(in.inner("preprocessing"), m);
  read_outputs(in, m);
  m.backend = in.find("backend") == nullptr ? "native" : in.one_of("backend", {"native", "triton", "composite"});
  if (in.find("machine") != nullptr) {
    const Reader machine = in.inner("machine");
    m.architecture = machine.text("architecture");
    m.features = machine.texts("features");
  }
  if (in.find("method") != nullptr) m.method = in.text("method");
  if (in.find("backward") != nullptr) m.backward = in.text("backward");
  if (in.find("sha256") != nullptr) m.sha256 = in.text("sha256");
  if (in.find("versions") == nullptr) return;
  const Reader versions = in.inner("versions");
  for (const auto& [name, value] : versions.all())
    if (const auto* version = value.as<std::string>()) m.versions[name] = *version;
}

}  // namespace

Metadata Metadata::read(const std::string& json_path) {
  const std::string text = content_of(json_path);
  Json json;
  try {
    json = parse_json(text);
  } catch (const Error& error) {
    throw Error("package: " + json_path + ": " + error.what());
  }
  Metadata metadata;
  read_entries(Reader(json, json_path), metadata);
  return metadata;
}

}  // namespace fga
