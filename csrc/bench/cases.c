/* What csvfast itself does, per kernel and buffer size. */
#include <stdlib.h>
#include <string.h>

#include "bench.h"

static uint8_t *memory;      /* bench_settings.big bytes that every case works on */
static uint8_t *digests;     /* 32 bytes per page of it */
static csvf_xts key;
static csvf_pool *pool;

static const uint8_t key_bytes[32] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16,
                                      99, 98, 97, 96, 95, 94, 93, 92, 91, 90, 89, 88, 87, 86, 85, 84};

typedef struct span {
    size_t length;
} span;

static void must(int status) { bench_require(status == CSVF_OK, csvf_status_text(status)); }

static void run_xts_encrypt(void *context)
{
    must(csvf_xts_encrypt(&key, memory, memory, ((span *)context)->length, 4096, 7));
}

static void run_xts_decrypt(void *context)
{
    must(csvf_xts_decrypt(&key, memory, memory, ((span *)context)->length, 4096, 7));
}

static void run_pool_encrypt(void *context)
{
    must(csvf_pool_xts_encrypt(pool, &key, memory, memory, ((span *)context)->length, 4096, 7));
}

static void run_pool_decrypt(void *context)
{
    must(csvf_pool_xts_decrypt(pool, &key, memory, memory, ((span *)context)->length, 4096, 7));
}

static void run_ctr(void *context)
{
    const size_t length = ((span *)context)->length;
    for (size_t at = 0; at < length; at += 65536) {
        csvf_sm4_ctr ctr;
        must(csvf_sm4_ctr_init(&ctr, key_bytes, key_bytes + 16));
        must(csvf_sm4_ctr_crypt(&ctr, memory + at, memory + at, 65536));
    }
}

static void run_sm3(void *context)
{
    const size_t length = ((span *)context)->length;
    for (size_t at = 0; at < length; at += 1 << 20)
        csvf_sm3_digest(digests, memory + at, 1 << 20);
}

static void run_sm3_many(void *context)
{
    enum { BATCH = 256 };
    const uint8_t *data[BATCH];
    size_t lengths[BATCH];
    const size_t messages = ((span *)context)->length / 4096;
    for (size_t first = 0; first < messages; first += BATCH) {
        const size_t count = messages - first < BATCH ? messages - first : BATCH;
        for (size_t i = 0; i < count; i++) {
            data[i] = memory + (first + i) * 4096;
            lengths[i] = 4096;
        }
        csvf_sm3_many(digests + 32 * first, data, lengths, count);
    }
}

static void run_verity(void *context)
{
    must(csvf_sm3_blocks(digests, key_bytes, 32, memory, 4096, ((span *)context)->length / 4096));
}

static void run_pool_verity(void *context)
{
    must(csvf_pool_sm3_blocks(pool, digests, key_bytes, 32, memory, 4096, ((span *)context)->length / 4096));
}

static void run_memcpy(void *context)
{
    const size_t half = ((span *)context)->length / 2;
    memcpy(memory + half, memory, half);
    __asm__ volatile("" : : "r"(memory) : "memory");
}

/* ---- Engine ---- */

typedef struct engine_span {
    csvf_engine *engine;
    size_t length, stride;
    int linear, tree;
} engine_span;

static void run_write_pages(void *context)
{
    const engine_span *work = context;
    for (size_t at = 0; at < work->length; at += 4096)
        must(csvf_write(work->engine, 1, at, digests, 4096));
}

/* work->length / 64 line writes, the next one `stride` bytes on. */
static void run_lines(void *context)
{
    const engine_span *work = context;
    const size_t size = csvf_engine_size(work->engine);
    size_t at = 0;
    for (size_t i = 0; i < work->length / 64; i++) {
        must(csvf_write_line(work->engine, 1, at, digests));
        at += work->stride;
        if (at >= size)
            at = (at + 64) % 4096;
    }
}

