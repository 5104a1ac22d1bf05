// fastseq._host: numpy in and out, no tensors. The public functions, which check their arguments and have a
// Python twin for where this module is not built, are in fastseq/host.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/cpu_features.h"
#include "host/buckets.h"

namespace py = pybind11;

namespace {

using Lengths = py::array_t<int64_t, py::array::c_style>;

py::dict cpu_features() {
  py::dict out;
  out["model"] = fastseq::cpu_model();
  out["features"] = fastseq::cpu_features();
  out["isa"] = fastseq::name(fastseq::best_isa());
  return out;
}

py::dict build_record() {
  py::dict out;
  out["compiler"] = __VERSION__;
  out["cxx_standard"] = __cplusplus / 100 % 100;
  out["pybind11"] = PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_MINOR);
  return out;
}

py::tuple bucket_plan(const Lengths& lengths, int64_t batch_size, int64_t max_tokens, uint64_t seed,
                      bool drop_last, int64_t window) {
  fastseq::Plan plan;
  {
    const int64_t* data = lengths.data();
    const int64_t n = lengths.size();
    py::gil_scoped_release release;
    plan = fastseq::bucket_plan(data, n, batch_size, max_tokens, seed, drop_last, window);
  }
  return py::make_tuple(py::array_t<int64_t>(plan.order.size(), plan.order.data()),
                        py::array_t<int64_t>(plan.offsets.size(), plan.offsets.data()));
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Compiled helpers on the host side; see fastseq/host.py.";
  m.def("cpu_features", &cpu_features);
  m.def("build_record", &build_record);
  m.def("bucket_plan", &bucket_plan, py::arg("lengths"), py::arg("batch_size"), py::arg("max_tokens"),
        py::arg("seed"), py::arg("drop_last"), py::arg("window"));
}
