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

#include "binding/tensors.h"

#include "binding/fingerprints.h"

#include "binding/memo.h"

#include "binding/plans.h"

template <typename Function>
PyCFunction method(Function* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef plan_methods[] = {
    {"run", method(plan_run), METH_FASTCALL, "run(owner, arguments...): one launch on the current stream."},
    {"follow", method(plan_follow), METH_FASTCALL,
     "follow(inputs, spans, arguments): run() accepts so many checked arguments at other addresses."},
    {"runner", plan_runner, METH_NOARGS, "runner(): what a memo calls in run()'s place."},
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
    {"run", method(memo_run), METH_FASTCALL,
     "run(arguments...): runs the plan that keep() got with equal arguments; the arguments if there is none."},
    {"keep", method(memo_keep), METH_FASTCALL, "keep(owner, run, arguments...): stores a plan for run()."},
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
    {"memo", memo, METH_VARARGS,
     "memo(max_count, passed=0, inputs=0): plans by the arguments of calls. The first ones are passed to the plan; of "
     "the inputs, the first of these, the dtype counts."},
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
