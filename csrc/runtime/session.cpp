// Runs the compiled model: cuts images into batches, runs them, checks the outputs and joins them.
#include <fga_fast/session.h>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/version.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <filesystem>
#include <mutex>
#include <utility>

#include "library.h"
#include "machine.h"
#include "sha256.h"
#include "text.h"

namespace fga {
namespace {

constexpr uintptr_t kAlignment = 64;  // that of torch's own allocators; compiled models may rely on it

at::ScalarType type_of(const std::string& dtype) {
  if (dtype == "float32") return at::kFloat;
  if (dtype == "float64") return at::kDouble;
  return dtype == "int64" ? at::kLong : at::kBFloat16;
}

std::string name_of(at::ScalarType type) {
  for (const char* name : {"float32", "float64", "int64", "bfloat16"})
    if (type_of(name) == type) return name;
  return toString(type);
}

std::string json_beside(const std::string& path) {
  const std::filesystem::path package(path);
  if (package.extension() != ".pt2") throw Error("package: expected a file ending in .pt2, got " + path);
  if (!std::filesystem::is_regular_file(package)) throw Error("package: no file " + path);
  return std::filesystem::path(package).replace_extension(".json");
}

// Calls f, which calls torch, and turns its exceptions into Error.
template <class F>
auto calling_torch(const std::string& what, const F& f) {
  try {
    return f();
  } catch (const Error&) {
    throw;
  } catch (const c10::Error& error) {
    throw Error(what + ": " + error.what_without_backtrace());
  } catch (const std::exception& error) {
    throw Error(what + ": " + error.what());
  }
}

template <class T>
bool all_finite(const T* values, size_t count) {
  return std::all_of(values, values + count, [](T x) { return std::isfinite(x); });
}

// Triton kernels exist only in the Python package. On CUDA the native backend scores SAEs with them.
void check_backend(const Metadata& metadata, bool cuda) {
  if (metadata.backend == "triton" || (cuda && metadata.backend == "native" && !metadata.gated_blocks.empty()))
    throw Error("package: calls Triton kernels, which need Python; export it with backend=\"composite\"");
}

template <class T>
void append(std::vector<T>& values, const at::Tensor& tensor) {
  const at::Tensor host = tensor.to(at::kCPU, c10::CppTypeToScalarType<T>::value).contiguous();
  const T* found = host.const_data_ptr<T>();
  values.insert(values.end(), found, found + host.numel());
}

// Writes a batch that begins with image `first`; copies nothing but the numbers, where they are T on the host already.
template <class T>
void copy_to(T* out, int64_t first, const at::Tensor& tensor) {
  const at::Tensor host = tensor.to(at::kCPU, c10::CppTypeToScalarType<T>::value).contiguous();
  std::copy_n(host.const_data_ptr<T>(), host.numel(), out + first * (host.numel() / host.size(0)));
}

}  // namespace

struct Session::State {
  Metadata metadata;
  c10::Device device = c10::kCPU;
  std::unique_ptr<torch::inductor::AOTIModelPackageLoader> loader;
  mutable std::mutex first_call;
  mutable std::atomic<bool> called{false};

  void check(const Images& images, const std::optional<std::vector<int64_t>>& targets) const;
  at::Tensor values_of(const Images& images, int64_t first, int64_t count) const;
  at::Tensor input_of(const Images& images, int64_t first, int64_t count) const;
  at::Tensor targets_of(const std::vector<int64_t>& targets, int64_t first, int64_t count) const;
  std::vector<at::Tensor> run(const std::vector<at::Tensor>& inputs) const;
  Array& array_of(Result& result, const std::string& name) const;
  Result empty(int64_t count) const;
  void check_finite(bool logits, bool relevance, const Images& images) const;
  template <class Take>
  void run_all(const Images& images, const std::optional<std::vector<int64_t>>& targets, const Take& take) const;
};

// Checks images and targets before anything runs.
void Session::State::check(const Images& images, const std::optional<std::vector<int64_t>>& targets) const {
  const Metadata& m = metadata;
  const std::vector<int64_t> shape(images.shape.begin(), images.shape.end());
  if (images.values != nullptr && (shape[1] != m.channels || shape[2] != m.height || shape[3] != m.width))
    throw Error("images: expected shape [B, " + std::to_string(m.channels) + ", " + std::to_string(m.height) + ", " +
                std::to_string(m.width) + "], got " + shown(shape));
  if (images.memory == Memory::device && device.is_cpu())
    throw Error(
        "images: expected host memory, as the package runs on cpu, got device memory; copy the images to the host, or "
        "export the package from a model on cuda");
  if (images.values == nullptr && !images.list.empty() && !m.preprocess)
    throw Error(
        "images: the package has no preprocessing, so it cannot take uint8 pictures; pass normalised floats "
        "[B, C, H, W], or export it with preprocessing");
  if (targets.has_value() && !m.targets_given)
    throw Error("targets: this package explains the predicted class; make one with target_mode=\"given\" to choose");
  const bool predicted = !targets || std::count(targets->begin(), targets->end(), -1) > 0;
  if (predicted && !m.predicts)
    throw Error("targets: the package is of a model without a classification head; give a feature's number");
  if (!targets) return;
  if (targets->size() != 1 && static_cast<int64_t>(targets->size()) != images.size())
    throw Error("targets: expected one class an image, shape [" + std::to_string(images.size()) + "], got " +
                shown({static_cast<int64_t>(targets->size())}));
  for (const int64_t target : *targets)
    if (target < -1 || target >= m.classes)
      throw Error("targets: expected classes 0 to " + std::to_string(m.classes - 1) +
                  ", or -1 for the predicted one, got " + std::to_string(target));
}

// [count, channels, height, width] on the host or the device, in the dtype of the caller.
at::Tensor Session::State::values_of(const Images& images, int64_t first, int64_t count) const {
  const Metadata& m = metadata;
  const int64_t each = m.channels * m.height * m.width;
  if (images.values == nullptr) {
    at::Tensor values = at::empty({count, m.channels, m.height, m.width}, at::kFloat);
    auto* out = values.mutable_data_ptr<float>();
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) m.preprocess->write(images.list[first + i], out + i * each);
    });
    return values;
  }
  const auto type = images.is_double ? at::kDouble : at::kFloat;
  const auto* bytes = static_cast<const char*>(images.values) + first * each * static_cast<int64_t>(elementSize(type));
  const auto where = images.memory == Memory::device ? device : c10::Device(c10::kCPU);
  // from_blob takes no const memory; nothing here writes to it.
  return at::from_blob(const_cast<char*>(bytes), {count, m.channels, m.height, m.width},
                       at::TensorOptions().dtype(type).device(where));
}

