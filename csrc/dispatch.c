/* Which kernels exist, which this CPU can run, and which is in use.
 *
 * The lists of kernels belong to their primitives (sm4/sm4.c, sm3/sm3.c, sm4/sm4_gcm.c, sm2/sm2.c), so this file names no kernel. The only
 * globals of the library are here: the CPU's features, the defaults found by csvf_init, and one atomic pointer per
 * primitive. Every function may be called from any thread at any time.
 *
 * CPUID and XGETBV: Intel SDM volume 1, 14.3 and 15.4 (the order of the checks); AMD APM volume 3, appendix E. Feature bits decide,
 * never the vendor: Hygon parts report "HygonGenuine". */
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "cpu.h"
#include "include/csvfast.h"
#include "sm2/sm2_kernel.h"
#include "sm3/sm3_kernel.h"
#include "sm4/ghash_kernel.h"
#include "sm4/sm4_kernel.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

/* ---- CPU ---- */

static const struct {
    const char *name;
    uint32_t bit;
} features[] = {
    {"aes", CSVF_CPU_AES}, {"pclmul", CSVF_CPU_PCLMUL}, {"avx2", CSVF_CPU_AVX2}, {"bmi2", CSVF_CPU_BMI2}, {"adx", CSVF_CPU_ADX},
    {"gfni", CSVF_CPU_GFNI}, {"vaes", CSVF_CPU_VAES}, {"avx512", CSVF_CPU_AVX512}, {"ifma", CSVF_CPU_IFMA},
    {"sha", CSVF_CPU_SHA},
};
enum { FEATURE_COUNT = sizeof features / sizeof features[0] };

static pthread_once_t cpu_once = PTHREAD_ONCE_INIT;
static uint32_t cpu_found;
static int cpu_status = CSVF_OK;       /* CSVF_ERR_KERNEL when CSVFAST_DISABLE names an unknown feature */
static char cpu_text[64];

#if defined(__x86_64__)
static uint64_t xcr0(void)
{
    uint32_t low, high;
    __asm__ __volatile__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

static uint32_t detect(void)
{
    uint32_t a, b, c, d, found = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d))
        return 0;
    const int has_sse41 = c >> 19 & 1;
    const int has_aes = c >> 25 & 1, has_pclmul = c >> 1 & 1, has_avx = c >> 28 & 1, has_osxsave = c >> 27 & 1;
    const uint64_t enabled = has_osxsave ? xcr0() : 0;
    const int ymm = has_avx && (enabled & 0x06) == 0x06;
    const int zmm = ymm && (enabled & 0xE6) == 0xE6;

    if (has_aes) found |= CSVF_CPU_AES;
    if (has_pclmul) found |= CSVF_CPU_PCLMUL;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d))
        return found;
    if (ymm && (b >> 5 & 1)) found |= CSVF_CPU_AVX2;
    if (b >> 8 & 1) found |= CSVF_CPU_BMI2;
    if (b >> 19 & 1) found |= CSVF_CPU_ADX;
    if (has_sse41 && (b >> 29 & 1)) found |= CSVF_CPU_SHA;
    /* The kernels use the VEX and EVEX forms of GFNI and VAES, which need the ymm state. */
    if (ymm && (c >> 8 & 1)) found |= CSVF_CPU_GFNI;
    if (ymm && (c >> 9 & 1)) found |= CSVF_CPU_VAES;
    const uint32_t need_b = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;   /* F, DQ, BW, VL */
    if (zmm && (b & need_b) == need_b && (c >> 1 & 1)) found |= CSVF_CPU_AVX512;   /* and VBMI */
    if (zmm && (b & need_b) == need_b && (b >> 21 & 1)) found |= CSVF_CPU_IFMA;
    return found;
}
#else
static uint32_t detect(void) { return 0; }
#endif

