// ---- plans ---------------------------------------------------------------------------------------------------------
PyTypeObject* plan_type = nullptr;

// Arguments that were checked. An engine that makes its inputs anew at each step gets them from its allocator at a few
// addresses, in turns: 4 or 5 in SGLang.
constexpr Py_ssize_t kMaxChecked = 8;

struct Checked {
  Py_ssize_t count;  // 0 for none
  std::int64_t fingerprint[kMaxArguments * kMaxWords];
  std::int64_t words[kCallWords + 1];  // what a call with these arguments sets
};

struct Plan {
  PyObject_HEAD std::int32_t device;  // run() launches on its current stream; negative on the CPU target
  Py_ssize_t next;                    // the entry that is replaced next
  Py_ssize_t argument_count;          // of the calls that follow() is for
  Py_ssize_t input_count;             // how many inputs it named; 0 without it
  Py_ssize_t inputs[kMaxArguments];   // which: the call's words begin with an address and a stride of each
  Py_ssize_t span_count;
  std::int64_t* spans;  // first and last address of each region that the kernel writes
  Checked checked[kMaxChecked];
  std::int64_t words[kPlanWords];  // the kernel's parameters
};

PyObject* raise_cuda(int code) {
  return PyErr_Format(PyExc_RuntimeError, "CUDA error %d: %s", code, ONELAUNCH_KERNEL_ERROR(code));
}

PyObject* launched(const Plan* plan, void* stream) {
  const int code = ONELAUNCH_KERNEL_LAUNCH(plan->words, stream);
  if (code != 0) return raise_cuda(code);
  Py_RETURN_NONE;
}

// Reads a sequence of `count` integers.
bool read_words(PyObject* sequence, std::int64_t* words, Py_ssize_t count) {
  const Py_ssize_t size = PySequence_Size(sequence);
  if (size < 0) return false;
  if (size != count) {
    PyErr_Format(PyExc_TypeError, "expected %zd integers, got %zd", count, size);
    return false;
  }
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* word = PySequence_GetItem(sequence, i);
    if (word == nullptr) return false;
    words[i] = PyLong_AsLongLong(word);
    Py_DECREF(word);
    if (words[i] == -1 && PyErr_Occurred()) return false;
  }
  return true;
}

// launch(first words..., stream): one launch. The arguments are integers that the caller has checked.
PyObject* plan_launch(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  if (count != kCallWords + 1) {
    return PyErr_Format(PyExc_TypeError, "launch takes %zd integers, got %zd", kCallWords + 1, count);
  }
  auto* plan = reinterpret_cast<Plan*>(self);
  std::int64_t words[kCallWords + 1];
  for (Py_ssize_t i = 0; i < kCallWords; ++i) {
    words[i] = PyLong_AsLongLong(args[i]);
    if (words[i] == -1 && PyErr_Occurred()) return nullptr;
  }
  void* stream = PyLong_AsVoidPtr(args[kCallWords]);
  if (PyErr_Occurred()) return nullptr;
  std::memcpy(plan->words, words, kCallWords * sizeof(std::int64_t));
  return launched(plan, stream);
}

// Whether arguments with this fingerprint were checked before; then sets the words that the call sets.
bool checked_before(Plan* plan, const std::int64_t* fingerprint, Py_ssize_t count) {
  if (count == 0) return false;
  const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(std::int64_t);
  for (const Checked& entry : plan->checked) {
    if (entry.count == count && std::memcmp(entry.fingerprint, fingerprint, bytes) == 0) {
      std::memcpy(plan->words, entry.words, kCallWords * sizeof(std::int64_t));
      return true;
    }
  }
  return false;
}

// Whether a tensor has memory that the kernel doesn't write.
bool apart(const Plan* plan, const std::int64_t* tensor) {
  const std::int64_t dims = tensor[0] >> 8 & 0xff, bytes = (tensor[0] >> 24 & 0xff) / 8, start = tensor[1];
  if (dims == 0 || start == 0) return false;
  std::int64_t end = start + bytes;
  for (std::int64_t dim = 0; dim < dims; ++dim) {
    const std::int64_t elements = tensor[2 + 2 * dim];
    if (elements < 1) return false;
    end += (elements - 1) * tensor[3 + 2 * dim] * bytes;
  }
  for (Py_ssize_t i = 0; i < plan->span_count; ++i) {
    if (start < plan->spans[2 * i + 1] && plan->spans[2 * i] < end) return false;
  }
  return true;
}

