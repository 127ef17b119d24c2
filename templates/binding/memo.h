// ---- a memo of plans by arguments ----------------------------------------------------------------------------------
// A call like an earlier one is one C function: it reads every tensor once, finds the plan and launches it. In order of
// use, latest first: a call that repeats the previous one compares once.

// What a plan's run() does after it has read its arguments. A memo has plans of several modules.
struct Runner {
  PyObject* (*run)(
      PyObject* plan, PyObject* owner, PyObject* const* args, Py_ssize_t count, const std::int64_t* fingerprint,
      Py_ssize_t fingerprint_count);
};
constexpr const char* kRunner = "onelaunch.Runner";

struct Entry {
  PyObject *owner, *run;  // a launch is run(owner, arguments...)
  const Runner* runner;  // null if `run` isn't a plan's own function
  Py_ssize_t count;
  std::int64_t words[1];  // count words
};

struct Memo {
  PyObject_HEAD Py_ssize_t count, max_count;
  Py_ssize_t passed;  // the first so many arguments are for run()
  Py_ssize_t inputs;  // the first so many of them count by their dtype, the others not at all
  Entry** entries;
};

PyTypeObject* memo_type = nullptr;

// The arguments of one call.
struct Key {
  std::int64_t passed[kMaxArguments * kMaxWords];  // the fingerprint of those for run()
  Py_ssize_t passed_count = 0;  // 0 if one of them has none
  Fingerprint words;  // what distinguishes plans

  // False if some that count have no fingerprint.
  bool read(const Memo* memo, PyObject* const* args, Py_ssize_t count) {
    if (count < memo->passed) return false;
    for (Py_ssize_t i = 0; i < memo->passed; ++i) {
      const Py_ssize_t more = fingerprint_one(args[i], passed + passed_count);
      if (i < memo->inputs && !words.add_dtype(passed + passed_count, more)) return false;
      passed_count += more;
      if (more > 0) continue;
      passed_count = 0;
      break;
    }
    for (Py_ssize_t i = memo->passed; i < count; ++i) {
      if (words.add_any(args[i], 2)) continue;
      PyErr_Clear();  // the checks of the arguments report what is wrong with them
      return false;
    }
    return true;
  }
};

void put_first(Memo* memo, Entry* entry, Py_ssize_t before) {
  std::memmove(memo->entries + 1, memo->entries, static_cast<std::size_t>(before) * sizeof(Entry*));
  memo->entries[0] = entry;
}

// The entry with these words, or null.
Entry* find(Memo* memo, const Fingerprint& wanted) {
  for (Py_ssize_t i = 0; i < memo->count; ++i) {
    Entry* entry = memo->entries[i];
    if (entry->count == wanted.count && std::memcmp(entry->words, wanted.words, wanted.size()) == 0) {
      if (i > 0) put_first(memo, entry, i);
      return entry;
    }
  }
  return nullptr;
}

// The successors of PyErr_Fetch and PyErr_Restore aren't in the limited API of Python 3.11.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"

// Lets owner._refused(error) replace a RuntimeError by one that names the kernel.
void explain(PyObject* owner) {
  if (!PyErr_ExceptionMatches(PyExc_RuntimeError)) return;
  PyObject *type, *error, *trace;
  PyErr_Fetch(&type, &error, &trace);
  PyErr_NormalizeException(&type, &error, &trace);
  if (trace != nullptr) PyException_SetTraceback(error, trace);  // Python before 3.12 keeps it apart
  PyObject* result = PyObject_CallMethod(owner, "_refused", "O", error);
  if (result != nullptr) {  // it raised nothing
    Py_DECREF(result);
    PyErr_Restore(type, error, trace);
    return;
  }
  Py_XDECREF(type);
  Py_XDECREF(error);
  Py_XDECREF(trace);
}

#pragma GCC diagnostic pop

PyObject* tuple_of(PyObject* const* args, Py_ssize_t count) {
  PyObject* tuple = PyTuple_New(count);
  for (Py_ssize_t i = 0; tuple != nullptr && i < count; ++i) {
    Py_INCREF(args[i]);
    PyTuple_SetItem(tuple, i, args[i]);
  }
  return tuple;
}

