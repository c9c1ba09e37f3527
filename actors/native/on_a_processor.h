// CUDA's words for one thread of a processor: kernels are plain functions then, called with one block of one thread.
// For tests on machines without a GPU, which see what a kernel does, and not what its threads do to each other.

#include <chrono>
#include <cstring>
#include <thread>

typedef unsigned long long u64;

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__

struct uint4 {
    unsigned x, y, z, w;
};
static const struct {
    unsigned x;
} threadIdx = {0}, blockIdx = {0}, blockDim = {1}, gridDim = {1};

inline void __syncthreads() {}
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __nanosleep(unsigned) { std::this_thread::sleep_for(std::chrono::microseconds(1)); }
template <class T, class U> T atomicAdd(T* p, U v) { return __atomic_fetch_add(p, (T)v, __ATOMIC_SEQ_CST); }
template <class T, class U> T atomicOr(T* p, U v) { return __atomic_fetch_or(p, (T)v, __ATOMIC_SEQ_CST); }
template <class T, class U> T atomicOr_system(T* p, U v) { return atomicOr(p, v); }
template <class T, class U> T atomicExch(T* p, U v) { return __atomic_exchange_n(p, (T)v, __ATOMIC_SEQ_CST); }
template <class T> T __ldcv(const T* p) {
    T value;
    memcpy(&value, p, sizeof value);
    return value;
}
template <class T> T __ldcv(T* p) { return __ldcv((const T*)p); }

inline u64 nanoseconds() {
    using namespace std::chrono;
    return duration_cast<std::chrono::nanoseconds>(steady_clock::now().time_since_epoch()).count();
}
inline unsigned acquire_system(const unsigned* p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
inline void release_system(unsigned* p, unsigned v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
inline unsigned acquire_device(const unsigned* p) { return acquire_system(p); }
inline void release_device(unsigned* p, unsigned v) { release_system(p, v); }
inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, 4);
    return bits;
}
// To the nearest, of two as near to the even one.
inline unsigned short to_bf16(float value) {
    unsigned bits = __float_as_uint(value);
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
