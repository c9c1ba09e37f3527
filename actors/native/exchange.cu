// A layer whose experts are not all on the engine's GPU: kernels that a CUDA graph may hold.
//
// The engine's end:
//   post     tells the experts at hand from those elsewhere, counts what the router chose, and puts the rows that
//            others into memory that the processors can read (the mailbox), or into that of a neighbour: a host on
//            another GPU of this machine; with a flag behind them.
//   collect  waits for the flags that answer, no longer than deadlines, and adds what came. What a neighbour owes then
//            goes to the mailbox, and it is asked no more.
// A neighbour's end, around the experts' own kernels:
//   receive  waits for a request that fits, and finds the experts' places.
//   give     puts the sums into the engine's memory, with a flag behind them.
//
// The mailbox's ids are all -1 between two requests: only rows that want something are written.
// Nothing here depends on which step it is: the number of a request is kept on the device, so that a graph can be
// replayed. T rows, K experts a row, E experts of the layer.

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)

typedef unsigned long long u64;

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
__device__ __forceinline__ unsigned short to_bf16(float value) {
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

#else
#include "on_a_processor.h"
#endif

// Each flag on a cache line of its own.
struct Request {
    unsigned asked;      // number of the last request, written last
    unsigned layer;
    unsigned rows;
    unsigned pad[29];
};

// In memory that host and device see; begins as a Request.
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
    unsigned near_number;   // of the last request to neighbours
    unsigned near_pending;  // which of them owe an answer, a bit each
    unsigned near_ready;    // number of the last request of which it is known who answered
    unsigned near_come;     // and who did
    unsigned turn;          // how often all blocks have waited for each other
};

// What an engine knows of a neighbour; on the engine's device.
struct Neighbour {
    Request* request;    // memory of the other GPU, and so are:
    int* ids;            // [T, K], -1 for what is not asked of it
    float* weights;
    uint4* x;
    Request* bell;       // memory of the host that the neighbour's process watches
    const unsigned* answered;   // on this device: a number, and how many pairs it did not have; and its sums
    const uint4* y;
    unsigned alive;
    unsigned wanted;     // rows so far
};

// A neighbour's end of one engine; on the neighbour's device.
struct Desk {
    unsigned last;       // number of the last request that was taken
    unsigned taken;      // whether the last `receive` took one
    unsigned rows;       // how many it has
    unsigned missing;    // pairs whose experts are not here
    unsigned count;      // of calls of `receive`
    unsigned arrived;    // blocks that are done
};

// Bit of a row that wants something from the mailbox; those behind it are the neighbours'.
#define BOX 1u
#define NEAR(n) (2u << (n))

// Whose a pair is: a neighbour's number, or -1.
__device__ __forceinline__ int neighbour_of(const int* near, const Neighbour* neighbours, int id) {
    int n = neighbours ? near[id] : -1;
    return n >= 0 && neighbours[n].alive ? n : -1;
}

