// The engine's end of a layer whose experts are not all on its GPU: three things that a CUDA graph may hold.
//
// post     tells the experts at hand from those elsewhere, counts what the router chose, and puts the rows that want
//          others into memory that the host can read, with a flag behind them.
// collect  waits for the flag that answers, no longer than the deadline, and adds what came.
//
// The host's ids are all -1 between two requests: only rows that want something are written.
// Nothing here depends on which step it is: the number of a request is kept on the device, so that a graph can be
// replayed. T rows, K experts a row, E experts of the layer.

typedef unsigned long long u64;

// In memory that host and device see. Each flag on a cache line of its own.
struct Mailbox {
    unsigned asked;      // number of the last request, written last
    unsigned layer;
    unsigned rows;
    unsigned pad0[29];
    unsigned answered;   // number of the last answer, written last
    unsigned pad1[31];
};

// On the device.
struct State {
    unsigned number;     // of the last request
    unsigned pending;    // of the one that waits for its answer, or 0
    unsigned arrived;    // blocks that are done
    unsigned remote;     // rows that want experts elsewhere
    unsigned ready;      // number of the last answer that was seen
    unsigned late;       // number of the last request that got none in time
    unsigned lates;      // how many did not
};

__device__ __forceinline__ u64 nanoseconds() {
    u64 t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
}
__device__ __forceinline__ unsigned acquire_system(const unsigned* p) {
    unsigned v;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ void release_system(unsigned* p, unsigned v) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ unsigned acquire_device(const unsigned* p) {
    unsigned v;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ void release_device(unsigned* p, unsigned v) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// place[E]: where an expert is among those at hand, or -1. Pairs of others get the place `nothing` and the weight 0.
extern "C" __global__ void post(
    const uint4* __restrict__ x, const int* __restrict__ ids, const float* __restrict__ weights,
    const int* __restrict__ place, int nothing, int* __restrict__ places_out, float* __restrict__ weights_out,
    u64* __restrict__ counts, Mailbox* box, int* box_ids, float* box_weights, uint4* box_x, State* state,
    int T, int K, int vectors, int layer, int experts)
{
    __shared__ int wants;
    unsigned mine = 0;
    for (int t = blockIdx.x; t < T; t += gridDim.x) {
        if (threadIdx.x == 0) wants = 0;
        __syncthreads();
        for (int k = threadIdx.x; k < K; k += blockDim.x) {
            int id = ids[t * K + k];
            bool known = id >= 0 && id < experts;
            int at = known ? place[id] : -1;
            if (known) atomicAdd(counts + id, 1ULL);
            places_out[t * K + k] = at < 0 ? nothing : at;
            weights_out[t * K + k] = at < 0 ? 0.0f : weights[t * K + k];
            bool remote = known && at < 0;
            if (remote) wants = 1;
        }
        __syncthreads();
        if (box && wants) {
            mine++;
            for (int k = threadIdx.x; k < K; k += blockDim.x) {
                bool here = places_out[t * K + k] != nothing;
                box_ids[t * K + k] = here ? -1 : ids[t * K + k];
                box_weights[t * K + k] = here ? 0.0f : weights[t * K + k];
            }
            for (int v = threadIdx.x; v < vectors; v += blockDim.x)
                box_x[(size_t)t * vectors + v] = x[(size_t)t * vectors + v];
        }
        __syncthreads();
    }
    if (!box || threadIdx.x) return;
    if (mine) atomicAdd(&state->remote, mine);
    __threadfence_system();
    if (atomicAdd(&state->arrived, 1) != gridDim.x - 1) return;
    __threadfence_system();
    unsigned remote = atomicExch(&state->remote, 0);
    state->arrived = 0;
    if (!remote) {
        state->pending = 0;
        return;
    }
    unsigned number = state->number + 1;
    if (!number) number = 1;
    state->number = state->pending = number;
    box->layer = layer;
    box->rows = T;
    release_system(&box->asked, number);
}

__device__ __forceinline__ unsigned sum_bf16(unsigned a, unsigned b) {
    float lo = __uint_as_float(a << 16) + __uint_as_float(b << 16);
    float hi = __uint_as_float(a & 0xffff0000u) + __uint_as_float(b & 0xffff0000u);
    unsigned short l, h;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(l) : "f"(lo));
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(hi));
    return (unsigned)l | ((unsigned)h << 16);
}
__device__ __forceinline__ unsigned sum_f32(unsigned a, unsigned b) {
    return __float_as_uint(__uint_as_float(a) + __uint_as_float(b));
}

extern "C" __global__ void collect(
    uint4* __restrict__ y, const int* __restrict__ places, int nothing, Mailbox* box, const uint4* box_y,
    State* state, int T, int K, int vectors, int bf16, u64 deadline_ns)
{
    unsigned number = state->pending;
    if (!number) return;
    __shared__ int come, wants;
    if (threadIdx.x == 0) {
        u64 until = nanoseconds() + deadline_ns;
        if (blockIdx.x == 0) {
            // One block looks across the bus, the others at the device's memory.
            while (acquire_system(&box->answered) != number && nanoseconds() < until) __nanosleep(100);
            come = acquire_system(&box->answered) == number;
            if (!come) {
                state->late = number;
                state->lates++;
            }
            release_device(&state->ready, number);
        } else {
            while (acquire_device(&state->ready) != number && nanoseconds() < until + deadline_ns) __nanosleep(100);
            come = state->late != number && acquire_system(&box->answered) == number;
        }
    }
    __syncthreads();
    if (!come) return;
    for (int t = blockIdx.x; t < T; t += gridDim.x) {
        if (threadIdx.x == 0) wants = 0;
        __syncthreads();
        for (int k = threadIdx.x; k < K; k += blockDim.x)
            if (places[t * K + k] == nothing) wants = 1;
        __syncthreads();
        if (wants) {
            for (int v = threadIdx.x; v < vectors; v += blockDim.x) {
                size_t at = (size_t)t * vectors + v;
                uint4 a = y[at], b = __ldcv(box_y + at);
                if (bf16) {
                    a.x = sum_bf16(a.x, b.x); a.y = sum_bf16(a.y, b.y);
                    a.z = sum_bf16(a.z, b.z); a.w = sum_bf16(a.w, b.w);
                } else {
                    a.x = sum_f32(a.x, b.x); a.y = sum_f32(a.y, b.y);
                    a.z = sum_f32(a.z, b.z); a.w = sum_f32(a.w, b.w);
                }
                y[at] = a;
            }
        }
        __syncthreads();
    }
}
