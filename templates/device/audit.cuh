// ---- audit: an element is compared instead of written ------------------------------------------------------------
// A block reports the first difference that it finds, and the launch's record keeps the first report that arrives.
__shared__ Violation* audit_record;
__shared__ unsigned long long audit_reported;  // whether the block has reported: more would only wait for one another

// Each block begins with it. All threads must call it.
__device__ __forceinline__ void begin_audit(Violation* record) {
  if (threadIdx.x == 0) {
    audit_record = record;
    audit_reported = 0;
  }
  __syncthreads();
}

// Reports an element that isn't the value that a refresh would write.
template <typename T>
__device__ __forceinline__ void put(const T* address, std::common_type_t<T> value) {
  // Whoever wrote a bool may have written another byte than 0 and 1.
  using Stored = std::conditional_t<std::is_same_v<T, bool>, unsigned char, T>;
  const Stored found = *reinterpret_cast<const Stored*>(address);
  if (found == static_cast<Stored>(value)) return;
  if (atomicCAS(&audit_reported, 0ull, 1ull) != 0) return;
  report(audit_record, kDiffers, reinterpret_cast<std::int64_t>(address), found, value);
}
