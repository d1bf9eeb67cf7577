/* Life of an engine, its keys and its statistics. */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "../sm2/sm2_objects.h"
#include "engine.h"

enum { ASID_DEFAULT = 509, ASID_LIMIT = 65535 };

static const size_t huge_page = (size_t)2 << 20;

/* Copies the caller's config over the defaults and checks every field. A longer struct of a newer caller is accepted as long as what
 * this version does not know is zero. */
static int read_config(csvf_config *settings, const csvf_config *config, size_t size)
{
    *settings = (csvf_config){.struct_size = sizeof *settings, .asid_max = ASID_DEFAULT};
    if (config) {
        if (config->struct_size < sizeof *config)
            return CSVF_ERR_ARGUMENT;
        for (size_t i = sizeof *config; i < config->struct_size; i++)
            if (((const uint8_t *)config)[i])
                return CSVF_ERR_ARGUMENT;
        *settings = *config;
        if (settings->asid_max == 0)
            settings->asid_max = ASID_DEFAULT;
    }
    if (size == 0 || size % CSVF_PAGE_BYTES)
        return CSVF_ERR_LENGTH;
    if (settings->base_address % CSVF_PAGE_BYTES)
        return CSVF_ERR_ALIGNMENT;
    if (settings->base_address > UINT64_MAX - size || settings->asid_max > ASID_LIMIT ||
        (settings->standard != CSVF_STANDARD_GB && settings->standard != CSVF_STANDARD_IEEE) ||
        (settings->tweak_model != CSVF_TWEAK_XTS && settings->tweak_model != CSVF_TWEAK_LINE))
        return CSVF_ERR_ARGUMENT;
    return CSVF_OK;
}

static int map_failure(void) { return errno == ENOMEM ? CSVF_ERR_MEMORY : CSVF_ERR_SYSTEM; }

/* Everything but the DRAM. */
static int create_parts(csvf_engine **result, size_t size, const csvf_config *config)
{
    csvf_config settings;
    int status = read_config(&settings, config, size);
    if (status != CSVF_OK)
        return status;
    csvf_engine *engine = mmap(NULL, sizeof *engine, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (engine == MAP_FAILED)
        return CSVF_ERR_MEMORY;
    (void)madvise(engine, sizeof *engine, MADV_DONTDUMP);   /* the tweak cache is derived from keys */
    engine->size = size;
    engine->base = settings.base_address;
    engine->standard = settings.standard;
    engine->tweak_model = settings.tweak_model;
    engine->backing = CSVF__CALLERS_MEMORY;
    status = csvf__keytable_create(&engine->keys, settings.asid_max);
    if (status == CSVF_OK && settings.threads > 1)
        status = csvf_pool_create(&engine->pool, settings.threads);
    if (status != CSVF_OK) {
        const int saved = errno;
        csvf_engine_destroy(engine);
        errno = saved;
        return status;
    }
    *result = engine;
    return CSVF_OK;
}

int csvf_engine_create(csvf_engine **result, size_t size, const csvf_config *config)
{
    if (!result)
        return CSVF_ERR_ARGUMENT;
    *result = NULL;
    csvf_engine *engine;
    const int status = create_parts(&engine, size, config);
    if (status != CSVF_OK)
        return status;

    /* Whole huge pages must lie on their own boundaries: map one more and use the aligned part. */
    const size_t slack = size >= huge_page ? huge_page : 0;
    if (size > SIZE_MAX - slack) {
        csvf_engine_destroy(engine);
        return CSVF_ERR_MEMORY;
    }
    void *mapping = mmap(NULL, size + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping == MAP_FAILED) {
        const int failure = map_failure(), saved = errno;
        csvf_engine_destroy(engine);
        errno = saved;
        return failure;
    }
    engine->backing = CSVF__OWN_MEMORY;
    engine->mapping = mapping;
    engine->mapping_length = size + slack;
    engine->dram = mapping;
    if (slack) {
        engine->dram = (uint8_t *)(((uintptr_t)mapping + huge_page - 1) / huge_page * huge_page);
        (void)madvise(engine->dram, size, MADV_HUGEPAGE);
    }
    *result = engine;
    return CSVF_OK;
}

int csvf_engine_create_on(csvf_engine **result, void *dram, size_t size, const csvf_config *config)
{
    if (!result)
        return CSVF_ERR_ARGUMENT;
    *result = NULL;
    if (!dram || (uintptr_t)dram > UINTPTR_MAX - size)
        return CSVF_ERR_ARGUMENT;
    if ((uintptr_t)dram % CSVF_LINE_BYTES)
        return CSVF_ERR_ALIGNMENT;
    csvf_engine *engine;
    const int status = create_parts(&engine, size, config);
    if (status != CSVF_OK)
        return status;
    engine->dram = dram;
    *result = engine;
    return CSVF_OK;
}

/* The file must be long enough now. Should somebody cut it later, or the file system run out of space or fail while a hole is
 * filled, then the next access raises SIGBUS in the accessing thread, as for every shared mapping: no library can turn
 * that into an error code without taking over the program's signals. Callers that cannot rule it out allocate the file's space first
 * (posix_fallocate) and keep it locked or unlinked. */
int csvf_engine_create_file(csvf_engine **result, int fd, uint64_t offset, size_t size, const csvf_config *config)
{
    if (!result)
        return CSVF_ERR_ARGUMENT;
    *result = NULL;
    if (offset % CSVF_PAGE_BYTES)
        return CSVF_ERR_ALIGNMENT;
    if (offset > (uint64_t)INT64_MAX || size > (uint64_t)INT64_MAX - offset)
        return CSVF_ERR_ARGUMENT;
    struct stat about;
    if (fstat(fd, &about))
        return CSVF_ERR_SYSTEM;
    if (!S_ISREG(about.st_mode))
        return CSVF_ERR_ARGUMENT;
    csvf_engine *engine;
    const int status = create_parts(&engine, size, config);
    if (status != CSVF_OK)
        return status;
    if ((uint64_t)about.st_size < offset + size) {
        csvf_engine_destroy(engine);
        return CSVF_ERR_LENGTH;
    }
    void *mapping = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)offset);
    if (mapping == MAP_FAILED) {
        const int failure = map_failure(), saved = errno;
        csvf_engine_destroy(engine);
        errno = saved;
        return failure;
    }
    engine->backing = CSVF__FILE_MAPPING;
    engine->dram = engine->mapping = mapping;
    engine->mapping_length = size;
    *result = engine;
    return CSVF_OK;
}

