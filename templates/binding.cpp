// The Python side of a kernel: a plan is an array of 64-bit words, and a call sets the first of them and launches.
// It uses only the limited C API, so that one build serves every Python from 3.11 on. It includes no torch header:
// tensors are read through the C functions that their class offers by the DLPack standard.
//
// emit/binding.py puts these macros before it:
//   ONELAUNCH_SYMBOL      stem of the kernel's exported C functions
//   ONELAUNCH_MODULE      import name of this module
//   ONELAUNCH_PLAN_WORDS  64-bit words of the kernel's parameters
//   ONELAUNCH_CALL_WORDS  how many of them each call sets; they come first
//   ONELAUNCH_CALL_NAMES  their names, a string that ends with a comma
#define PY_SSIZE_T_CLEAN
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030B0000
#endif
#include <Python.h>

#include <cstdint>
#include <cstring>

#define ONELAUNCH_JOIN_EXPANDED(a, b) a##b
#define ONELAUNCH_JOIN(a, b) ONELAUNCH_JOIN_EXPANDED(a, b)
#define ONELAUNCH_TEXT_EXPANDED(a) #a
#define ONELAUNCH_TEXT(a) ONELAUNCH_TEXT_EXPANDED(a)

#define ONELAUNCH_KERNEL_LAUNCH ONELAUNCH_JOIN(ONELAUNCH_SYMBOL, _launch)
#define ONELAUNCH_KERNEL_PREPARE ONELAUNCH_JOIN(ONELAUNCH_SYMBOL, _prepare)
#define ONELAUNCH_KERNEL_ERROR ONELAUNCH_JOIN(ONELAUNCH_SYMBOL, _error)

extern "C" {
int ONELAUNCH_KERNEL_LAUNCH(const std::int64_t* words, void* stream);
int ONELAUNCH_KERNEL_PREPARE(std::int64_t device, std::int64_t* resources);
const char* ONELAUNCH_KERNEL_ERROR(int code);
}