static void run_line_reads(void *context)
{
    const engine_span *work = context;
    const size_t size = csvf_engine_size(work->engine);
    size_t at = 0;
    for (size_t i = 0; i < work->length / 64; i++) {
        must(csvf_read_line(work->engine, digests, 1, at));
        at += work->stride;
        if (at >= size)
            at = (at + 64) % 4096;
    }
}

static void run_many_lines(void *context)
{
    enum { LINES = 256 };
    static uint64_t addresses[LINES];
    if (!addresses[1])
        for (size_t i = 0; i < LINES; i++)
            addresses[i] = (i * 2654435761u % 100000) * 4096 + i % 64 * 64;     /* every line in another page */
    const size_t length = ((span *)context)->length;
    for (size_t at = 0; at < length; at += LINES * 64)
        must(csvf_xts_encrypt_lines(&key, memory + at, memory + at, addresses, LINES));
}

static void run_launch(void *context)
{
    const engine_span *work = context;
    csvf_sm3 sm3;
    csvf_sm3_init(&sm3);
    must(csvf_launch_update(work->engine, work->linear ? &sm3 : NULL, work->tree ? digests : NULL, 1, 0, work->length));
}

static csvf_engine *make_engine(size_t size, unsigned threads)
{
    csvf_config config = {.struct_size = sizeof config, .threads = threads,
                          .standard = bench_settings.ieee ? CSVF_STANDARD_IEEE : CSVF_STANDARD_GB};
    csvf_engine *engine;
    must(csvf_engine_create_on(&engine, memory, size, &config));
    must(csvf_asid_install(engine, 1, key_bytes, 32));
    return engine;
}

/* ---- Lists ---- */

static void measure(const char *name, const char *variant, const char *kernel, size_t length, size_t operations,
                    unsigned threads, void (*run)(void *), void *context)
{
    bench_measure(&(bench_case){.name = name, .variant = variant, .kernel = kernel, .buffer = length, .operations = operations,
                                .threads = threads, .run = run, .context = context});
}

static const size_t small_sizes[] = {32 << 10, 512 << 10};   /* L1 and L2 */

static void sm4_cases(const char *kernel)
{
    must(csvf_xts_init(&key, key_bytes, bench_settings.ieee ? CSVF_STANDARD_IEEE : CSVF_STANDARD_GB));
    const size_t big = bench_settings.big;
    const size_t sizes[] = {4096, small_sizes[0], small_sizes[1], big};
    const unsigned threads = bench_settings.threads;
    for (size_t i = 0; i < 4; i++)
        measure("sm4-xts-encrypt/4096", i ? "" : "one page a call", kernel, sizes[i], 0, 1, run_xts_encrypt, &(span){sizes[i]});
    for (size_t i = 0; i < 4; i++)
        measure("sm4-xts-decrypt/4096", i ? "" : "one page a call", kernel, sizes[i], 0, 1, run_xts_decrypt, &(span){sizes[i]});
    if (threads > 1) {
        measure("sm4-xts-encrypt/4096", "", kernel, big, 0, threads, run_pool_encrypt, &(span){big});
        measure("sm4-xts-decrypt/4096", "", kernel, big, 0, threads, run_pool_decrypt, &(span){big});
    }
    if (bench_wanted("sm4-xts-line/64")) {
        /* Cached: lines of 64 pages in turn. Uncached: 4096 pages in turn, four times what the tweak cache holds. */
        csvf_engine *few = make_engine(64 * 4096, 1), *most = make_engine(4096 * 4096, 1);
        measure("sm4-xts-line/64", "write cached", kernel, 1 << 20, (1 << 20) / 64, 1, run_lines, &(engine_span){few, 1 << 20, 4096, 0, 0});
        measure("sm4-xts-line/64", "read cached", kernel, 1 << 20, (1 << 20) / 64, 1, run_line_reads, &(engine_span){few, 1 << 20, 4096, 0, 0});
        measure("sm4-xts-line/64", "write uncached", kernel, 1 << 20, (1 << 20) / 64, 1, run_lines, &(engine_span){most, 1 << 20, 4096, 0, 0});
        measure("sm4-xts-line/64", "many", kernel, 32 << 10, (32 << 10) / 64, 1, run_many_lines, &(span){32 << 10});
        csvf_engine_destroy(few);
        csvf_engine_destroy(most);
    }
    measure("sm4-ctr/65536", "", kernel, 65536, 0, 1, run_ctr, &(span){65536});
    measure("sm4-ctr/65536", "", kernel, big, 0, 1, run_ctr, &(span){big});
    if (bench_wanted("memory-write/4096")) {
        csvf_engine *engine = make_engine(big, 1);
        measure("memory-write/4096", "", kernel, small_sizes[1], small_sizes[1] / 4096, 1, run_write_pages,
                &(engine_span){engine, small_sizes[1], 0, 0, 0});
        measure("memory-write/4096", "", kernel, big, big / 4096, 1, run_write_pages, &(engine_span){engine, big, 0, 0, 0});
        csvf_engine_destroy(engine);
    }
    if (bench_wanted("launch-encrypt-measure"))
        for (unsigned t = 1; t <= threads; t += threads > 1 ? threads - 1 : 1) {
            csvf_engine *engine = make_engine(big, t);
            measure("launch-encrypt-measure", "linear", kernel, big, 0, t, run_launch, &(engine_span){engine, big, 0, 1, 0});
            measure("launch-encrypt-measure", "tree", kernel, big, 0, t, run_launch, &(engine_span){engine, big, 0, 0, 1});
            measure("launch-encrypt-measure", "linear+tree", kernel, big, 0, t, run_launch, &(engine_span){engine, big, 0, 1, 1});
            csvf_engine_destroy(engine);
        }
}

