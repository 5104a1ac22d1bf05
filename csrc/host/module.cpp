// fastseq._host: numpy in and out, no tensors. The public functions, which check their arguments and have a
// Python twin for where this module is not built, are in fastseq/host.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "common/cpu_features.h"
#include "host/buckets.h"
#include "host/extended_vocabulary.h"

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

// A batch of lists of strings, as views. It holds the strings itself: while the GIL is released, other
// threads may change the lists. Python's fastseq/host.py says what is wrong where this throws.
struct Tokens {
  fastseq::Sequences sequences;
  std::vector<py::tuple> rows;

  explicit Tokens(const py::sequence& batch) {
    for (py::handle row : batch) {
      if (!PyList_Check(row.ptr()) && !PyTuple_Check(row.ptr())) throw py::type_error("not a list of tokens");
      auto held = py::reinterpret_steal<py::tuple>(PySequence_Tuple(row.ptr()));
      if (!held) throw py::error_already_set();
      for (py::handle token : held) {
        Py_ssize_t size = 0;
        const char* data = PyUnicode_AsUTF8AndSize(token.ptr(), &size);
        if (data == nullptr) throw py::error_already_set();
        sequences.tokens.emplace_back(data, size_t(size));
      }
      sequences.offsets.push_back(int64_t(sequences.tokens.size()));
      rows.push_back(std::move(held));
    }
  }

  // An array for a number of each token, filled with what stands where there is none.
  py::array_t<int64_t> array(int64_t padding) const {
    py::array_t<int64_t> out({sequences.count(), sequences.longest()});
    std::fill_n(out.mutable_data(), out.size(), padding);
    return out;
  }

  py::array_t<int64_t> lengths() const {
    py::array_t<int64_t> out(sequences.count());
    for (int64_t i = 0; i < sequences.count(); ++i)
      out.mutable_data()[i] = sequences.offsets[i + 1] - sequences.offsets[i];
    return out;
  }
};

py::tuple encode_sources(const fastseq::ExtendedVocabulary& vocabulary, const py::sequence& sources,
                         int64_t padding, int64_t absent) {
  const Tokens tokens(sources);
  py::array_t<int64_t> ids = tokens.array(padding), extended = tokens.array(absent);
  std::vector<std::vector<int64_t>> places;
  {
    int64_t *to_ids = ids.mutable_data(), *to_extended = extended.mutable_data();
    py::gil_scoped_release release;
    places = vocabulary.encode_sources(tokens.sequences, to_ids, to_extended);
  }
  py::list oov;
  for (size_t row = 0; row < places.size(); ++row) {
    py::list words;
    for (int64_t place : places[row]) words.append(tokens.rows[row][place - tokens.sequences.offsets[row]]);
    oov.append(std::move(words));
  }
  return py::make_tuple(ids, extended, tokens.lengths(), oov);
}

py::tuple encode_targets(const fastseq::ExtendedVocabulary& vocabulary, const py::sequence& targets,
                         const py::sequence& oov, int64_t padding, int64_t absent) {
  const Tokens tokens(targets), known(oov);
  py::array_t<int64_t> ids = tokens.array(padding), extended = tokens.array(absent);
  {
    int64_t *to_ids = ids.mutable_data(), *to_extended = extended.mutable_data();
    py::gil_scoped_release release;
    vocabulary.encode_targets(tokens.sequences, known.sequences, to_ids, to_extended);
  }
  return py::make_tuple(ids, extended, tokens.lengths());
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Compiled helpers on the host side; see fastseq/host.py.";
  m.def("cpu_features", &cpu_features);
  m.def("build_record", &build_record);
  m.def("bucket_plan", &bucket_plan, py::arg("lengths"), py::arg("batch_size"), py::arg("max_tokens"),
        py::arg("seed"), py::arg("drop_last"), py::arg("window"));
  py::class_<fastseq::ExtendedVocabulary>(m, "ExtendedVocabulary")
      .def(py::init<std::vector<std::string>, int64_t>(), py::arg("words"), py::arg("unknown"))
      .def("encode_sources", &encode_sources, py::arg("sources"), py::arg("padding"), py::arg("absent"))
      .def("encode_targets", &encode_targets, py::arg("targets"), py::arg("oov"), py::arg("padding"),
           py::arg("absent"));
}
