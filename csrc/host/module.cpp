// fastseq._host: lists of strings and bytes in, bytearrays of 64-bit integers out. It keeps to Python's
// stable ABI, so that one build serves every CPython from 3.10 on. fastseq/_host_compiled.py makes arrays of
// the bytes; the public functions, which check their arguments, are in fastseq/host.py.
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030a0000
#include <Python.h>

#include <algorithm>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "common/cpu_features.h"
#include "host/buckets.h"
#include "host/extended_vocabulary.h"

namespace {

constexpr const char* kVocabulary = "fastseq.ExtendedVocabulary";

struct Release {
  void operator()(PyObject* object) const { Py_DECREF(object); }
};
using Object = std::unique_ptr<PyObject, Release>;

// What a Python function throws where Python's error is set already.
struct PythonError {};

Object checked(PyObject* object) {
  if (object == nullptr) throw PythonError();
  return Object(object);
}

// No C++ exception may reach Python.
template <class Function>
PyObject* guarded(const Function& function) noexcept {
  try {
    return function().release();
  } catch (const PythonError&) {
    return nullptr;
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
}

// Runs it without the GIL.
template <class Function>
void released(const Function& function) {
  struct Gil {
    PyThreadState* state = PyEval_SaveThread();
    ~Gil() { PyEval_RestoreThread(state); }
  } gil;
  function();
}

// An array of count numbers, for numpy.frombuffer.
struct Numbers {
  Object bytes;

  explicit Numbers(int64_t count)
      : bytes(checked(PyByteArray_FromStringAndSize(nullptr, Py_ssize_t(count * sizeof(int64_t))))) {}
  Numbers(int64_t count, int64_t value) : Numbers(count) { std::fill_n(data(), count, value); }
  explicit Numbers(const std::vector<int64_t>& values) : Numbers(int64_t(values.size())) {
    std::copy(values.begin(), values.end(), data());
  }
  int64_t* data() const { return reinterpret_cast<int64_t*>(PyByteArray_AsString(bytes.get())); }
};

// A batch of lists of strings, as views. It holds the strings itself: while the GIL is released, other
// threads may change the lists.
struct Tokens {
  fastseq::Sequences sequences;
  std::vector<Object> rows;

  explicit Tokens(PyObject* batch) {
    const Object lists = checked(PySequence_Tuple(batch));
    for (Py_ssize_t i = 0; i < PyTuple_Size(lists.get()); ++i) add(PyTuple_GetItem(lists.get(), i));
  }

  void add(PyObject* list) {
    if (!PyList_Check(list) && !PyTuple_Check(list)) {
      PyErr_SetString(PyExc_TypeError, "not a list of tokens");
      throw PythonError();
    }
    Object row = checked(PySequence_Tuple(list));
    const Py_ssize_t count = PyTuple_Size(row.get());
    for (Py_ssize_t i = 0; i < count; ++i) {
      Py_ssize_t size = 0;
      const char* text = PyUnicode_AsUTF8AndSize(PyTuple_GetItem(row.get(), i), &size);
      if (text == nullptr) throw PythonError();
      sequences.tokens.emplace_back(text, size_t(size));
    }
    sequences.offsets.push_back(int64_t(sequences.tokens.size()));
    rows.push_back(std::move(row));
  }

  // Room for a number of each token, filled with what stands where there is none.
  Numbers padded(int64_t padding) const { return {sequences.count() * sequences.longest(), padding}; }

  Numbers lengths() const {
    Numbers out(sequences.count());
    for (int64_t i = 0; i < sequences.count(); ++i)
      out.data()[i] = sequences.offsets[i + 1] - sequences.offsets[i];
    return out;
  }

  // The tokens at these places of the sequence, as a list.
  Object words(int64_t sequence, const std::vector<int64_t>& places) const {
    Object out = checked(PyList_New(0));
    for (int64_t place : places) {
      PyObject* word = PyTuple_GetItem(rows[sequence].get(), place - sequences.offsets[sequence]);
      if (PyList_Append(out.get(), word) != 0) throw PythonError();
    }
    return out;
  }
};

PyObject* cpu_features(PyObject*, PyObject*) {
  return guarded([] {
    Object features = checked(PyList_New(0));
    for (const std::string& feature : fastseq::cpu_features())
      if (PyList_Append(features.get(), checked(PyUnicode_FromString(feature.c_str())).get()) != 0)
        throw PythonError();
    return checked(Py_BuildValue("{s:s,s:O,s:s}", "model", fastseq::cpu_model().c_str(), "features",
                                 features.get(), "isa", fastseq::name(fastseq::best_isa())));
  });
}

PyObject* bucket_plan(PyObject*, PyObject* arguments) {
  return guarded([&] {
    const char* lengths;
    Py_ssize_t bytes;
    long long batch_size, max_tokens, window;
    unsigned long long seed;
    int drop_last;
    if (!PyArg_ParseTuple(arguments, "y#LLKpL", &lengths, &bytes, &batch_size, &max_tokens, &seed, &drop_last,
                          &window))
      throw PythonError();
    fastseq::Plan plan;
    released([&] {
      plan =
          fastseq::bucket_plan(reinterpret_cast<const int64_t*>(lengths), bytes / Py_ssize_t(sizeof(int64_t)),
                               batch_size, max_tokens, seed, drop_last != 0, window);
    });
    const Numbers order(plan.order), offsets(plan.offsets);
    return checked(PyTuple_Pack(2, order.bytes.get(), offsets.bytes.get()));
  });
}

void delete_vocabulary(PyObject* capsule) {
  delete static_cast<fastseq::ExtendedVocabulary*>(PyCapsule_GetPointer(capsule, kVocabulary));
}

PyObject* make_vocabulary(PyObject*, PyObject* arguments) {
  return guarded([&] {
    PyObject* words;
    long long unknown;
    if (!PyArg_ParseTuple(arguments, "OL", &words, &unknown)) throw PythonError();
    Tokens tokens(checked(PyTuple_Pack(1, words)).get());
    const auto& views = tokens.sequences.tokens;
    auto made = std::make_unique<fastseq::ExtendedVocabulary>(
        std::vector<std::string>(views.begin(), views.end()), unknown);
    Object capsule = checked(PyCapsule_New(made.get(), kVocabulary, delete_vocabulary));
    made.release();
    return capsule;
  });
}

const fastseq::ExtendedVocabulary& vocabulary_in(PyObject* capsule) {
  const void* found = PyCapsule_GetPointer(capsule, kVocabulary);
  if (found == nullptr) throw PythonError();
  return *static_cast<const fastseq::ExtendedVocabulary*>(found);
}

PyObject* encode_sources(PyObject*, PyObject* arguments) {
  return guarded([&] {
    PyObject *capsule, *sources;
    long long padding, absent;
    if (!PyArg_ParseTuple(arguments, "OOLL", &capsule, &sources, &padding, &absent)) throw PythonError();
    const fastseq::ExtendedVocabulary& vocabulary = vocabulary_in(capsule);
    const Tokens tokens(sources);
    const Numbers ids = tokens.padded(padding), extended = tokens.padded(absent), lengths = tokens.lengths();
    std::vector<std::vector<int64_t>> places;
    released([&] { places = vocabulary.encode_sources(tokens.sequences, ids.data(), extended.data()); });
    const Object oov = checked(PyList_New(0));
    for (size_t row = 0; row < places.size(); ++row)
      if (PyList_Append(oov.get(), tokens.words(int64_t(row), places[row]).get()) != 0) throw PythonError();
    return checked(PyTuple_Pack(4, ids.bytes.get(), extended.bytes.get(), lengths.bytes.get(), oov.get()));
  });
}

PyObject* encode_targets(PyObject*, PyObject* arguments) {
  return guarded([&] {
    PyObject *capsule, *targets, *oov;
    long long padding, absent;
    if (!PyArg_ParseTuple(arguments, "OOOLL", &capsule, &targets, &oov, &padding, &absent))
      throw PythonError();
    const fastseq::ExtendedVocabulary& vocabulary = vocabulary_in(capsule);
    const Tokens tokens(targets), known(oov);
    const Numbers ids = tokens.padded(padding), extended = tokens.padded(absent), lengths = tokens.lengths();
    released(
        [&] { vocabulary.encode_targets(tokens.sequences, known.sequences, ids.data(), extended.data()); });
    return checked(PyTuple_Pack(3, ids.bytes.get(), extended.bytes.get(), lengths.bytes.get()));
  });
}

PyMethodDef methods[] = {
    {"cpu_features", cpu_features, METH_NOARGS, nullptr},
    {"bucket_plan", bucket_plan, METH_VARARGS, nullptr},
    {"make_vocabulary", make_vocabulary, METH_VARARGS, nullptr},
    {"encode_sources", encode_sources, METH_VARARGS, nullptr},
    {"encode_targets", encode_targets, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    "fastseq._host",
    "Compiled helpers on the host side; see fastseq/host.py.",
    -1,
    methods,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__host() { return PyModule_Create(&definition); }
