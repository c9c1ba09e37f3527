// The barest exchange between two processes through memory that both have mapped: a block copies rows into it and
// writes a flag, the other's block sees the flag, copies the rows back and writes another. What a transport between
// GPU processes is held against.

typedef unsigned long long u64;

__device__ __forceinline__ u64 nanoseconds() {
    u64 t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
}
__device__ __forceinline__ unsigned acquire(const unsigned* p) {
    unsigned v;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ void release(unsigned* p, unsigned v) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// Both ends: `first` begins a turn, the other answers. `took` has each turn's nanoseconds, at the first's end; `arrived`
// counts blocks that have written theirs, from zero. All blocks must run at once.
extern "C" __global__ void pingpong(
    int first, int turns, int vectors, const uint4* mine, uint4* out, uint4* in, unsigned* out_flag, unsigned* in_flag,
    unsigned* arrived, u64* took, u64 limit_ns)
{
    __shared__ int go_on;
    int begin = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
    u64 end = nanoseconds() + limit_ns;
    for (int turn = 1; turn <= turns; turn++) {
        u64 began = nanoseconds();
        for (int half = 0; half < 2; half++) {
            if ((half == 0) == (first == 1)) {
                const uint4* from = first ? mine : in;
                for (int v = begin; v < vectors; v += step) out[v] = __ldcv(from + v);
                __threadfence_system();
                __syncthreads();
                if (threadIdx.x == 0) {
                    if (gridDim.x == 1) {
                        release(out_flag, turn);
                    } else {
                        __threadfence_system();
                        if (atomicAdd(arrived, 1) == gridDim.x * turn - 1) {
                            __threadfence_system();
                            release(out_flag, turn);
                        }
                    }
                }
            } else {
                if (threadIdx.x == 0) {
                    while (acquire(in_flag) != (unsigned)turn && nanoseconds() < end);
                    go_on = acquire(in_flag) == (unsigned)turn;
                }
                __syncthreads();
                if (!go_on) return;
            }
        }
        if (blockIdx.x == 0 && threadIdx.x == 0 && first) took[turn - 1] = nanoseconds() - began;
    }
}