// run(arguments...): runs the plan that keep() got with equal arguments. Where there is none, returns the arguments: a
// caller needn't make a tuple of them before. Arguments without a fingerprint equal nothing.
PyObject* memo_run(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  auto* memo = reinterpret_cast<Memo*>(self);
  Key key;
  const Entry* entry = key.read(memo, args, count) ? find(memo, key.words) : nullptr;
  if (entry == nullptr) return tuple_of(args, count);
  PyObject *owner = entry->owner, *run = entry->run;
  Py_INCREF(owner);  // a check runs Python, which may drop the entry
  Py_INCREF(run);
  PyObject* result =
      entry->runner == nullptr
          ? call(run, owner, args, memo->passed)
          : entry->runner->run(PyCFunction_GetSelf(run), owner, args, memo->passed, key.passed, key.passed_count);
  if (result == nullptr) explain(owner);
  Py_DECREF(run);
  Py_DECREF(owner);
  if (result == nullptr) return nullptr;
  Py_DECREF(result);
  Py_RETURN_NONE;
}

// The runner of a plan whose run() this is; null for any other object.
const Runner* runner_of(PyObject* run) {
  PyObject* plan = PyCFunction_Check(run) ? PyCFunction_GetSelf(run) : nullptr;
  PyObject* capsule = plan == nullptr ? nullptr : PyObject_CallMethod(plan, "runner", nullptr);
  auto* runner = capsule == nullptr ? nullptr : static_cast<const Runner*>(PyCapsule_GetPointer(capsule, kRunner));
  PyErr_Clear();
  Py_XDECREF(capsule);  // what it points to is static
  return runner;
}

void drop(Entry* entry) {
  PyObject *owner = entry->owner, *run = entry->run;
  PyMem_Free(entry);
  Py_DECREF(run);  // these may run Python
  Py_DECREF(owner);
}

// keep(owner, run, arguments...): stores what a later run() with equal arguments does; a full memo drops the least
// recently used entry.
PyObject* memo_keep(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  if (count < 2) return PyErr_Format(PyExc_TypeError, "keep takes an owner, its run and arguments");
  auto* memo = reinterpret_cast<Memo*>(self);
  Key key;
  if (!key.read(memo, args + 2, count - 2)) Py_RETURN_NONE;
  const Runner* runner = runner_of(args[1]);
  auto* entry = static_cast<Entry*>(PyMem_Malloc(sizeof(Entry) + key.words.size()));
  if (entry == nullptr) return PyErr_NoMemory();
  Py_INCREF(args[0]);
  Py_INCREF(args[1]);
  entry->owner = args[0];
  entry->run = args[1];
  entry->runner = runner;
  entry->count = key.words.count;
  std::memcpy(entry->words, key.words.words, key.words.size());
  Entry* oldest = memo->count == memo->max_count ? memo->entries[--memo->count] : nullptr;
  put_first(memo, entry, memo->count++);
  if (oldest != nullptr) drop(oldest);
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

// memo(max_count, passed=0, inputs=0): a memo of at most max_count plans, 1 or more; for the others see Memo.
PyObject* memo(PyObject*, PyObject* args) {
  Py_ssize_t count = 0, passed = 0, inputs = 0;
  if (!PyArg_ParseTuple(args, "n|nn", &count, &passed, &inputs)) return nullptr;
  if (count < 1) return PyErr_Format(PyExc_ValueError, "max_count is %zd; a memo has room for 1 plan or more", count);
  if (inputs < 0 || inputs > passed || passed > kMaxArguments) {
    return PyErr_Format(
        PyExc_ValueError, "%zd inputs of %zd arguments; run() takes up to %zd", inputs, passed, kMaxArguments);
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
  self->passed = passed;
  self->inputs = inputs;
  self->entries = entries;
  return reinterpret_cast<PyObject*>(self);
}

void memo_dealloc(PyObject* self) {
  auto* memo = reinterpret_cast<Memo*>(self);
  while (memo->count > 0) drop(memo->entries[--memo->count]);
  PyMem_Free(memo->entries);
  release(self);
}