// Whether arguments differ from an entry in the addresses of tensors alone, which are apart from what the kernel
// writes. Then sets the words that the call sets: an input, or a view of one, has moved as far as the argument.
bool moved(Plan* plan, const Checked& entry, const std::int64_t* fingerprint, Py_ssize_t count) {
  if (entry.count != count) return false;
  std::int64_t moves[kMaxArguments] = {};
  Py_ssize_t argument = 0;
  for (Py_ssize_t at = 0; at < count; ++argument) {
    const Py_ssize_t more = words_of_argument(fingerprint[at]);
    for (Py_ssize_t i = 0; i < more; ++i) {
      const bool address = i == 1 && (fingerprint[at] & 0xff) == kTensor;
      if (!address && entry.fingerprint[at + i] != fingerprint[at + i]) return false;
    }
    if ((fingerprint[at] & 0xff) == kTensor) {
      if (!apart(plan, fingerprint + at)) return false;
      moves[argument] = fingerprint[at + 1] - entry.fingerprint[at + 1];
    }
    at += more;
  }
  if (argument != plan->argument_count) return false;
  std::memcpy(plan->words, entry.words, kCallWords * sizeof(std::int64_t));
  for (Py_ssize_t i = 0; i < plan->input_count; ++i) plan->words[2 * i] += moves[plan->inputs[i]];
  return true;
}

// Whether follow() was called, and the arguments are checked ones at other addresses.
bool followed(Plan* plan, const std::int64_t* fingerprint, Py_ssize_t count) {
  if (count == 0 || plan->input_count == 0) return false;
  for (const Checked& entry : plan->checked) {
    if (moved(plan, entry, fingerprint, count)) return true;
  }
  return false;
}

// Sets the words that a call sets to what owner._check(arguments...) returns. `fingerprint` is that of the arguments.
bool update_arguments(
    Plan* plan, PyObject* owner, PyObject* const* args, Py_ssize_t count, const std::int64_t* fingerprint,
    Py_ssize_t fingerprint_count) {
  PyObject* check = PyObject_GetAttrString(owner, "_check");
  if (check == nullptr) return false;
  PyObject* checked = call(check, nullptr, args, count);
  Py_DECREF(check);
  if (checked == nullptr) return false;
  Checked found;
  const bool valid = read_words(checked, found.words, kCallWords);
  Py_DECREF(checked);
  if (!valid) return false;
  // No Python runs from here to the launch, so another thread's call can't come between.
  std::memcpy(plan->words, found.words, kCallWords * sizeof(std::int64_t));
  if (fingerprint_count == 0) return true;
  found.count = fingerprint_count;
  std::memcpy(found.fingerprint, fingerprint, static_cast<std::size_t>(fingerprint_count) * sizeof(std::int64_t));
  plan->checked[plan->next] = found;
  plan->next = (plan->next + 1) % kMaxChecked;
  return true;
}

// One launch with arguments that were read. Where they differ from those of the last calls that were checked, or have
// no fingerprint, owner._check(arguments...) refuses them or returns the words that the call sets.
PyObject* run_read(
    PyObject* self, PyObject* owner, PyObject* const* args, Py_ssize_t count, const std::int64_t* fingerprint,
    Py_ssize_t fingerprint_count) {
  auto* plan = reinterpret_cast<Plan*>(self);
  if (!checked_before(plan, fingerprint, fingerprint_count) && !followed(plan, fingerprint, fingerprint_count) &&
      !update_arguments(plan, owner, args, count, fingerprint, fingerprint_count)) {
    return nullptr;
  }
  void* stream = nullptr;
  if (plan->device >= 0 && exchange->current_stream(kCuda, plan->device, &stream) != 0) return nullptr;
  return launched(plan, stream);
}