static void sm3_cases(const char *kernel)
{
    const size_t big = bench_settings.big;
    measure("sm3/1048576", "", kernel, 1 << 20, 0, 1, run_sm3, &(span){1 << 20});
    measure("sm3/1048576", "", kernel, big, 0, 1, run_sm3, &(span){big});
}

static void sm3_many_cases(const char *kernel)
{
    const size_t big = bench_settings.big, sizes[] = {128 << 10, small_sizes[1], big};
    for (size_t i = 0; i < 3; i++)
        measure("sm3-many/4096", "", kernel, sizes[i], 0, 1, run_sm3_many, &(span){sizes[i]});
    for (size_t i = 0; i < 3; i++)
        measure("verity-sm3/4096", "", kernel, sizes[i], 0, 1, run_verity, &(span){sizes[i]});
    if (bench_settings.threads > 1)
        measure("verity-sm3/4096", "", kernel, big, 0, bench_settings.threads, run_pool_verity, &(span){big});
}

static void for_each_kernel(int primitive, void (*cases)(const char *kernel))
{
    for (size_t i = 0; i < csvf_kernel_count(primitive); i++) {
        const char *name = csvf_kernel_at(primitive, i);
        if (!csvf_kernel_available(primitive, name) || (bench_settings.kernel && strcmp(bench_settings.kernel, name)))
            continue;
        must(csvf_force_kernel(primitive, name));
        cases(name);
    }
    must(csvf_force_kernel(primitive, NULL));
}

void bench_own_cases(void)
{
    memory = bench_memory(bench_settings.big);
    digests = bench_memory(bench_settings.big / 4096 * 32);
    if (bench_settings.threads > 1)
        must(csvf_pool_create(&pool, bench_settings.threads));
    for_each_kernel(CSVF_PRIMITIVE_SM4, sm4_cases);
    for_each_kernel(CSVF_PRIMITIVE_SM3, sm3_cases);
    for_each_kernel(CSVF_PRIMITIVE_SM3_MANY, sm3_many_cases);
    const size_t sizes[] = {small_sizes[0], small_sizes[1], bench_settings.big};
    for (size_t i = 0; i < 3; i++)
        measure("memcpy", "", "-", sizes[i] / 2, 0, 1, run_memcpy, &(span){sizes[i]});
    csvf_pool_destroy(pool);
    free(memory);
    free(digests);
}
