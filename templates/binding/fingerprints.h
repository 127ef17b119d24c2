// ---- fingerprints of arguments -------------------------------------------------------------------------------------
// An argument as words: a kernel, and the checks before it, can't tell arguments with equal words apart. The words hold
// neither the object's address nor a reference, so they keep nothing alive, and a new object at a dead one's address
// isn't mistaken for it.
enum Kind : std::int64_t { kNone, kInt, kTensor, kDtype, kText, kBuffers, kSequence };
constexpr std::int32_t kMaxDims = 2;
constexpr Py_ssize_t kMaxWords = 2 + 2 * kMaxDims;  // of one argument

// Writes the words of a tensor, and returns their number: 0 for one that isn't strided, or has no memory.
inline Py_ssize_t fingerprint_tensor(PyObject* object, std::int64_t* words) {
  Tensor tensor;
  if (exchange->read(object, &tensor) != 0) {
    PyErr_Clear();
    return 0;
  }
  if (tensor.dims > kMaxDims || (tensor.dims > 0 && tensor.strides == nullptr)) return 0;
  words[0] = kTensor | std::int64_t{tensor.dims} << 8 | std::int64_t{tensor.code} << 16 |
             std::int64_t{tensor.bits} << 24 | std::int64_t{tensor.device_type} << 32 |
             std::int64_t{tensor.device} << 48;
  words[1] = reinterpret_cast<std::int64_t>(tensor.data) + static_cast<std::int64_t>(tensor.byte_offset);
  for (std::int32_t dim = 0; dim < tensor.dims; ++dim) {
    words[2 + 2 * dim] = tensor.shape[dim];
    words[3 + 2 * dim] = tensor.strides[dim];
  }
  return 2 + 2 * tensor.dims;
}

// Writes the words of None, an int or a tensor, and returns their number: 0 for anything else, which equals no
// argument.
inline Py_ssize_t fingerprint_one(PyObject* object, std::int64_t* words) {
  if (object == Py_None) {
    words[0] = kNone;
    return 1;
  }
  if (is_a(object, tensor_type)) return fingerprint_tensor(object, words);
  if (PyLong_Check(object) && !PyBool_Check(object)) {  // True and 16.0 aren't the same arguments as 1 and 16
    words[0] = kInt;
    words[1] = PyLong_AsLongLong(object);
    if (words[1] == -1 && PyErr_Occurred()) {
      PyErr_Clear();
      return 0;
    }
    return 2;
  }
  return 0;
}

// The number of words of the argument whose words begin here.
Py_ssize_t words_of_argument(std::int64_t first) {
  switch (first & 0xff) {
    case kTensor:
      return 2 + 2 * (first >> 8 & 0xff);
    case kInt:
      return 2;
    default:
      return 1;
  }
}

// The words of several arguments; on the stack until there are many.
struct Fingerprint {
  std::int64_t local[512];
  std::int64_t* words = local;
  Py_ssize_t count = 0, capacity = sizeof(local) / sizeof(local[0]);

  ~Fingerprint() {
    if (words != local) PyMem_Free(words);
  }

  std::size_t size() const { return static_cast<std::size_t>(count) * sizeof(std::int64_t); }

  // Room for more arguments.
  bool reserve(Py_ssize_t arguments = 1) {
    const Py_ssize_t wanted = count + arguments * kMaxWords;
    if (wanted <= capacity) return true;
    auto* larger =
        static_cast<std::int64_t*>(PyMem_Malloc(2 * static_cast<std::size_t>(wanted) * sizeof(std::int64_t)));
    if (larger == nullptr) return false;
    std::memcpy(larger, words, size());
    if (words != local) PyMem_Free(words);
    words = larger;
    capacity = 2 * wanted;
    return true;
  }

  // Adds a tensor of torch's own class, which most arguments are.
  bool add_tensor(PyObject* tensor) {
    if (!reserve()) return false;
    const Py_ssize_t more = fingerprint_tensor(tensor, words + count);
    count += more;
    return more > 0;
  }

  // Adds None, an int or a tensor; false for anything else, perhaps with a Python error.
  bool add(PyObject* object) {
    if (!reserve()) return false;
    const Py_ssize_t more = fingerprint_one(object, words + count);
    count += more;
    return more > 0;
  }

  // Adds what remains of a fingerprint of `more` words where of a tensor only the dtype counts; false for none.
  bool add_dtype(const std::int64_t* one, Py_ssize_t more) {
    if (more == 0 || !reserve()) return false;
    if ((one[0] & 0xff) == kTensor) {
      words[count++] = one[0] & 0xffff00ff;  // the kind, the code and the bits
      return true;
    }
    std::memcpy(words + count, one, static_cast<std::size_t>(more) * sizeof(std::int64_t));
    count += more;
    return true;
  }

