// The module fga_runtime: the C++ session for Python. It uses NumPy arrays and imports neither fga_fast nor torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <fga_fast/session.h>

#include "text.h"

namespace py = pybind11;

namespace {

using Floats = py::array_t<float, py::array::c_style>;
using Doubles = py::array_t<double, py::array::c_style>;
using Bytes = py::array_t<uint8_t, py::array::c_style>;

py::array array_of(const fga::Array& array, bool wide) {
  const std::vector<py::ssize_t> shape(array.shape.begin(), array.shape.end());
  if (wide) return Doubles(shape, array.values.data());
  Floats narrow(shape);
  std::copy(array.values.begin(), array.values.end(), narrow.mutable_data());
  return narrow;
}

py::dict by_block(const std::map<int64_t, fga::Array>& blocks, bool wide) {
  py::dict out;
  for (const auto& [block, array] : blocks) out[py::int_(block)] = array_of(array, wide);
  return out;
}

fga::Picture picture_of(const uint8_t* pixels, const py::ssize_t* shape) {
  return {pixels, shape[0], shape[1], shape[2], 0};
}

// The images for the session, and the arrays that own their memory.
struct Batch {
  std::vector<py::object> owners;
  fga::Images images;
};

Batch batch_of_pictures(const std::vector<py::array>& arrays) {
  Batch batch;
  std::vector<fga::Picture> pictures;
  for (const py::array& array : arrays) {
    if (!py::isinstance<py::array_t<uint8_t>>(array) || array.ndim() != 3)
      throw fga::Error("images: expected pictures [H, W, 3] or [H, W, 1] of uint8");
    const Bytes bytes(array);
    pictures.push_back(picture_of(bytes.data(), bytes.shape()));
    batch.owners.push_back(bytes);
  }
  batch.images = fga::Images::pictures(std::move(pictures));
  return batch;
}

template <class Contiguous>
Batch batch_of_values(const Contiguous& values) {
  const std::vector<int64_t> shape(values.shape(), values.shape() + values.ndim());
  if (shape.size() != 4)
    throw fga::Error("images: expected shape [B, C, H, W], got " + fga::shown(shape) +
                     (shape.size() == 3 ? "; add a batch dimension with images[None]" : ""));
  return {{values}, fga::Images::normalised(values.data(), {shape[0], shape[1], shape[2], shape[3]})};
}

Batch batch_of(const py::object& images) {
  if (!py::isinstance<py::array>(images)) return batch_of_pictures(images.cast<std::vector<py::array>>());
  const auto array = images.cast<py::array>();
  if (py::isinstance<py::array_t<float>>(array)) return batch_of_values(Floats(array));
  if (py::isinstance<py::array_t<double>>(array)) return batch_of_values(Doubles(array));
  if (!py::isinstance<py::array_t<uint8_t>>(array))
    throw py::type_error("images: expected uint8 [B, H, W, 3] or float [B, C, H, W], got " +
                         py::str(array.dtype()).cast<std::string>());
  if (array.ndim() == 3) return batch_of_pictures({array});
  std::vector<py::array> pictures;
  if (array.ndim() == 4)
    for (py::ssize_t i = 0; i < array.shape(0); ++i) pictures.push_back(array[py::int_(i)].cast<py::array>());
  else
    throw fga::Error("images: expected uint8 [B, H, W, 3] or [H, W, 3], got " + std::to_string(array.ndim()) +
                     " dimensions");
  return batch_of_pictures(pictures);
}

fga::Result explain(const fga::Session& session, const py::object& images, const py::object& targets) {
  const Batch batch = batch_of(images);
  std::optional<std::vector<int64_t>> classes;
  if (py::isinstance<py::int_>(targets))
    classes = {targets.cast<int64_t>()};
  else if (!targets.is_none())
    classes = targets.cast<std::vector<int64_t>>();
  const py::gil_scoped_release release;
  return session.explain(batch.images, classes);
}

py::array heatmap(const fga::Result& result, const std::optional<std::array<int64_t, 2>>& size) {
  if (size && std::min((*size)[0], (*size)[1]) < 1) throw fga::Error("size: expected at least 1 pixel a side");
  const fga::Heatmaps maps = size ? result.heatmap((*size)[0], (*size)[1]) : result.heatmap();
  return Floats(std::vector<py::ssize_t>(maps.shape.begin(), maps.shape.end()), maps.values.data());
}

void bind_result(py::module_& m) {
  using fga::Result;
  const auto wide = [](const Result& r) { return r.dtype == "float64"; };
  py::class_<Result>(m, "Result", "NumPy arrays; names as in fga_fast.Explanation.")
      .def_property_readonly("logits", [wide](const Result& r) { return array_of(r.logits, wide(r)); })
      .def_property_readonly("relevance", [wide](const Result& r) { return array_of(r.relevance, wide(r)); })
      .def_property_readonly("scores", [wide](const Result& r) { return by_block(r.scores, wide(r)); })
      .def_property_readonly("gates", [wide](const Result& r) { return by_block(r.gates, wide(r)); })
      .def_property_readonly("more",
                             [](const Result& r) {
                               py::dict out;  // float64 represents the values of every dtype
                               for (const auto& [name, array] : r.more) out[py::str(name)] = array_of(array, true);
                               return out;
                             })
      .def_property_readonly("targets",
                             [](const Result& r) { return py::array(py::cast(r.targets)).attr("astype")("int64"); })
      .def_property_readonly(
          "values",
          [wide](const Result& r) { return array_of({{static_cast<int64_t>(r.values.size())}, r.values}, wide(r)); })
      .def_property_readonly("grid", [](const Result& r) { return py::make_tuple(r.grid[0], r.grid[1]); })
      .def_property_readonly("image_size",
                             [](const Result& r) { return py::make_tuple(r.image_size[0], r.image_size[1]); })
      .def("heatmap", &heatmap, py::arg("size") = py::none(), "[B, H, W] float32 in [0,1]; None: the input's size.");
}

void bind_preprocess(py::module_& m) {
  using fga::Preprocess;
  const auto picture = [](const Bytes& image) {
    if (image.ndim() != 3) throw fga::Error("images: expected pictures [H, W, 3] or [H, W, 1] of uint8");
    return picture_of(image.data(), image.shape());
  };
  py::class_<Preprocess>(m, "Preprocess", "fga_fast.io.images.Preprocess on arrays.")
      .def(py::init([](std::array<int64_t, 2> size, std::vector<double> mean, std::vector<double> std, double crop_pct,
                       std::string interpolation, bool squash) {
             Preprocess p{size, std::move(mean), std::move(std), crop_pct, std::move(interpolation), squash};
             p.check();
             return p;
           }),
           py::arg("image_size"), py::arg("mean"), py::arg("std"), py::arg("crop_pct") = 1.0,
           py::arg("interpolation") = "bicubic", py::arg("squash") = false)
      .def("view",
           [picture](const Preprocess& p, const Bytes& image) {
             const auto pixels = p.view(picture(image));
             return Bytes({p.image_size[0], p.image_size[1], static_cast<int64_t>(p.mean.size())}, pixels.data());
           })
      .def("__call__", [picture](const Preprocess& p, const Bytes& image) {
        Floats out({static_cast<int64_t>(p.mean.size()), p.image_size[0], p.image_size[1]});
        p.write(picture(image), out.mutable_data());
        return out;
      });
}

// If fga_fast is loaded, use its operators: registering them twice would crash the process.
void load_ops_of_package() {
  if (py::module_::import("sys").attr("modules").contains("fga_fast"))
    py::module_::import("fga_fast.ops").attr("load")();
}

}  // namespace

