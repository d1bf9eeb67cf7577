/* A plugin for unmodified QEMU (TCG, 7.2 and other versions of plugin API 1): every memory access of the guest goes through a core's
 * modelled caches over encrypted DRAM, and at the end the counts say what encryption would have cost. The guest itself is not slowed by SM4
 * nor encrypted by this: for that, see docs/encrypted-ram.md.
 *
 *     qemu-system-x86_64 -plugin ./qemu_plugin.so,memory=256 -m 256 ...
 *
 * Counts are those of physical addresses below `memory` MiB, data only: plugins are not told of instruction fetches as accesses. */
#include <csvfast.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- The few declarations of qemu-plugin.h that are used here: API version 1, QEMU 7.2. Distributions often do not ship the header. */
typedef uint64_t qemu_plugin_id_t;
typedef uint32_t qemu_plugin_meminfo_t;
typedef struct qemu_info_t {
    const char *target_name;
    struct { int min, cur; } version;
    bool system_emulation;
    struct { int smp_vcpus, max_vcpus; } system;
} qemu_info_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
struct qemu_plugin_hwaddr;
enum { QEMU_PLUGIN_CB_NO_REGS = 0, QEMU_PLUGIN_MEM_RW = 3 };
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *tb);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *tb, size_t index);
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t id, void (*callback)(qemu_plugin_id_t, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_mem_cb(struct qemu_plugin_insn *insn,
                                      void (*callback)(unsigned, qemu_plugin_meminfo_t, uint64_t, void *), int flags, int rw,
                                      void *context);
void qemu_plugin_register_atexit_cb(qemu_plugin_id_t id, void (*callback)(qemu_plugin_id_t, void *), void *context);
unsigned qemu_plugin_mem_size_shift(qemu_plugin_meminfo_t info);
bool qemu_plugin_mem_is_store(qemu_plugin_meminfo_t info);
struct qemu_plugin_hwaddr *qemu_plugin_get_hwaddr(qemu_plugin_meminfo_t info, uint64_t address);
bool qemu_plugin_hwaddr_is_io(const struct qemu_plugin_hwaddr *address);
uint64_t qemu_plugin_hwaddr_phys_addr(const struct qemu_plugin_hwaddr *address);

#define EXPORT __attribute__((visibility("default")))
EXPORT int qemu_plugin_version = 1;
EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv);
/* ---- */

static csvf_engine *engine;
static csvf_cache *cache;       /* all vCPUs share one model core: a cache object is for one thread at a time */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t outside;

static void on_access(unsigned vcpu, qemu_plugin_meminfo_t info, uint64_t virtual_address, void *context)
{
    (void)vcpu, (void)context;
    const struct qemu_plugin_hwaddr *place = qemu_plugin_get_hwaddr(info, virtual_address);
    if (!place || qemu_plugin_hwaddr_is_io(place))
        return;
    const csvf_trace_access access = {.address = qemu_plugin_hwaddr_phys_addr(place),
                                      .length = 1u << qemu_plugin_mem_size_shift(info),
                                      .access = qemu_plugin_mem_is_store(info) ? CSVF_ACCESS_WRITE : CSVF_ACCESS_READ};
    pthread_mutex_lock(&lock);
    if (csvf_cache_run(cache, NULL, 1, &access, 1, 0, 1) != CSVF_OK)
        outside++;      /* ROM, or RAM above what the engine has */
    pthread_mutex_unlock(&lock);
}

static void on_translation(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
    (void)id;
    for (size_t i = 0; i < qemu_plugin_tb_n_insns(tb); i++)
        qemu_plugin_register_vcpu_mem_cb(qemu_plugin_tb_get_insn(tb, i), on_access, QEMU_PLUGIN_CB_NO_REGS, QEMU_PLUGIN_MEM_RW, NULL);
}

static void on_exit_of_qemu(qemu_plugin_id_t id, void *context)
{
    csvf_cache_stats stats = {.struct_size = sizeof stats};
    (void)id, (void)context;
    csvf_cache_write_back(cache);
    csvf_cache_fabric_flush(cache);
    if (csvf_cache_statistics(cache, &stats, 1) == CSVF_OK)
        printf("csvfast: reads %" PRIu64 " writes %" PRIu64 " hits %" PRIu64 "/%" PRIu64 "/%" PRIu64 " misses %" PRIu64
               " write-backs %" PRIu64 " decrypted %" PRIu64 " encrypted %" PRIu64 " outside %" PRIu64 "\n",
               stats.reads, stats.writes, stats.hits[0], stats.hits[1], stats.hits[2], stats.misses, stats.write_backs,
               stats.bytes_decrypted, stats.bytes_encrypted, outside);
    fflush(stdout);
}

int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv)
{
    unsigned long megabytes = 128;
    for (int i = 0; i < argc; i++)
        if (strncmp(argv[i], "memory=", 7) == 0)
            megabytes = strtoul(argv[i] + 7, NULL, 10);
    if (!info->system_emulation || megabytes == 0 || megabytes > 1 << 20) {
        fprintf(stderr, "csvfast: this plugin is for qemu-system-*; memory=MiB is 1 .. 1048576\n");
        return -1;
    }
    int status = csvf_init();
    if (status == CSVF_OK)
        status = csvf_engine_create(&engine, (size_t)megabytes << 20, NULL);
    if (status == CSVF_OK)
        status = csvf_asid_generate(engine, 1);
    if (status == CSVF_OK)
        status = csvf_cache_create(&cache, engine, NULL);
    if (status != CSVF_OK) {
        fprintf(stderr, "csvfast: %s\n", csvf_status_text(status));
        return -1;
    }
    qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
    qemu_plugin_register_atexit_cb(id, on_exit_of_qemu, NULL);
    return 0;
}
