// The other end of the barest exchange between a GPU and a process of the host: a thread that watches a number in
// memory that the GPU writes, and gives it back, with the rows or without.

#include <atomic>
#include <cstdint>
#include <cstring>
#include <immintrin.h>

extern "C" void expertmesh_echo(
    const std::atomic<uint32_t>* asked, std::atomic<uint32_t>* answered, const char* in, char* out, int64_t bytes,
    uint32_t turns)
{
    uint32_t seen = answered->load();
    for (uint32_t turn = 0; turn < turns; turn++) {
        uint32_t number;
        while ((number = asked->load(std::memory_order_acquire)) == seen) _mm_pause();
        if (bytes) memcpy(out, in, bytes);
        answered->store(seen = number, std::memory_order_release);
    }
}