PYBIND11_MODULE(fga_runtime, m) {
  m.doc() = "The C++ session of fga_fast: explains images by an exported package.";
  py::register_exception<fga::Error>(m, "Error", PyExc_ValueError);
  bind_result(m);
  bind_preprocess(m);
  using fga::Session;
  py::class_<Session>(m, "Session")
      .def(py::init([](const std::filesystem::path& path, const std::string& ops_library, int device_index, int runners,
                       bool verify) {
             load_ops_of_package();
             const py::gil_scoped_release release;
             return std::make_unique<Session>(path.string(), fga::Options{ops_library, device_index, runners, verify});
           }),
           py::arg("path"), py::kw_only(), py::arg("ops_library") = "", py::arg("device_index") = -1,
           py::arg("runners") = 1, py::arg("verify") = true)
      .def("explain", &explain, py::arg("images"), py::arg("targets") = py::none(),
           "images: uint8 [B, H, W, 3], [H, W, 3] or a list of [H, W, 3] of any sizes; or normalised floats "
           "[B, C, H, W]. targets: one class, or one for each image, for packages that take them; -1: the predicted "
           "one.")
      .def_property_readonly("batch", [](const Session& s) { return s.metadata().batch; })
      .def_property_readonly("gated_blocks", [](const Session& s) { return s.metadata().gated_blocks; })
      .def_property_readonly("class_names", [](const Session& s) { return s.metadata().class_names; })
      .def_property_readonly("takes_targets", [](const Session& s) { return s.metadata().targets_given; });
}
