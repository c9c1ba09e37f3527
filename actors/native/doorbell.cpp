// Waits for a number in memory that a GPU writes. Called without Python's lock, so that nobody waits for the waiting.

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#define PAUSE() _mm_pause()
#else
#define PAUSE() std::this_thread::yield()
#endif

// The number, once it is not `seen` any more; `seen` itself once `*stop` is set. The first `spin_us` microseconds
// cost a core; after them it is looked at every 50.
extern "C" uint32_t expertmesh_wait(
    const std::atomic<uint32_t>* number, uint32_t seen, const std::atomic<uint32_t>* stop, int64_t spin_us)
{
    using clock = std::chrono::steady_clock;
    const auto until = clock::now() + std::chrono::microseconds(spin_us);
    for (bool spins = true;;) {
        for (int turn = 0; turn < 64; turn++) {
            const uint32_t found = number->load(std::memory_order_acquire);
            if (found != seen) return found;
            PAUSE();
        }
        if (stop->load(std::memory_order_relaxed)) return seen;
        if (spins) spins = clock::now() < until;
        else std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
}