// One batch for the compiled model. Repeats the last image to fill a short batch, because some models divide by zero on
// images of zeros.
at::Tensor Session::State::input_of(const Images& images, int64_t first, int64_t count) const {
  at::Tensor input = values_of(images, first, count).to(device, type_of(metadata.dtype));
  if (count < metadata.batch) {
    const at::Tensor last = input.slice(0, count - 1, count);
    input = at::cat({input, last.expand({metadata.batch - count, -1, -1, -1})});
  }
  if (reinterpret_cast<uintptr_t>(input.const_data_ptr()) % kAlignment != 0) input = input.clone();
  return input.contiguous();
}

at::Tensor Session::State::targets_of(const std::vector<int64_t>& targets, int64_t first, int64_t count) const {
  at::Tensor batch = at::empty({metadata.batch}, at::kLong);
  auto* out = batch.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < metadata.batch; ++i)
    out[i] = targets.size() == 1 ? targets[0] : targets[first + std::min(i, count - 1)];
  return batch.to(device);
}

std::vector<at::Tensor> Session::State::run(const std::vector<at::Tensor>& inputs) const {
  // torch's container folds constants in its first call. Threads that all begin with a first call can wait for each
  // other for ever, so the first one is made alone.
  std::unique_lock<std::mutex> alone(first_call, std::defer_lock);
  if (!called) alone.lock();
  const std::vector<at::Tensor> found = loader->run(inputs);
  called = true;
  if (found.size() != metadata.outputs.size())
    throw Error("package: expected " + std::to_string(metadata.outputs.size()) + " outputs, got " +
                std::to_string(found.size()));
  for (size_t i = 0; i < found.size(); ++i) {
    const Metadata::Output& output = metadata.outputs[i];
    if (found[i].sizes().vec() != output.shape || found[i].scalar_type() != type_of(output.dtype))
      throw Error("package: expected " + output.name + " of shape " + shown(output.shape) + " and dtype " +
                  output.dtype + ", got " + shown(found[i].sizes().vec()) + " and " + name_of(found[i].scalar_type()));
  }
  return found;
}

Array& Session::State::array_of(Result& result, const std::string& name) const {
  if (name == "logits") return result.logits;
  if (name == "relevance") return result.relevance;
  for (const int64_t block : metadata.gated_blocks) {
    if (name == "scores." + std::to_string(block)) return result.scores[block];
    if (name == "gates." + std::to_string(block)) return result.gates[block];
  }
  return result.more[name];
}

Result Session::State::empty(int64_t count) const {
  Result result;
  result.grid = metadata.grid;
  result.image_size = {metadata.height, metadata.width};
  result.dtype = metadata.dtype == "float64" ? "float64" : "float32";
  for (const Metadata::Output& output : metadata.outputs)
    if (output.name != "targets" && output.name != "values") {
      Array& array = array_of(result, output.name);
      array.shape = output.shape;
      array.shape[0] = count;
    }
  return result;
}

// Like Python, looks only at the outputs unless something is wrong.
void Session::State::check_finite(bool logits, bool relevance, const Images& images) const {
  if (logits && relevance) return;
  if (images.values != nullptr) {
    const at::Tensor values = values_of(images, 0, images.size());
    if (!at::isfinite(values).all().item<bool>()) throw Error("images: contain NaN or Inf; check the preprocessing");
  }
  throw Error(std::string(logits ? "the relevance" : "the logits") +
              " came out NaN or Inf although images are finite: an overflow in " + metadata.dtype +
              ", or NaN or Inf in the package's weights; export the model in a wider dtype");
}

