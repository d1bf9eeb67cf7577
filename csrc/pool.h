/* Worker threads that share one range of work items. Internal. */
#ifndef CSVF_POOL_H
#define CSVF_POOL_H

#include <stddef.h>

#include "include/csvfast.h"

/* Does items [begin, end) and returns a csvf_status. Called from several threads at once, each with its own range. */
typedef int (*csvf__pool_task)(void *context, size_t begin, size_t end);

/* Does items 0 .. count - 1 in pieces of `grain` on every thread of the pool, the caller included; waits for the pool when
 * another call uses it. Returns the first failure of a piece (the others still run to their end), or CSVF_OK. */
int csvf__pool_run(csvf_pool *pool, csvf__pool_task task, void *context, size_t count, size_t grain);

/* The two halves of a run, for callers with work of their own in between. begin_if_idle returns 0, having done nothing, when another
 * call uses the pool. Between begin and finish only the workers work; finish helps with what is left and waits. */
int csvf__pool_begin_if_idle(csvf_pool *pool, csvf__pool_task task, void *context, size_t count, size_t grain);
int csvf__pool_finish(csvf_pool *pool);

#endif
