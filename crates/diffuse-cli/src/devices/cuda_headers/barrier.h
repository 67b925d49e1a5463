#pragma once

namespace cuda {

enum thread_scope { thread_scope_system, thread_scope_device, thread_scope_block, thread_scope_thread };

// A barrier in shared memory: PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier".
template <thread_scope Scope> class barrier {
  unsigned long long state;

  inline __device__ unsigned address() {
    return static_cast<unsigned>(__cvta_generic_to_shared(&state));
  }

public:
  using arrival_token = unsigned long long;

  friend inline __device__ void init(barrier *self, unsigned count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;"
                 :: "r"(self->address()), "r"(count) : "memory");
  }

  inline __device__ arrival_token arrive() {
    arrival_token token;
    asm volatile("mbarrier.arrive.shared::cta.b64 %0, [%1];"
                 : "=l"(token) : "r"(address()) : "memory");
    return token;
  }

  inline __device__ void wait(arrival_token token) {
    unsigned done;
    do {
      asm volatile("{\n"
                   ".reg .pred p;\n"
                   "mbarrier.test_wait.shared::cta.b64 p, [%1], %2;\n"
                   "selp.u32 %0, 1, 0, p;\n"
                   "}"
                   : "=r"(done) : "r"(address()), "l"(token) : "memory");
    } while (!done);
  }

  inline __device__ void arrive_and_wait() { wait(arrive()); }

  inline __device__ void wait_parity(bool parity) {
    unsigned done;
    do {
      asm volatile("{\n"
                   ".reg .pred p;\n"
#if __CUDA_ARCH__ >= 900
                   "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
#else
                   "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
#endif
                   "selp.u32 %0, 1, 0, p;\n"
                   "}"
                   : "=r"(done) : "r"(address()), "r"(static_cast<unsigned>(parity)) : "memory");
    } while (!done);
  }

  inline __device__ unsigned long long *native_handle() { return &state; }
};

namespace device {

template <thread_scope Scope>
inline __device__ unsigned long long *barrier_native_handle(barrier<Scope> &self) {
  return self.native_handle();
}

} // namespace device
} // namespace cuda