Session::Session(const std::string& path, const Options& options) : state_(std::make_unique<State>()) {
  State& s = *state_;
  s.metadata = Metadata::read(json_beside(path));
  if (options.runners < 1) throw Error("runners: expected at least 1, got " + std::to_string(options.runners));
  if (options.verify && !s.metadata.sha256.empty() && sha256_of_file(path) != s.metadata.sha256)
    throw Error("package: " + path + " is not the file that its metadata was written for (sha256); export it again");
  check_machine(s.metadata);
  const bool cuda = s.metadata.device == "cuda";
  check_backend(s.metadata, cuda);
  load_torch(cuda);
  if (s.metadata.backend == "native") load_ops(options.ops_library, cuda);
  const auto made_by = s.metadata.versions.find("torch");
  const std::string version = made_by == s.metadata.versions.end() ? "another version" : made_by->second;
  calling_torch("package: " + path + " does not load in torch " TORCH_VERSION " (made by " + version + ")", [&] {
    const auto index = static_cast<c10::DeviceIndex>(options.device_index);
    if (cuda) {
      const c10::impl::VirtualGuardImpl devices(c10::kCUDA);
      if (devices.deviceCount() == 0)
        throw Error("package: " + path +
                    " was exported for cuda, but torch sees no CUDA device; export one on the CPU");
      if (options.device_index >= devices.deviceCount())
        throw Error("device_index: expected one of " + std::to_string(devices.deviceCount()) + " CUDA devices, got " +
                    std::to_string(options.device_index));
      s.device = index >= 0 ? c10::Device(c10::kCUDA, index) : devices.getDevice();
    }
    const c10::OptionalDeviceGuard guard(cuda ? std::optional(s.device) : std::nullopt);
    s.loader = std::make_unique<torch::inductor::AOTIModelPackageLoader>(
        path, "model", false, static_cast<size_t>(options.runners), cuda ? s.device.index() : c10::DeviceIndex{-1});
  });
}

Session::~Session() = default;
Session::Session(Session&&) noexcept = default;
Session& Session::operator=(Session&&) noexcept = default;

const Metadata& Session::metadata() const {
  return state_->metadata;
}

// Calls take(first, name, tensor) with each output of each batch: the first image in it, and [count, ...] of the images
// alone.
template <class Take>
void Session::State::run_all(const Images& images, const std::optional<std::vector<int64_t>>& targets,
                             const Take& take) const {
  check(images, targets);
  calling_torch("explain", [&] {
    // No autograd: the compiled graph computes the gradients.
    const c10::InferenceMode inference;
    const c10::OptionalDeviceGuard guard(device.is_cpu() ? std::nullopt : std::optional(device));
    for (int64_t first = 0; first < images.size(); first += metadata.batch) {
      const int64_t count = std::min(metadata.batch, images.size() - first);
      std::vector<at::Tensor> inputs = {input_of(images, first, count)};
      if (metadata.targets_given)
        inputs.push_back(targets_of(targets.value_or(std::vector<int64_t>{-1}), first, count));
      const std::vector<at::Tensor> outputs = run(inputs);
      for (size_t i = 0; i < outputs.size(); ++i) take(first, metadata.outputs[i].name, outputs[i].slice(0, 0, count));
    }
  });
}

Result Session::explain(const Images& images, const std::optional<std::vector<int64_t>>& targets) const {
  const State& s = *state_;
  Result result = s.empty(images.size());
  s.run_all(images, targets, [&](int64_t, const std::string& name, const at::Tensor& found) {
    if (name == "targets")
      append(result.targets, found);
    else
      append(name == "values" ? result.values : s.array_of(result, name).values, found);
  });
  const auto finite = [](const Array& array) { return all_finite(array.values.data(), array.values.size()); };
  calling_torch("explain", [&] { s.check_finite(finite(result.logits), finite(result.relevance), images); });
  return result;
}

void Session::explain_into(const Buffers& buffers, const Images& images,
                           const std::optional<std::vector<int64_t>>& targets) const {
  const State& s = *state_;
  s.run_all(images, targets, [&](int64_t first, const std::string& name, const at::Tensor& found) {
    if (name == "relevance" && buffers.relevance != nullptr) copy_to(buffers.relevance, first, found);
    if (name == "logits" && buffers.logits != nullptr) copy_to(buffers.logits, first, found);
    if (name == "targets" && buffers.targets != nullptr) copy_to(buffers.targets, first, found);
  });
  const auto finite = [&](const float* values, int64_t each) {
    return values == nullptr || all_finite(values, static_cast<size_t>(images.size() * each));
  };
  calling_torch("explain", [&] {
    s.check_finite(finite(buffers.logits, s.metadata.classes), finite(buffers.relevance, s.metadata.patches()), images);
  });
}

}  // namespace fga