namespace {

constexpr Py_ssize_t kPlanWords = ONELAUNCH_PLAN_WORDS;
constexpr Py_ssize_t kCallWords = ONELAUNCH_CALL_WORDS;

constexpr Py_ssize_t kMaxArguments = 20;  // of run(), which compares them with those of previous calls

// ---- tensors -----------------------------------------------------------------------------------------------------
// The part of DLPack 1 (dlpack.h) that is used here: the struct of a tensor, and the functions of a tensor class.
struct Tensor {
  void* data;
  std::int32_t device_type, device;
  std::int32_t dims;
  std::uint8_t code, bits;
  std::uint16_t lanes;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};
constexpr std::int32_t kCuda = 2;

struct Exchange {
  std::uint32_t major, minor;
  Exchange* older;
  void (*managed[3])();  // for tensors with an owner, not used here
  int (*read)(void* object, Tensor* tensor);  // borrows; 0, or -1 with a Python error
  int (*current_stream)(std::int32_t device_type, std::int32_t device, void** stream);  // 0 or -1, as above
};

// Set by register_classes(): the classes of tensors, dtypes and MetadataBuffers, and the names of the latter's fields.
PyTypeObject* tensor_type = nullptr;
PyTypeObject* dtype_type = nullptr;
PyTypeObject* buffers_type = nullptr;
PyObject** field_names = nullptr;  // references, like the classes
Py_ssize_t field_count = 0;
const Exchange* exchange = nullptr;

void replace(PyTypeObject*& reference, PyObject* type) {
  auto* before = reinterpret_cast<PyObject*>(reference);
  Py_INCREF(type);
  reference = reinterpret_cast<PyTypeObject*>(type);
  Py_XDECREF(before);
}

// register_classes(torch.Tensor, torch.dtype, MetadataBuffers, names of its fields): for the checks of arguments.
PyObject* register_classes(PyObject*, PyObject* const* args, Py_ssize_t count) {
  bool fits = count == 4 && PyTuple_Check(args[3]);
  for (int i = 0; fits && i < 3; ++i) fits = PyType_Check(args[i]);
  if (!fits) {
    return PyErr_Format(PyExc_TypeError, "register_classes takes three classes and a tuple of names");
  }
  PyObject* capsule = PyObject_GetAttrString(args[0], "__dlpack_c_exchange_api__");
  if (capsule == nullptr) return nullptr;
  auto* found = static_cast<const Exchange*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  Py_DECREF(capsule);  // what it points to is static
  if (found == nullptr) return nullptr;
  if (found->major != 1 || found->read == nullptr) {
    return PyErr_Format(
        PyExc_RuntimeError, "tensors are read by DLPack 1, and %R has version %u", args[0], found->major);
  }
  const Py_ssize_t fields = PyTuple_Size(args[3]);
  auto* names = static_cast<PyObject**>(PyMem_Calloc(static_cast<std::size_t>(fields), sizeof(PyObject*)));
  if (names == nullptr) return PyErr_NoMemory();
  for (Py_ssize_t i = 0; i < fields; ++i) {
    names[i] = PyTuple_GetItem(args[3], i);
    Py_INCREF(names[i]);
  }
  PyObject** names_before = field_names;
  const Py_ssize_t fields_before = field_count;
  field_names = names;
  field_count = fields;
  for (Py_ssize_t i = 0; i < fields_before; ++i) Py_DECREF(names_before[i]);
  PyMem_Free(names_before);
  replace(tensor_type, args[0]);
  replace(dtype_type, args[1]);
  replace(buffers_type, args[2]);
  exchange = found;
  Py_RETURN_NONE;
}

bool is_a(PyObject* object, PyTypeObject* wanted) {
  return wanted != nullptr && (Py_TYPE(object) == wanted || PyType_IsSubtype(Py_TYPE(object), wanted));
}

// ---- fingerprints of arguments -------------------------------------------------------------------------------------
// An argument as words: a kernel, and the checks before it, can't tell arguments with equal words apart. The words hold
// neither the object's address nor a reference, so they keep nothing alive, and a new object at a dead one's address
// isn't mistaken for it.
enum Kind : std::int64_t { kNone, kInt, kTensor, kDtype, kText, kBuffers, kSequence };
constexpr std::int32_t kMaxDims = 2;
constexpr Py_ssize_t kMaxWords = 2 + 2 * kMaxDims;  // of one argument

// Writes the words of None, an int or a tensor, and returns their number: 0 for anything else, which equals no
// argument.
Py_ssize_t fingerprint_one(PyObject* object, std::int64_t* words) {
  if (object == Py_None) {
    words[0] = kNone;
    return 1;
  }
  if (is_a(object, tensor_type)) {
    Tensor tensor;
    if (exchange->read(object, &tensor) != 0) {  // the tensor isn't strided, or has no memory
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

// The words of several arguments; on the stack until there are many.
struct Fingerprint {
  std::int64_t local[512];
  std::int64_t* words = local;
  Py_ssize_t count = 0, capacity = sizeof(local) / sizeof(local[0]);

  ~Fingerprint() {
    if (words != local) PyMem_Free(words);
  }

  std::size_t size() const { return static_cast<std::size_t>(count) * sizeof(std::int64_t); }

  // Room for one more argument.
  bool reserve() {
    if (capacity - count >= kMaxWords) return true;
    const std::size_t bytes = 2 * static_cast<std::size_t>(capacity) * sizeof(std::int64_t);
    auto* larger = static_cast<std::int64_t*>(PyMem_Malloc(bytes));
    if (larger == nullptr) return false;
    std::memcpy(larger, words, size());
    if (words != local) PyMem_Free(words);
    words = larger;
    capacity *= 2;
    return true;
  }

  // Adds None, an int or a tensor; false for anything else, perhaps with a Python error.
  bool add(PyObject* object) {
    if (!reserve()) return false;
    const Py_ssize_t more = fingerprint_one(object, words + count);
    count += more;
    return more > 0;
  }

  // Adds any kind of argument; `levels` is how deep sequences may lie in sequences.
  bool add_any(PyObject* object, int levels) {
    PyTypeObject* type = Py_TYPE(object);
    if (type == tensor_type || type == &PyLong_Type || object == Py_None) return add(object);
    if (!reserve()) return false;
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

  // Adds the values of a dictionary whose first keys are the fields' names; false for any other dictionary.
  bool add_values(PyObject* dictionary) {
    Py_ssize_t position = 0;
    PyObject *name, *value;
    for (Py_ssize_t i = 0; i < field_count; ++i) {
      if (!PyDict_Next(dictionary, &position, &name, &value) || name != field_names[i] || !reserve()) return false;
      if (value == Py_None) {
        words[count++] = kNone;
        continue;
      }
      Py_INCREF(value);  // reading a tensor of a user's class may run Python
      const bool added = add(value);
      Py_DECREF(value);
      if (!added) return false;
    }
    return true;
  }
};

// ---- a memo of objects by arguments --------------------------------------------------------------------------------
// In order of use, latest first: a call that repeats the previous one compares once.
struct Entry {
  PyObject* object;
  Py_ssize_t count;
  std::int64_t words[1];  // count words
};

struct Memo {
  PyObject_HEAD Py_ssize_t count, max_count;
  Entry** entries;
};

PyTypeObject* memo_type = nullptr;

bool add_all(Fingerprint& fingerprint, PyObject* const* args, Py_ssize_t count) {
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (!fingerprint.add_any(args[i], 2)) {
      PyErr_Clear();  // the checks of the arguments report what is wrong with them
      return false;
    }
  }
  return true;
}

void put_first(Memo* memo, Entry* entry, Py_ssize_t before) {
  std::memmove(memo->entries + 1, memo->entries, static_cast<std::size_t>(before) * sizeof(Entry*));
  memo->entries[0] = entry;
}

// find(arguments...): the object that keep() got with equal arguments, or None. Arguments without words equal nothing.
PyObject* memo_find(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  Fingerprint wanted;
  if (!add_all(wanted, args, count)) Py_RETURN_NONE;
  auto* memo = reinterpret_cast<Memo*>(self);
  for (Py_ssize_t i = 0; i < memo->count; ++i) {
    Entry* entry = memo->entries[i];
    if (entry->count == wanted.count && std::memcmp(entry->words, wanted.words, wanted.size()) == 0) {
      if (i > 0) put_first(memo, entry, i);
      Py_INCREF(entry->object);
      return entry->object;
    }
  }
  Py_RETURN_NONE;
}

// keep(object, arguments...): stores an object for find(); a full memo drops the least recently used one.
PyObject* memo_keep(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  if (count < 1) return PyErr_Format(PyExc_TypeError, "keep takes an object and arguments");
  Fingerprint fingerprint;
  if (!add_all(fingerprint, args + 1, count - 1)) Py_RETURN_NONE;
  auto* entry = static_cast<Entry*>(PyMem_Malloc(sizeof(Entry) + fingerprint.size()));
  if (entry == nullptr) return PyErr_NoMemory();
  Py_INCREF(args[0]);
  entry->object = args[0];
  entry->count = fingerprint.count;
  std::memcpy(entry->words, fingerprint.words, fingerprint.size());
  auto* memo = reinterpret_cast<Memo*>(self);
  Entry* oldest = memo->count == memo->max_count ? memo->entries[--memo->count] : nullptr;
  put_first(memo, entry, memo->count++);
  if (oldest != nullptr) {
    PyObject* dropped = oldest->object;
    PyMem_Free(oldest);
    Py_DECREF(dropped);  // last, since it may run Python
  }
  Py_RETURN_NONE;
}

template <typename Type>
Type* allocated(PyTypeObject* type) {
  return reinterpret_cast<Type*>(reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc))(type, 0));
}

void release(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
  Py_DECREF(type);
}

// memo(max_count): a memo of at most max_count objects, 1 or more.
PyObject* memo(PyObject*, PyObject* max_count) {
  const Py_ssize_t count = PyLong_AsSsize_t(max_count);
  if (count < 1) {
    if (PyErr_Occurred()) return nullptr;
    return PyErr_Format(PyExc_ValueError, "max_count is %zd; a memo has room for 1 object or more", count);
  }
  auto* entries = static_cast<Entry**>(PyMem_Calloc(static_cast<std::size_t>(count), sizeof(Entry*)));
  if (entries == nullptr) return PyErr_NoMemory();
  auto* self = allocated<Memo>(memo_type);
  if (self == nullptr) {
    PyMem_Free(entries);
    return nullptr;
  }
  self->count = 0;
  self->max_count = count;
  self->entries = entries;
  return reinterpret_cast<PyObject*>(self);
}

void memo_dealloc(PyObject* self) {
  auto* memo = reinterpret_cast<Memo*>(self);
  while (memo->count > 0) {
    Entry* entry = memo->entries[--memo->count];
    PyObject* dropped = entry->object;
    PyMem_Free(entry);
    Py_DECREF(dropped);
  }
  PyMem_Free(memo->entries);
  release(self);
}

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
  Py_ssize_t input_count;             // how many arguments follow() named; 0 without it
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

// Whether a tensor has memory that the kernel doesn't write. It has one dimension.
bool apart(const Plan* plan, const std::int64_t* tensor) {
  const std::int64_t start = tensor[1], elements = tensor[2], bytes = (tensor[0] >> 24 & 0xff) / 8;
  if ((tensor[0] >> 8 & 0xff) != 1 || start == 0 || elements < 1) return false;
  const std::int64_t end = start + ((elements - 1) * tensor[3] + 1) * bytes;
  for (Py_ssize_t i = 0; i < plan->span_count; ++i) {
    if (start < plan->spans[2 * i + 1] && plan->spans[2 * i] < end) return false;
  }
  return true;
}

// Whether arguments differ from an entry in the addresses of tensors alone, which are apart from what the kernel
// writes. Then sets the words that the call sets.
bool moved(Plan* plan, const Checked& entry, const std::int64_t* fingerprint, Py_ssize_t count) {
  if (entry.count != count) return false;
  std::int64_t addresses[kMaxArguments] = {};
  Py_ssize_t argument = 0;
  for (Py_ssize_t at = 0; at < count; ++argument) {
    const Py_ssize_t more = words_of_argument(fingerprint[at]);
    for (Py_ssize_t i = 0; i < more; ++i) {
      const bool address = i == 1 && (fingerprint[at] & 0xff) == kTensor;
      if (!address && entry.fingerprint[at + i] != fingerprint[at + i]) return false;
    }
    if ((fingerprint[at] & 0xff) == kTensor) {
      if (!apart(plan, fingerprint + at)) return false;
      addresses[argument] = fingerprint[at + 1];
    }
    at += more;
  }
  std::memcpy(plan->words, entry.words, kCallWords * sizeof(std::int64_t));
  for (Py_ssize_t i = 0; i < plan->input_count; ++i) plan->words[2 * i] = addresses[plan->inputs[i]];
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
    Plan* plan, PyObject* const* args, Py_ssize_t count, const std::int64_t* fingerprint,
    Py_ssize_t fingerprint_count) {
  PyObject* check = PyObject_GetAttrString(args[0], "_check");
  if (check == nullptr) return false;
  PyObject* arguments = PyTuple_New(count - 1);
  for (Py_ssize_t i = 1; arguments != nullptr && i < count; ++i) {
    Py_INCREF(args[i]);
    PyTuple_SetItem(arguments, i - 1, args[i]);
  }
  PyObject* checked = arguments == nullptr ? nullptr : PyObject_CallObject(check, arguments);
  Py_XDECREF(arguments);
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

// run(owner, arguments...): one launch on the current stream. Where the arguments differ from those of the last calls
// that were checked, or have no fingerprint, owner._check(arguments...) refuses them or returns the words that the call
// sets.
PyObject* plan_run(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  if (count < 1 || count > 1 + kMaxArguments) {
    return PyErr_Format(PyExc_TypeError, "run takes an owner and up to %zd arguments, got %zd", kMaxArguments, count);
  }
  auto* plan = reinterpret_cast<Plan*>(self);
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
  if (!checked_before(plan, now, now_count) && !followed(plan, now, now_count) &&
      !update_arguments(plan, args, count, now, now_count)) {
    return nullptr;
  }
  void* stream = nullptr;
  if (plan->device >= 0 && exchange->current_stream(kCuda, plan->device, &stream) != 0) return nullptr;
  return launched(plan, stream);
}

// follow(inputs, spans): from now on run() calls owner._check only for arguments that differ from checked ones in more
// than addresses, or overlap the spans.
PyObject* plan_follow(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  if (count != 2)
    return PyErr_Format(PyExc_TypeError, "follow takes two sequences of integers, got %zd arguments", count);
  auto* plan = reinterpret_cast<Plan*>(self);
  const Py_ssize_t inputs = PySequence_Size(args[0]), edges = PySequence_Size(args[1]);
  if (inputs < 0 || edges < 0) return nullptr;
  std::int64_t indices[kMaxArguments];
  if (inputs > kMaxArguments || 2 * inputs > kCallWords || edges % 2 != 0) {
    return PyErr_Format(PyExc_ValueError, "follow got %zd inputs and %zd edges of spans", inputs, edges);
  }
  if (!read_words(args[0], indices, inputs)) return nullptr;
  for (Py_ssize_t i = 0; i < inputs; ++i) {
    if (indices[i] < 0 || indices[i] >= kMaxArguments) {
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

template <typename Function>
PyCFunction method(Function* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef plan_methods[] = {
    {"run", method(plan_run), METH_FASTCALL, "run(owner, arguments...): one launch on the current stream."},
    {"follow", method(plan_follow), METH_FASTCALL,
     "follow(inputs, spans): run() accepts checked arguments at other addresses."},
    {"launch", method(plan_launch), METH_FASTCALL, "launch(" ONELAUNCH_CALL_NAMES "stream): one launch."},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot plan_slots[] = {
    {Py_tp_methods, plan_methods},
    {Py_tp_dealloc, reinterpret_cast<void*>(plan_dealloc)},
    {0, nullptr},
};

PyType_Spec plan_spec = {
    ONELAUNCH_TEXT(ONELAUNCH_MODULE) ".Plan", sizeof(Plan), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    plan_slots};

PyMethodDef memo_methods[] = {
    {"find", method(memo_find), METH_FASTCALL,
     "find(arguments...): the object that keep() got with equal arguments, or None."},
    {"keep", method(memo_keep), METH_FASTCALL, "keep(object, arguments...): stores an object for find()."},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot memo_slots[] = {
    {Py_tp_methods, memo_methods},
    {Py_tp_dealloc, reinterpret_cast<void*>(memo_dealloc)},
    {0, nullptr},
};

PyType_Spec memo_spec = {
    ONELAUNCH_TEXT(ONELAUNCH_MODULE) ".Memo", sizeof(Memo), 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    memo_slots};

PyMethodDef module_methods[] = {
    {"register_classes", method(register_classes), METH_FASTCALL,
     "register_classes(torch.Tensor, torch.dtype, MetadataBuffers, names of its fields): for the checks of arguments."},
    {"memo", memo, METH_O, "memo(max_count): objects by the arguments that they were made for."},
    {"bind", bind, METH_VARARGS, "bind(words, device=-1): a plan with the parameters that no call sets."},
    {"prepare", prepare, METH_O, "prepare(device): loads the kernel; (registers, shared bytes, local bytes)."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT,
    ONELAUNCH_TEXT(ONELAUNCH_MODULE),
    nullptr,
    -1,
    module_methods,
    nullptr,
    nullptr,
    nullptr,
    nullptr};

}  // namespace

extern "C" __attribute__((visibility("default"))) PyObject* ONELAUNCH_JOIN(PyInit_, ONELAUNCH_MODULE)() {
  PyObject* created = PyModule_Create(&module_definition);
  if (created == nullptr) return nullptr;
  plan_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&plan_spec));
  memo_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&memo_spec));
  if (plan_type == nullptr || memo_type == nullptr) {
    Py_DECREF(created);
    return nullptr;
  }
  return created;
}
