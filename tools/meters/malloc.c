/* Counts the bytes of live malloc blocks of 64 KiB and more, exactly, whoever allocates them.
 *
 * Built and loaded with LD_PRELOAD by tools/meters/cpu.py; needs glibc. A block counts with its usable size,
 * which exceeds the size asked for by less than two pages. Smaller blocks are not counted: they are
 * interpreter objects, not buffers. Every event is also logged, up to a limit, so that the live blocks
 * at the peak can be listed afterwards.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stddef.h>
#include <time.h>

#define LEAST_BYTES ((size_t)64 << 10)
#define MOST_EVENTS ((size_t)1 << 20)

extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);
extern void __libc_free(void *);

typedef struct {
    double seconds; /* of CLOCK_MONOTONIC */
    uint64_t address;
    int64_t bytes; /* negative for a free */
} meter_event;

static atomic_llong current_bytes, peak_bytes;
static atomic_size_t event_count;
static meter_event events[MOST_EVENTS]; /* pages are touched as they are used */

static void count(void *block, int sign) {
    if (!block) return;
    size_t size = malloc_usable_size(block);
    if (size < LEAST_BYTES) return;
    long long bytes = sign * (long long)size;
    long long now = atomic_fetch_add(&current_bytes, bytes) + bytes;
    long long peak = atomic_load(&peak_bytes);
    while (now > peak && !atomic_compare_exchange_weak(&peak_bytes, &peak, now)) {
    }
    size_t index = atomic_fetch_add(&event_count, 1);
    if (index < MOST_EVENTS) {
        struct timespec time;
        clock_gettime(CLOCK_MONOTONIC, &time);
        events[index] = (meter_event){time.tv_sec + time.tv_nsec * 1e-9, (uint64_t)(uintptr_t)block, bytes};
    }
}

void *malloc(size_t size) {
    void *block = __libc_malloc(size);
    count(block, 1);
    return block;
}

void *calloc(size_t number, size_t size) {
    void *block = __libc_calloc(number, size);
    count(block, 1);
    return block;
}

void *realloc(void *block, size_t size) {
    /* While it copies, both blocks are alive; glibc mostly moves pages instead, so they are not counted twice. */
    count(block, -1);
    void *moved = __libc_realloc(block, size);
    count(moved || !size ? moved : block, 1); /* on failure the old block stays */
    return moved;
}

void *memalign(size_t alignment, size_t size) {
    void *block = __libc_memalign(alignment, size);
    count(block, 1);
    return block;
}

void *aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }

int posix_memalign(void **result, size_t alignment, size_t size) {
    if (alignment % sizeof(void *) || (alignment & (alignment - 1)) || !alignment) return EINVAL;
    void *block = memalign(alignment, size);
    if (!block) return ENOMEM;
    *result = block;
    return 0;
}

void free(void *block) {
    count(block, -1);
    __libc_free(block);
}

long long meter_current(void) { return atomic_load(&current_bytes); }
long long meter_peak(void) { return atomic_load(&peak_bytes); }

/* Forgets the peak and the events; live blocks stay counted. */
void meter_reset(void) {
    atomic_store(&peak_bytes, atomic_load(&current_bytes));
    atomic_store(&event_count, 0);
}

/* Events since the last reset, lost ones included. */
size_t meter_event_count(void) { return atomic_load(&event_count); }
size_t meter_event_limit(void) { return MOST_EVENTS; }
const meter_event *meter_events(void) { return events; }
