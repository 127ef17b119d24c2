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

// A Python call: function(first, args...), or without `first` where that is null.
PyObject* call(PyObject* function, PyObject* first, PyObject* const* args, Py_ssize_t count) {
  const Py_ssize_t before = first == nullptr ? 0 : 1;
  PyObject* arguments = PyTuple_New(before + count);
  if (arguments == nullptr) return nullptr;
  for (Py_ssize_t i = 0; i < before + count; ++i) {
    PyObject* argument = i < before ? first : args[i - before];
    Py_INCREF(argument);
    PyTuple_SetItem(arguments, i, argument);
  }
  PyObject* result = PyObject_CallObject(function, arguments);
  Py_DECREF(arguments);
  return result;
}