  // Adds any kind of argument; `levels` is how deep sequences may lie in sequences.
  bool add_any(PyObject* object, int levels) {
    PyTypeObject* type = Py_TYPE(object);
    if (type == tensor_type || type == &PyLong_Type || object == Py_None) return add(object);
    if (!reserve()) return false;
    if (levels > 0 && (type == &PyList_Type || type == &PyTuple_Type)) return add_elements(object, levels - 1);
    if (type == dtype_type) {  // torch has one object per dtype, which is never freed
      words[count++] = kDtype;
      words[count++] = reinterpret_cast<std::int64_t>(object);
      return true;
    }
    if (PyUnicode_Check(object)) return add_text(object);
    if (is_a(object, buffers_type)) return add_buffers(object);
    if (levels == 0 || is_a(object, tensor_type) || !PySequence_Check(object)) return add(object);
    const Py_ssize_t length = PySequence_Size(object);
    if (length < 0) return false;
    words[count++] = kSequence | std::int64_t{length} << 8;
    for (Py_ssize_t i = 0; i < length; ++i) {
      PyObject* element = PySequence_GetItem(object, i);
      if (element == nullptr) return false;
      const bool added = add_any(element, levels - 1);
      Py_DECREF(element);
      if (!added) return false;
    }
    return true;
  }

  // Adds a list or a tuple, which is quicker than a sequence of a user's class.
  bool add_elements(PyObject* object, int levels) {
    const bool is_list = Py_TYPE(object) == &PyList_Type;
    const Py_ssize_t length = is_list ? PyList_Size(object) : PyTuple_Size(object);
    words[count++] = kSequence | std::int64_t{length} << 8;
    for (Py_ssize_t i = 0; i < length; ++i) {
      PyObject* element = is_list ? PyList_GetItem(object, i) : PyTuple_GetItem(object, i);
      if (element == nullptr) return false;
      Py_INCREF(element);
      const bool added = Py_TYPE(element) == tensor_type ? add_tensor(element) : add_any(element, levels);
      Py_DECREF(element);
      if (!added) return false;
    }
    return true;
  }

  bool add_text(PyObject* text) {
    Py_ssize_t length = 0;
    const char* bytes = PyUnicode_AsUTF8AndSize(text, &length);
    constexpr Py_ssize_t kWord = sizeof(std::int64_t);
    if (bytes == nullptr || length > (kMaxWords - 1) * kWord) return false;  // no mode's name is so long
    words[count++] = kText | std::int64_t{length} << 8;
    const Py_ssize_t more = (length + kWord - 1) / kWord;
    if (more > 0) words[count + more - 1] = 0;
    std::memcpy(words + count, bytes, static_cast<std::size_t>(length));
    count += more;
    return true;
  }

  bool add_buffers(PyObject* buffers) {
    words[count++] = kBuffers;
    const Py_ssize_t start = count;
    if (Py_TYPE(buffers) == buffers_type) {
      // Its __dict__ has the fields in order; to iterate is far quicker than to look up each of them.
      PyObject* own = PyObject_GenericGetDict(buffers, nullptr);
      if (own == nullptr) return false;
      const bool added = add_values(own);
      Py_DECREF(own);
      if (added) return true;
      count = start;  // attributes were added or deleted
    }
    for (Py_ssize_t i = 0; i < field_count; ++i) {
      PyObject* value = PyObject_GetAttr(buffers, field_names[i]);
      if (value == nullptr) return false;
      const bool added = add(value);
      Py_DECREF(value);
      if (!added) return false;
    }
    return true;
  }

  // Adds the values of a dictionary whose first keys are the fields' names; false for any other dictionary. In decode
  // seqlens_expanded is cache_seqlens, so what is the first value again isn't read again.
  bool add_values(PyObject* dictionary) {
    const Py_ssize_t fields = field_count;
    if (!reserve(fields)) return false;
    Py_ssize_t position = 0;
    PyObject *name, *value, *first = nullptr;
    std::int64_t *at = words + count, *first_at = at;
    for (Py_ssize_t i = 0; i < fields; ++i) {
      if (field_count != fields || !PyDict_Next(dictionary, &position, &name, &value) || name != field_names[i]) {
        return false;
      }
      if (value == Py_None) {
        *at++ = kNone;
        continue;
      }
      if (value == first) {
        const Py_ssize_t more = words_of_argument(*first_at);
        std::memcpy(at, first_at, static_cast<std::size_t>(more) * sizeof(std::int64_t));
        at += more;
        continue;
      }
      if (first == nullptr) {
        first = value;
        first_at = at;
      }
      Py_INCREF(value);  // reading a tensor of a user's class may run Python
      const Py_ssize_t more = fingerprint_one(value, at);
      Py_DECREF(value);
      if (more == 0) return false;
      at += more;
    }
    count = at - words;
    return true;
  }
};