// run(owner, arguments...): one launch on the current stream.
PyObject* plan_run(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  if (count < 1 || count > 1 + kMaxArguments) {
    return PyErr_Format(PyExc_TypeError, "run takes an owner and up to %zd arguments, got %zd", kMaxArguments, count);
  }
  std::int64_t now[kMaxArguments * kMaxWords];
  Py_ssize_t now_count = 0;
  for (Py_ssize_t i = 1; i < count; ++i) {
    const Py_ssize_t more = fingerprint_one(args[i], now + now_count);
    now_count += more;
    if (more == 0) {
      now_count = 0;
      break;
    }
  }
  return run_read(self, args[0], args + 1, count - 1, now, now_count);
}

// runner(): run_read for a memo, which may be another module's.
PyObject* plan_runner(PyObject*, PyObject*) {
  static Runner runner = {run_read};
  return PyCapsule_New(&runner, kRunner, nullptr);
}

// follow(inputs, spans, arguments): from now on run() with so many arguments calls owner._check only for those that
// differ from checked ones in more than addresses, or overlap the spans.
PyObject* plan_follow(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  if (count != 3)
    return PyErr_Format(
        PyExc_TypeError, "follow takes two sequences of integers and an integer, got %zd arguments", count);
  auto* plan = reinterpret_cast<Plan*>(self);
  const Py_ssize_t arguments = PyLong_AsSsize_t(args[2]);
  if (arguments == -1 && PyErr_Occurred()) return nullptr;
  const Py_ssize_t inputs = PySequence_Size(args[0]), edges = PySequence_Size(args[1]);
  if (inputs < 0 || edges < 0) return nullptr;
  std::int64_t indices[kMaxArguments];
  if (inputs > kMaxArguments || 2 * inputs > kCallWords || edges % 2 != 0) {
    return PyErr_Format(PyExc_ValueError, "follow got %zd inputs and %zd edges of spans", inputs, edges);
  }
  if (!read_words(args[0], indices, inputs)) return nullptr;
  for (Py_ssize_t i = 0; i < inputs; ++i) {
    if (indices[i] < 0 || indices[i] >= arguments || indices[i] >= kMaxArguments) {
      return PyErr_Format(PyExc_ValueError, "run() has no argument %lld", static_cast<long long>(indices[i]));
    }
  }
  auto* spans = static_cast<std::int64_t*>(PyMem_Calloc(static_cast<std::size_t>(edges) + 1, sizeof(std::int64_t)));
  if (spans == nullptr) return PyErr_NoMemory();
  if (!read_words(args[1], spans, edges)) {
    PyMem_Free(spans);
    return nullptr;
  }
  PyMem_Free(plan->spans);
  plan->spans = spans;
  plan->span_count = edges / 2;
  for (Py_ssize_t i = 0; i < inputs; ++i) plan->inputs[i] = static_cast<Py_ssize_t>(indices[i]);
  plan->input_count = inputs;
  plan->argument_count = arguments;
  Py_RETURN_NONE;
}

void plan_dealloc(PyObject* self) {
  PyMem_Free(reinterpret_cast<Plan*>(self)->spans);
  release(self);
}

// bind(words after those that a call sets, device): a plan. Only run() uses the device.
PyObject* bind(PyObject*, PyObject* args) {
  PyObject* words = nullptr;
  int device = -1;
  if (!PyArg_ParseTuple(args, "O|i", &words, &device)) return nullptr;
  if (device >= 0 && exchange == nullptr) {
    return PyErr_Format(PyExc_RuntimeError, "call register_classes() first: run() finds the current stream through it");
  }
  auto* plan = allocated<Plan>(plan_type);
  if (plan == nullptr) return nullptr;
  plan->device = device;
  auto* self = reinterpret_cast<PyObject*>(plan);
  if (read_words(words, plan->words + kCallWords, kPlanWords - kCallWords)) return self;
  Py_DECREF(self);
  return nullptr;
}

// prepare(device): loads the kernel there; (registers, shared bytes, local bytes).
PyObject* prepare(PyObject*, PyObject* device) {
  const std::int64_t ordinal = PyLong_AsLongLong(device);
  if (PyErr_Occurred()) return nullptr;
  std::int64_t resources[3] = {0, 0, 0};
  const int code = ONELAUNCH_KERNEL_PREPARE(ordinal, resources);
  if (code != 0) return raise_cuda(code);
  return Py_BuildValue(
      "(LLL)", static_cast<long long>(resources[0]), static_cast<long long>(resources[1]),
      static_cast<long long>(resources[2]));
}