void csvf_engine_destroy(csvf_engine *engine)
{
    if (!engine)
        return;
    csvf_pool_destroy(engine->pool);
    csvf__keytable_destroy(&engine->keys);
    if (engine->mapping)
        munmap(engine->mapping, engine->mapping_length);
    csvf_wipe(engine, sizeof *engine);
    munmap(engine, sizeof *engine);
}

uint8_t *csvf_engine_dram(csvf_engine *engine) { return engine ? engine->dram : NULL; }
size_t csvf_engine_size(const csvf_engine *engine) { return engine ? engine->size : 0; }
uint64_t csvf_engine_base(const csvf_engine *engine) { return engine ? engine->base : 0; }

int csvf_engine_sync(csvf_engine *engine)
{
    if (!engine)
        return CSVF_ERR_ARGUMENT;
    if (engine->backing == CSVF__FILE_MAPPING && msync(engine->mapping, engine->mapping_length, MS_SYNC))
        return CSVF_ERR_SYSTEM;
    return CSVF_OK;
}

int csvf_engine_set_observer(csvf_engine *engine, csvf_observer observer, void *context)
{
    if (!engine)
        return CSVF_ERR_ARGUMENT;
    engine->observer = observer;
    engine->observer_context = context;
    return CSVF_OK;
}

/* ---- Keys ---- */

static void observe_key(const csvf_engine *engine, int kind, uint32_t asid, uint64_t generation)
{
    if (engine->observer) {
        const csvf_event event = {.generation = generation, .asid = asid, .kind = kind};
        engine->observer(engine->observer_context, &event);
    }
}

int csvf_asid_install(csvf_engine *engine, uint32_t asid, const uint8_t *key, size_t key_length)
{
    if (!engine || !key)
        return CSVF_ERR_ARGUMENT;
    if (key_length != CSVF_XTS_KEY_BYTES)
        return CSVF_ERR_LENGTH;
    if (asid == 0 || asid > engine->keys.asid_max)
        return CSVF_ERR_ASID;
    uint64_t generation;
    const int status = csvf__keytable_install(&engine->keys, &generation, asid, key, engine->standard);
    if (status == CSVF_OK) {
        atomic_fetch_add(&engine->installed, 1);
        observe_key(engine, CSVF_EVENT_INSTALL, asid, generation);
    }
    return status;
}

/* A generation read before the key is made: should another thread install and remove a key in between, then a deterministic key is that
 * of a generation earlier; threads that race for one ASID do not repeat anyway. */
