// ---- a memo of objects by arguments --------------------------------------------------------------------------------
// In order of use, latest first: a call that repeats the previous one compares once.
struct Entry {
  PyObject* object;
  Py_ssize_t count;
  std::int64_t words[1];  // count words
};

struct Memo {
  PyObject_HEAD Py_ssize_t count, max_count;
  Py_ssize_t inputs;  // of the first so many arguments only the dtype counts
  Entry** entries;
};

PyTypeObject* memo_type = nullptr;

bool add_all(const Memo* memo, Fingerprint& fingerprint, PyObject* const* args, Py_ssize_t count) {
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (!(i < memo->inputs ? fingerprint.add_dtype(args[i]) : fingerprint.add_any(args[i], 2))) {
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
  auto* memo = reinterpret_cast<Memo*>(self);
  Fingerprint wanted;
  if (!add_all(memo, wanted, args, count)) Py_RETURN_NONE;
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
  auto* memo = reinterpret_cast<Memo*>(self);
  Fingerprint fingerprint;
  if (!add_all(memo, fingerprint, args + 1, count - 1)) Py_RETURN_NONE;
  auto* entry = static_cast<Entry*>(PyMem_Malloc(sizeof(Entry) + fingerprint.size()));
  if (entry == nullptr) return PyErr_NoMemory();
  Py_INCREF(args[0]);
  entry->object = args[0];
  entry->count = fingerprint.count;
  std::memcpy(entry->words, fingerprint.words, fingerprint.size());
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

// memo(max_count, inputs=0): a memo of at most max_count objects, 1 or more; for the inputs see Memo.
PyObject* memo(PyObject*, PyObject* args) {
  Py_ssize_t count = 0, inputs = 0;
  if (!PyArg_ParseTuple(args, "n|n", &count, &inputs)) return nullptr;
  if (count < 1) {
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
  self->inputs = inputs;
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