// Ring for what is in the mailbox; the last block to come does it. `mine`: rows of this block.
__device__ __forceinline__ void send_box(State* state, Mailbox* box, int T, int layer) {
    unsigned remote = atomicExch(&state->remote, 0);
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

// place[E]: where an expert is among those at hand, or -1; near[E]: the neighbour to ask for it, or -1, which comes
// first while it is alive. Pairs that are not at hand get the place `nothing` and the weight 0. bits[T] tells who is
// asked for a row.
extern "C" __global__ void post(
    const uint4* __restrict__ x, const int* __restrict__ ids, const float* __restrict__ weights,
    const int* __restrict__ place, const int* __restrict__ near, int nothing, int* __restrict__ places_out,
    float* __restrict__ weights_out, unsigned* __restrict__ bits, u64* __restrict__ counts, Mailbox* box, int* box_ids,
    float* box_weights, uint4* box_x, Neighbour* neighbours, int neighbour_count, State* state, int T, int K,
    int vectors, int layer, int experts)
{
    __shared__ unsigned wants, mine[32];
    for (int n = threadIdx.x; n < 32; n += blockDim.x) mine[n] = 0;
    for (int t = blockIdx.x; t < T; t += gridDim.x) {
        if (threadIdx.x == 0) wants = 0;
        __syncthreads();
        for (int k = threadIdx.x; k < K; k += blockDim.x) {
            int id = ids[t * K + k];
            bool known = id >= 0 && id < experts;
            int n = known ? neighbour_of(near, neighbours, id) : -1;
            int at = known && n < 0 ? place[id] : -1;
            if (known) atomicAdd(counts + id, 1ULL);
            places_out[t * K + k] = at < 0 ? nothing : at;
            weights_out[t * K + k] = at < 0 ? 0.0f : weights[t * K + k];
            if (n >= 0) atomicOr(&wants, NEAR(n));
            else if (known && at < 0) atomicOr(&wants, BOX);
            for (int other = 0; other < neighbour_count; other++) {
                if (!neighbours[other].alive) continue;
                neighbours[other].ids[t * K + k] = other == n ? id : -1;
                neighbours[other].weights[t * K + k] = other == n ? weights[t * K + k] : 0.0f;
            }
        }
        __syncthreads();
        if (threadIdx.x == 0) bits[t] = wants;
        if (box && (wants & BOX)) {
            if (threadIdx.x == 0) mine[0]++;
            for (int k = threadIdx.x; k < K; k += blockDim.x) {
                int id = ids[t * K + k];
                bool known = id >= 0 && id < experts;
                bool here = places_out[t * K + k] != nothing || !known || neighbour_of(near, neighbours, id) >= 0;
                box_ids[t * K + k] = here ? -1 : id;
                box_weights[t * K + k] = here ? 0.0f : weights[t * K + k];
            }
            for (int v = threadIdx.x; v < vectors; v += blockDim.x)
                box_x[(size_t)t * vectors + v] = x[(size_t)t * vectors + v];
        }
        for (int n = 0; n < neighbour_count; n++) {
            if (!(wants & NEAR(n))) continue;
            if (threadIdx.x == 0) mine[n + 1]++;
            uint4* out = neighbours[n].x;
            for (int v = threadIdx.x; v < vectors; v += blockDim.x)
                out[(size_t)t * vectors + v] = x[(size_t)t * vectors + v];
        }
        __syncthreads();
    }
    if (!box && !neighbour_count) return;
    // Each thread wrote, and only one will ring: the others' writes must be seen before.
    __threadfence_system();
    __syncthreads();
    if (threadIdx.x) return;
    if (mine[0]) atomicAdd(&state->remote, mine[0]);
    for (int n = 0; n < neighbour_count; n++)
        if (mine[n + 1]) atomicAdd(&neighbours[n].wanted, mine[n + 1]);
    __threadfence_system();
    if (atomicAdd(&state->arrived, 1) != gridDim.x - 1) return;
    __threadfence_system();
    state->arrived = 0;
    unsigned near_pending = 0, number = state->near_number + 1;
    if (!number) number = 1;
    for (int n = 0; n < neighbour_count; n++) {
        if (!atomicExch(&neighbours[n].wanted, 0)) continue;
        near_pending |= NEAR(n);
        Request *request = neighbours[n].request, *bell = neighbours[n].bell;
        request->layer = bell->layer = layer;
        request->rows = bell->rows = T;
        release_system(&request->asked, number);
        release_system(&bell->asked, number);
    }
    state->near_pending = near_pending;
    if (near_pending) state->near_number = number;
    if (box) send_box(state, box, T, layer);
}

__device__ __forceinline__ unsigned sum_bf16(unsigned a, unsigned b) {
    unsigned short l = to_bf16(__uint_as_float(a << 16) + __uint_as_float(b << 16));
    unsigned short h = to_bf16(__uint_as_float(a & 0xffff0000u) + __uint_as_float(b & 0xffff0000u));
    return (unsigned)l | ((unsigned)h << 16);
}
__device__ __forceinline__ unsigned sum_f32(unsigned a, unsigned b) {
    return __float_as_uint(__uint_as_float(a) + __uint_as_float(b));
}

__device__ __forceinline__ uint4 sum(uint4 a, uint4 b, int bf16) {
    if (bf16) return {sum_bf16(a.x, b.x), sum_bf16(a.y, b.y), sum_bf16(a.z, b.z), sum_bf16(a.w, b.w)};
    return {sum_f32(a.x, b.x), sum_f32(a.y, b.y), sum_f32(a.z, b.z), sum_f32(a.w, b.w)};
}

// For thread 0 of every block: whether the mailbox's answer to a request came. One block looks across the bus, the others
// at the device's memory. All blocks run at once.
__device__ __forceinline__ bool await_box(Mailbox* box, State* state, unsigned number, u64 deadline_ns) {
    u64 until = nanoseconds() + deadline_ns;
    if (blockIdx.x) {
        while (acquire_device(&state->ready) != number && nanoseconds() < until + deadline_ns) __nanosleep(100);
        return state->late != number && acquire_system(&box->answered) == number;
    }
    while (acquire_system(&box->answered) != number && nanoseconds() < until) __nanosleep(100);
    bool come = acquire_system(&box->answered) == number;
    if (!come) {
        state->late = number;
        state->lates++;
    }
    release_device(&state->ready, number);
    return come;
}

// For thread 0 of every block: which neighbours' answers came; those whose did not are asked no more.
__device__ __forceinline__ unsigned await_near(
    Neighbour* neighbours, int count, unsigned* dead, State* state, unsigned pending, u64 deadline_ns)
{
    unsigned number = state->near_number;
    if (blockIdx.x) {
        while (acquire_device(&state->near_ready) != number) __nanosleep(20);
        return __ldcv(&state->near_come);
    }
    u64 until = nanoseconds() + deadline_ns;
    unsigned come = 0;
    for (int n = 0; n < count; n++) {
        if (!(pending & NEAR(n))) continue;
        const unsigned* answered = neighbours[n].answered;
        while (acquire_system(answered) != number && nanoseconds() < until);
        if (acquire_system(answered) == number && __ldcv(answered + 1) == 0) {
            come |= NEAR(n);
        } else {
            neighbours[n].alive = 0;
            atomicOr_system(dead, NEAR(n));
        }
    }
    state->near_come = come;
    release_device(&state->near_ready, number);
    return come;
}

// `dead`, in memory of the host, gets the bits of neighbours that are asked no more. What they owe is asked of the
// mailbox, and waited for here.
extern "C" __global__ void collect(
    uint4* __restrict__ y, const unsigned* __restrict__ bits, const uint4* __restrict__ x, const int* __restrict__ ids,
    const float* __restrict__ weights, const int* __restrict__ near, Neighbour* neighbours, int neighbour_count,
    Mailbox* box, int* box_ids, float* box_weights, uint4* box_x, const uint4* box_y, unsigned* dead, State* state,
    int T, int K, int vectors, int layer, int experts, int bf16, u64 deadline_ns, u64 near_deadline_ns)
{
    unsigned number = state->pending, pending = state->near_pending;
    if (!number && !pending) return;
    __shared__ unsigned come, boxed, mine, rescue;
    if (threadIdx.x == 0) {
        come = pending ? await_near(neighbours, neighbour_count, dead, state, pending, near_deadline_ns) : 0;
        boxed = number && await_box(box, state, number, deadline_ns);
        mine = 0;
    }
    __syncthreads();
    unsigned failed = pending & ~come, take = come | (boxed ? BOX : 0);
    for (int t = blockIdx.x; t < T; t += gridDim.x) {
        unsigned wants = bits[t], now = wants & take;
        if (!now) continue;
        for (int v = threadIdx.x; v < vectors; v += blockDim.x) {
            size_t at = (size_t)t * vectors + v;
            uint4 all = y[at];
            if (now & BOX) all = sum(all, __ldcv(box_y + at), bf16);
            for (int n = 0; n < neighbour_count; n++)
                if (now & NEAR(n)) all = sum(all, __ldcv(neighbours[n].y + at), bf16);
            y[at] = all;
        }
    }
    if (!failed || !box) return;
    // The mailbox's ids are -1 again, and its rows are read by everybody, once all blocks are here.
    for (int step = 0; step < 2; step++) {
        if (step == 1) {
            for (int t = blockIdx.x; t < T; t += gridDim.x) {
                if (!(bits[t] & failed)) continue;
                if (threadIdx.x == 0) mine++;
                for (int k = threadIdx.x; k < K; k += blockDim.x) {
                    int id = ids[t * K + k];
                    int n = id >= 0 && id < experts ? near[id] : -1;
                    bool owed = n >= 0 && (failed & NEAR(n));
                    box_ids[t * K + k] = owed ? id : -1;
                    box_weights[t * K + k] = owed ? weights[t * K + k] : 0.0f;
                }
                for (int v = threadIdx.x; v < vectors; v += blockDim.x)
                    box_x[(size_t)t * vectors + v] = x[(size_t)t * vectors + v];
            }
        }
        __threadfence_system();
        __syncthreads();
        if (threadIdx.x == 0) {
            unsigned turn = __ldcv(&state->turn);
            if (step == 1 && mine) atomicAdd(&state->remote, mine);
            __threadfence_system();
            if (atomicAdd(&state->arrived, 1) == gridDim.x - 1) {
                state->arrived = 0;
                __threadfence_system();
                if (step == 1) send_box(state, box, T, layer);
                release_device(&state->turn, turn + 1);
            } else {
                while (acquire_device(&state->turn) == turn) __nanosleep(50);
            }
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        number = __ldcv(&state->pending);
        rescue = number && await_box(box, state, number, deadline_ns);
    }
    __syncthreads();
    if (!rescue) return;
    for (int t = blockIdx.x; t < T; t += gridDim.x) {
        if (!(bits[t] & failed)) continue;
        for (int v = threadIdx.x; v < vectors; v += blockDim.x) {
            size_t at = (size_t)t * vectors + v;
            y[at] = sum(y[at], __ldcv(box_y + at), bf16);
        }
    }
}

// One block. Takes the next request if it comes in time, is of this layer, and has more than `least` rows and at most
// `room`; all places are `nothing` else. `verdict`, in memory of the host: how many calls there were, and the number of
// the last request that was taken.
extern "C" __global__ void receive(
    Request* request, const int* __restrict__ ids, const float* __restrict__ weights, const int* __restrict__ place,
    int nothing, int* __restrict__ places_out, float* __restrict__ weights_out, Desk* desk, unsigned* verdict,
    int layer, int least, int room, int K, int experts, u64 wait_ns)
{
    __shared__ int rows;
    __shared__ unsigned missing;
    if (threadIdx.x == 0) {
        u64 until = nanoseconds() + wait_ns;
        unsigned number = acquire_system(&request->asked);
        while (number == desk->last && nanoseconds() < until) number = acquire_system(&request->asked);
        int asked = __ldcv(&request->rows);
        bool take = number != desk->last && __ldcv(&request->layer) == (unsigned)layer && asked > least && asked <= room;
        rows = take ? asked : 0;
        missing = 0;
        if (take) desk->last = number;
        desk->taken = take;
        desk->rows = rows;
        verdict[1] = desk->last;
        __threadfence_system();
        release_system(verdict, ++desk->count);
    }
    __syncthreads();
    for (int at = threadIdx.x; at < room * K; at += blockDim.x) {
        int id = at < rows * K ? __ldcv(ids + at) : -1;
        int here = id >= 0 && id < experts ? place[id] : -1;
        if (id >= 0 && here < 0) atomicAdd(&missing, 1);
        places_out[at] = here < 0 ? nothing : here;
        weights_out[at] = here < 0 ? 0.0f : __ldcv(weights + at);
    }
    __syncthreads();
    if (threadIdx.x == 0) desk->missing = missing;
}

extern "C" __global__ void give(const uint4* __restrict__ y, uint4* out, unsigned* answered, Desk* desk, int vectors) {
    if (!desk->taken) return;
    size_t all = (size_t)desk->rows * vectors;
    for (size_t at = blockIdx.x * blockDim.x + threadIdx.x; at < all; at += (size_t)gridDim.x * blockDim.x) out[at] = y[at];
    __threadfence_system();
    __syncthreads();
    if (threadIdx.x) return;
    if (atomicAdd(&desk->arrived, 1) != gridDim.x - 1) return;
    __threadfence_system();
    desk->arrived = 0;
    answered[1] = desk->missing;
    release_system(answered, desk->last);
}