int csvf_asid_generate(csvf_engine *engine, uint32_t asid)
{
    uint64_t generation;
    uint8_t key[CSVF_XTS_KEY_BYTES];
    int status = csvf_asid_state(engine, &generation, NULL, asid);
    if (status != CSVF_OK)
        return status;
    if (engine->is_deterministic) {
        static const char label[34] = "csvfast insecure deterministic key";     /* without its zero */
        uint8_t secret[CSVF_SM3_BYTES + sizeof label + 4 + 8];
        uint8_t *at = secret + CSVF_SM3_BYTES + sizeof label;
        memcpy(secret, engine->seed, CSVF_SM3_BYTES);
        memcpy(secret + CSVF_SM3_BYTES, label, sizeof label);
        for (int i = 0; i < 4; i++)
            *at++ = (uint8_t)(asid >> 8 * i);
        for (int i = 0; i < 8; i++)
            *at++ = (uint8_t)((generation + 1) >> 8 * i);
        status = csvf_sm3_kdf(key, sizeof key, secret, sizeof secret);
        csvf_wipe(secret, sizeof secret);
    } else {
        status = csvf__sm2_random(key, sizeof key);
    }
    if (status == CSVF_OK)
        status = csvf_asid_install(engine, asid, key, sizeof key);
    csvf_wipe(key, sizeof key);
    return status;
}

int csvf_engine_set_deterministic_insecure(csvf_engine *engine, const void *seed, size_t length)
{
    if (!engine || (!seed && length))
        return CSVF_ERR_ARGUMENT;
    if (engine->is_deterministic || atomic_load(&engine->installed))
        return CSVF_ERR_STATE;
    csvf_sm3_digest(engine->seed, seed, length);
    engine->is_deterministic = 1;
    return CSVF_OK;
}

int csvf_engine_is_deterministic(const csvf_engine *engine) { return engine ? engine->is_deterministic : 0; }

int csvf_asid_remove(csvf_engine *engine, uint32_t asid)
{
    if (!engine)
        return CSVF_ERR_ARGUMENT;
    if (asid == 0 || asid > engine->keys.asid_max)
        return CSVF_ERR_ASID;
    const int status = csvf__keytable_remove_begin(&engine->keys, asid);
    if (status != CSVF_OK)
        return status;
    const uint64_t generation = atomic_load(&engine->keys.states[asid]) >> CSVF__KEY_STATE_BITS;
    csvf__tweak_forget(&engine->tweaks, asid);
    atomic_fetch_add(&engine->removed, 1);
    csvf__keytable_remove_end(&engine->keys, asid);
    observe_key(engine, CSVF_EVENT_REMOVE, asid, generation);
    return CSVF_OK;
}

int csvf_asid_state(const csvf_engine *engine, uint64_t *generation, int *installed, uint32_t asid)
{
    if (!engine)
        return CSVF_ERR_ARGUMENT;
    if (asid == 0 || asid > engine->keys.asid_max)
        return CSVF_ERR_ASID;
    const uint64_t state = atomic_load(&engine->keys.states[asid]);
    if (generation)
        *generation = state >> CSVF__KEY_STATE_BITS;
    if (installed)
        *installed = (state & ((1u << CSVF__KEY_STATE_BITS) - 1)) == CSVF__KEY_ACTIVE;
    return CSVF_OK;
}

int csvf_engine_stats(const csvf_engine *engine, csvf_stats *stats)
{
    if (!engine || !stats || stats->struct_size < sizeof *stats)
        return CSVF_ERR_ARGUMENT;
    csvf_stats sum = {.struct_size = stats->struct_size};
    for (int i = 0; i < CSVF__STRIPES; i++) {
        const csvf__counters *counters = &engine->counters[i];
        sum.bytes_encrypted += atomic_load_explicit(&counters->encrypted, memory_order_relaxed);
        sum.bytes_decrypted += atomic_load_explicit(&counters->decrypted, memory_order_relaxed);
        sum.bytes_host += atomic_load_explicit(&counters->host, memory_order_relaxed);
        sum.read_modify_writes += atomic_load_explicit(&counters->merged, memory_order_relaxed);
        sum.tweak_hits += atomic_load_explicit(&counters->hits, memory_order_relaxed);
        sum.tweak_misses += atomic_load_explicit(&counters->misses, memory_order_relaxed);
    }
    /* Removed first: read the other way round, a removal in between could make the difference negative. */
    sum.keys_removed = atomic_load(&engine->removed);
    sum.keys_installed = atomic_load(&engine->installed);
    sum.asids_active = (uint32_t)(sum.keys_installed - sum.keys_removed);
    *stats = sum;
    return CSVF_OK;
}