static void cpu_init(void)
{
    uint32_t found = detect();
    const char *list = getenv("CSVFAST_DISABLE");
    while (list && *list) {
        const size_t length = strcspn(list, ",");
        size_t i = 0;
        while (i < FEATURE_COUNT && !(strlen(features[i].name) == length && !strncmp(features[i].name, list, length)))
            i++;
        if (i == FEATURE_COUNT)
            cpu_status = CSVF_ERR_KERNEL;
        else
            found &= ~features[i].bit;
        list += length;
        list += *list == ',';
    }
    /* Every wider kernel uses AVX2 forms too. */
    if (!(found & CSVF_CPU_AVX2))
        found &= ~(uint32_t)CSVF_CPU_AVX512;
    if (!(found & CSVF_CPU_AVX512))
        found &= ~(uint32_t)CSVF_CPU_IFMA;
    cpu_found = found;
    for (size_t i = 0; i < FEATURE_COUNT; i++)
        if (found & features[i].bit) {
            if (*cpu_text)
                strcat(cpu_text, " ");
            strcat(cpu_text, features[i].name);
        }
}

uint32_t csvf__cpu(void)
{
    pthread_once(&cpu_once, cpu_init);
    return cpu_found;
}

const char *csvf_cpu_features(void)
{
    (void)csvf__cpu();
    return cpu_text;
}

/* ---- Kernels ---- */

typedef struct kernel {
    const void *table;      /* NULL past the end of the list */
    const char *name;
    uint32_t features;
} kernel;

static const char *const primitive_names[CSVF_PRIMITIVE_COUNT] = {"sm4", "sm3", "sm3-many", "ghash", "sm2", "sm2-many"};

static int is_primitive(int primitive) { return primitive >= 0 && primitive < CSVF_PRIMITIVE_COUNT; }

/* The lists have different types; this is the one place that knows. */
#define KERNEL_OF(list, index) ((list)[index] ? (kernel){(list)[index], (list)[index]->name, (list)[index]->features} : none)

static kernel kernel_of(int primitive, size_t index)
{
    const kernel none = {NULL, NULL, 0};
    switch (primitive) {
    case CSVF_PRIMITIVE_SM4: return KERNEL_OF(csvf__sm4_kernels, index);
    case CSVF_PRIMITIVE_SM3: return KERNEL_OF(csvf__sm3_kernels, index);
    case CSVF_PRIMITIVE_SM3_MANY: return KERNEL_OF(csvf__sm3_many_kernels, index);
    case CSVF_PRIMITIVE_GHASH: return KERNEL_OF(csvf__ghash_kernels, index);
    case CSVF_PRIMITIVE_SM2: return KERNEL_OF(csvf__sm2_kernels, index);
    case CSVF_PRIMITIVE_SM2_MANY: return KERNEL_OF(csvf__sm2_many_kernels, index);
    default: return none;
    }
}

static int runs_here(kernel candidate) { return (candidate.features & ~csvf__cpu()) == 0; }

static kernel find_name(int primitive, const char *name, size_t length)
{
    kernel candidate;
    for (size_t i = 0; (candidate = kernel_of(primitive, i)).table; i++)
        if (strlen(candidate.name) == length && !memcmp(candidate.name, name, length))
            break;
    return candidate;
}

static kernel find_table(int primitive, const void *table)
{
    kernel candidate;
    for (size_t i = 0; (candidate = kernel_of(primitive, i)).table; i++)
        if (candidate.table == table)
            break;
    return candidate;
}

/* ---- Choice ---- */

static pthread_once_t choice_once = PTHREAD_ONCE_INIT;
static int choice_status;
static const void *defaults[CSVF_PRIMITIVE_COUNT];
static _Atomic(const void *) chosen[CSVF_PRIMITIVE_COUNT];

/* Best kernel this CPU runs, or with needs_nothing the best that runs on any CPU (the portable one). */
static const void *best(int primitive, int needs_nothing)
{
    kernel candidate;
    for (size_t i = 0; (candidate = kernel_of(primitive, i)).table; i++)
        if (needs_nothing ? candidate.features == 0 : runs_here(candidate))
            break;
    return candidate.table;
}

static int primitive_of(const char *name, size_t length)
{
    for (int i = 0; i < CSVF_PRIMITIVE_COUNT; i++)
        if (strlen(primitive_names[i]) == length && !memcmp(primitive_names[i], name, length))
            return i;
    return -1;
}

/* Applies one kernel name to one primitive. Returns 1 if it has such a kernel, 0 if not, negative if the CPU cannot run it. */
static int choose(int primitive, const char *name, size_t length)
{
    const kernel candidate = find_name(primitive, name, length);
    if (!candidate.table)
        return 0;
    if (!runs_here(candidate))
        return CSVF_ERR_KERNEL;
    defaults[primitive] = candidate.table;
    return 1;
}

