/* Verification of many signatures: sorts what the caller brings into full sets of lanes. Nothing is allocated; the stack holds a few KiB
 * besides the kernel's. Everything is public and in variable time. PURE. */
#include "../include/csvfast.h"
#include "sm2_kernel.h"
#include "sm2_objects.h"

enum { MOST_LANES = 16 };

const csvf_sm2_many_kernel *const csvf__sm2_many_kernels[] = {
#if defined(__x86_64__)
    &csvf__sm2_many_ifma,
#endif
    &csvf__sm2_many_single,
    NULL,
};

const csvf_sm2_many_kernel csvf__sm2_many_single = {
    .name = "portable", .features = 0, .lanes = 1, .worthwhile_with_table = 1, .worthwhile_without = 1};

/* Jobs of one kind, with a table or without, waiting for company. */
typedef struct queue {
    csvf_sm2_job jobs[MOST_LANES];
    size_t places[MOST_LANES];   /* where their results go */
    size_t count, worthwhile;
} queue;

static void empty_queue(uint8_t *valid, queue *q, const csvf_sm2_many_kernel *kernel)
{
    if (kernel->verify_var && q->count && q->count >= q->worthwhile) {
        const csvf_sm2_job *jobs[MOST_LANES];
        uint8_t results[MOST_LANES];
        for (size_t i = 0; i < q->count; i++)
            jobs[i] = &q->jobs[i];
        kernel->verify_var(results, jobs, q->count);
        for (size_t i = 0; i < q->count; i++)
            valid[q->places[i]] = results[i];
    } else {
        for (size_t i = 0; i < q->count; i++) {
            const csvf_sm2_job *job = &q->jobs[i];
            valid[q->places[i]] = csvf__sm2()->verify_var(job->s, job->t, job->point, job->table, job->x_mod_n) != 0;
        }
    }
    q->count = 0;
}

int csvf_sm2_verify_many_var(uint8_t *valid, const csvf_sm2_check *checks, size_t count)
{
    if (!count)
        return CSVF_OK;
    if (!valid)
        return CSVF_ERR_ARGUMENT;
    memset(valid, 0, count);
    if (!checks)
        return CSVF_ERR_ARGUMENT;
    const csvf_sm2_many_kernel *kernel = csvf__sm2_many();
    queue with_table, without;
    with_table.count = without.count = 0;
    with_table.worthwhile = kernel->worthwhile_with_table;
    without.worthwhile = kernel->worthwhile_without;
    for (size_t i = 0; i < count; i++) {
        queue *q = checks[i].table ? &with_table : &without;
        const int status = csvf__sm2_job_init_var(&q->jobs[q->count], &checks[i]);
        if (status == CSVF_ERR_ARGUMENT) {
            memset(valid, 0, count);
            return status;
        }
        if (status != CSVF_OK)
            continue;
        q->places[q->count++] = i;
        if (q->count == kernel->lanes)
            empty_queue(valid, q, kernel);
    }
    empty_queue(valid, &with_table, kernel);
    empty_queue(valid, &without, kernel);
    return CSVF_OK;
}
