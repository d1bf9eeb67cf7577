/* A pool of worker threads. One job at a time; its items are handed out in pieces through one atomic counter, so that a worker
 * delayed by another process does not hold up the rest. A worker that wakes too late finds the job closed and never enters it:
 * the caller waits only for workers that are really inside. So the caller alone is always enough to finish a job.
 *
 * After fork() the child has the pool but no workers, and a lock may be held by a thread that no longer exists. The pool therefore
 * remembers its process: in a child every job runs in the calling thread, without locks, and destroy joins nobody. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#include "pool.h"

enum { THREADS_MAX = 1024 };

typedef struct job {
    csvf__pool_task task;
    void *context;
    size_t count, grain;
} job;

struct csvf_pool {
    pthread_mutex_t owner;      /* held by the call that uses the pool */
    pthread_mutex_t lock;       /* guards everything below but the atomics */
    pthread_cond_t work, done;
    job current;
    uint64_t serial;            /* rises with every job: a worker never enters the same job twice */
    int is_open, is_ending;
    uint32_t inside;            /* workers inside the current job */
    _Atomic size_t next;        /* first item not yet handed out */
    _Atomic int status;         /* first failure */
    pid_t process;
    uint32_t workers;
    pthread_t threads[];
};

static void work_on(csvf_pool *pool, const job *current)
{
    for (;;) {
        size_t begin = atomic_load_explicit(&pool->next, memory_order_relaxed);
        size_t end;
        do {
            if (begin >= current->count)
                return;
            end = current->count - begin > current->grain ? begin + current->grain : current->count;
        } while (!atomic_compare_exchange_weak_explicit(&pool->next, &begin, end, memory_order_relaxed,
                                                        memory_order_relaxed));
        const int status = current->task(current->context, begin, end);
        int expected = CSVF_OK;
        if (status != CSVF_OK)
            atomic_compare_exchange_strong(&pool->status, &expected, status);
    }
}

static void *worker_main(void *argument)
{
    csvf_pool *pool = argument;
    uint64_t seen = 0;
    pthread_mutex_lock(&pool->lock);
    for (;;) {
        while (!pool->is_ending && !(pool->is_open && pool->serial != seen))
            pthread_cond_wait(&pool->work, &pool->lock);
        if (pool->is_ending)
            break;
        seen = pool->serial;
        const job current = pool->current;
        pool->inside++;
        pthread_mutex_unlock(&pool->lock);
        work_on(pool, &current);
        pthread_mutex_lock(&pool->lock);
        if (--pool->inside == 0)
            pthread_cond_signal(&pool->done);
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

static void stop_workers(csvf_pool *pool)
{
    pthread_mutex_lock(&pool->lock);
    pool->is_ending = 1;
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->lock);
    for (uint32_t i = 0; i < pool->workers; i++)
        pthread_join(pool->threads[i], NULL);
}

static void free_pool(csvf_pool *pool)
{
    pthread_cond_destroy(&pool->work);
    pthread_cond_destroy(&pool->done);
    pthread_mutex_destroy(&pool->lock);
    pthread_mutex_destroy(&pool->owner);
    free(pool);
}

int csvf_pool_create(csvf_pool **result, uint32_t threads)
{
    if (!result)
        return CSVF_ERR_ARGUMENT;
    *result = NULL;
    if (threads == 0 || threads > THREADS_MAX)
        return CSVF_ERR_ARGUMENT;
    csvf_pool *pool = calloc(1, sizeof *pool + (threads - 1) * sizeof pool->threads[0]);
    if (!pool)
        return CSVF_ERR_MEMORY;
    pthread_mutex_init(&pool->owner, NULL);
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->work, NULL);
    pthread_cond_init(&pool->done, NULL);
    pool->process = getpid();

    /* Signals are the program's business: none sent to it is ever delivered to a worker. Those that an instruction of the worker raises
     * (SIGBUS from a file cut short) stay open, or the kernel would end the process past the program's handler. */
    sigset_t blocked, before;
    sigfillset(&blocked);
    static const int raised[] = {SIGBUS, SIGSEGV, SIGILL, SIGFPE, SIGTRAP};
    for (size_t i = 0; i < sizeof raised / sizeof raised[0]; i++)
        sigdelset(&blocked, raised[i]);
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    int failure = 0;
    while (failure == 0 && pool->workers < threads - 1) {
        failure = pthread_create(&pool->threads[pool->workers], NULL, worker_main, pool);
        pool->workers += failure == 0;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failure) {
        stop_workers(pool);
        free_pool(pool);
        errno = failure;    /* pthread_create returns its error instead */
        return CSVF_ERR_SYSTEM;
    }
    *result = pool;
    return CSVF_OK;
}

void csvf_pool_destroy(csvf_pool *pool)
{
    if (!pool)
        return;
    if (pool->process != getpid()) {
        /* The child of a fork: destroying a lock that a vanished thread may hold is undefined; only the memory goes. */
        free(pool);
        return;
    }
    stop_workers(pool);
    free_pool(pool);
}

static void open_job(csvf_pool *pool, csvf__pool_task task, void *context, size_t count, size_t grain)
{
    pthread_mutex_lock(&pool->lock);
    pool->current = (job){task, context, count, grain ? grain : 1};
    atomic_store_explicit(&pool->next, 0, memory_order_relaxed);
    atomic_store_explicit(&pool->status, CSVF_OK, memory_order_relaxed);
    pool->serial++;
    pool->is_open = 1;
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->lock);
}

int csvf__pool_begin_if_idle(csvf_pool *pool, csvf__pool_task task, void *context, size_t count, size_t grain)
{
    if (pool->process != getpid() || pthread_mutex_trylock(&pool->owner))
        return 0;
    open_job(pool, task, context, count, grain);
    return 1;
}

int csvf__pool_finish(csvf_pool *pool)
{
    const job current = pool->current;      /* only the owner writes it, and that is this thread */
    work_on(pool, &current);
    pthread_mutex_lock(&pool->lock);
    pool->is_open = 0;
    while (pool->inside > 0)
        pthread_cond_wait(&pool->done, &pool->lock);
    const int status = atomic_load(&pool->status);
    pthread_mutex_unlock(&pool->lock);
    pthread_mutex_unlock(&pool->owner);
    return status;
}

int csvf__pool_run(csvf_pool *pool, csvf__pool_task task, void *context, size_t count, size_t grain)
{
    if (count == 0)
        return CSVF_OK;
    if (pool->process != getpid())
        return task(context, 0, count);
    pthread_mutex_lock(&pool->owner);
    open_job(pool, task, context, count, grain);
    return csvf__pool_finish(pool);
}