static int choose_for_all(const char *name)
{
    int known = 0;
    for (int i = 0; i < CSVF_PRIMITIVE_COUNT; i++) {
        const int result = choose(i, name, strlen(name));
        if (result < 0)
            return result;
        known |= result;
    }
    return known ? CSVF_OK : CSVF_ERR_KERNEL;
}

static int choose_from_list(const char *list)
{
    while (*list) {
        const size_t length = strcspn(list, ",");
        const char *equals = memchr(list, '=', length);
        if (!equals)
            return CSVF_ERR_KERNEL;
        const int primitive = primitive_of(list, (size_t)(equals - list));
        if (primitive < 0 || choose(primitive, equals + 1, length - (size_t)(equals + 1 - list)) != 1)
            return CSVF_ERR_KERNEL;
        list += length;
        list += *list == ',';
    }
    return CSVF_OK;
}

static void choice_init(void)
{
    (void)csvf__cpu();
    for (int i = 0; i < CSVF_PRIMITIVE_COUNT; i++)
        defaults[i] = best(i, 0);
    int status = cpu_status;
    const char *wish = getenv("CSVFAST_KERNEL");
    if (status == CSVF_OK && wish && *wish)
        status = strchr(wish, '=') ? choose_from_list(wish) : choose_for_all(wish);
    if (status != CSVF_OK)
        for (int i = 0; i < CSVF_PRIMITIVE_COUNT; i++)
            defaults[i] = best(i, 1);
    choice_status = status;
    for (int i = 0; i < CSVF_PRIMITIVE_COUNT; i++)
        atomic_store_explicit(&chosen[i], defaults[i], memory_order_release);
}

int csvf_init(void)
{
    pthread_once(&choice_once, choice_init);
    return choice_status;
}

/* One load on the fast path: this stands in front of every hash of a short message. */
static const void *in_use(int primitive)
{
    const void *table = atomic_load_explicit(&chosen[primitive], memory_order_acquire);
    if (__builtin_expect(table == NULL, 0)) {
        (void)csvf_init();
        table = atomic_load_explicit(&chosen[primitive], memory_order_acquire);
    }
    return table;
}

const csvf_sm4_kernel *csvf__sm4(void) { return in_use(CSVF_PRIMITIVE_SM4); }
const csvf_sm3_kernel *csvf__sm3(void) { return in_use(CSVF_PRIMITIVE_SM3); }
const csvf_sm3_many_kernel *csvf__sm3_many(void) { return in_use(CSVF_PRIMITIVE_SM3_MANY); }
const csvf_ghash_kernel *csvf__ghash(void) { return in_use(CSVF_PRIMITIVE_GHASH); }
const csvf_sm2_kernel *csvf__sm2(void) { return in_use(CSVF_PRIMITIVE_SM2); }
const csvf_sm2_many_kernel *csvf__sm2_many(void) { return in_use(CSVF_PRIMITIVE_SM2_MANY); }

/* ---- Public ---- */

const char *csvf_primitive_name(int primitive) { return is_primitive(primitive) ? primitive_names[primitive] : NULL; }

size_t csvf_kernel_count(int primitive)
{
    size_t count = 0;
    while (kernel_of(primitive, count).table)
        count++;
    return count;
}

const char *csvf_kernel_at(int primitive, size_t index)
{
    return index < csvf_kernel_count(primitive) ? kernel_of(primitive, index).name : NULL;
}

int csvf_kernel_available(int primitive, const char *name)
{
    if (!is_primitive(primitive) || !name)
        return 0;
    const kernel candidate = find_name(primitive, name, strlen(name));
    return candidate.table && runs_here(candidate);
}

const char *csvf_kernel_name(int primitive)
{
    return is_primitive(primitive) ? find_table(primitive, in_use(primitive)).name : NULL;
}

int csvf_force_kernel(int primitive, const char *name)
{
    if (!is_primitive(primitive))
        return CSVF_ERR_ARGUMENT;
    (void)csvf_init();
    const void *table = defaults[primitive];
    if (name) {
        const kernel candidate = find_name(primitive, name, strlen(name));
        if (!candidate.table || !runs_here(candidate))
            return CSVF_ERR_KERNEL;
        table = candidate.table;
    }
    atomic_store_explicit(&chosen[primitive], table, memory_order_release);
    return CSVF_OK;
}
