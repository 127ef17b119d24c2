// ---- checks ------------------------------------------------------------------------------------------------------
// The first violation since the host last read the record. `kind` is 0 for none.
struct Violation {
  unsigned long long kind;
  std::int64_t request, value, limit;
};

// Records a violation, unless there is one already.
__device__ void report(
    Violation* record, unsigned long long kind, std::int64_t request, std::int64_t value, std::int64_t limit) {
  if (atomicCAS(&record->kind, 0ull, kind) != 0) return;
  record->request = request;
  record->value = value;
  record->limit = limit;
}
