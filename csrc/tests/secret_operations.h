/* Every public call that sees a secret, each as one function over (secret bytes, scratch), for the two constant-time tests:
 * ctime.c poisons the secret and lets valgrind or MSan watch; ctrace.c runs two secrets and compares instruction traces. */
#ifndef CSVF_TESTS_SECRET_OPERATIONS_H
#define CSVF_TESTS_SECRET_OPERATIONS_H

#include "../include/csvfast.h"

#include <stddef.h>
#include <stdint.h>

enum { OPERATION_SECRET_BYTES = 12288, OPERATION_OUT_BYTES = 16384 };

typedef struct operation {
    const char *name;
    int primitive;     /* whose kernels to force one after the other */
    /* secret: keys first, then data; out: receives results. Returns 0, or the status of a call that failed. */
    int (*run)(uint8_t *out, const uint8_t *secret);
    int leaks;         /* 1 = a control that leaks on purpose: a checker that passes it is broken */
} operation;

extern const operation OPERATIONS[];
extern const size_t OPERATION_COUNT;

/* Engine used by the memory operations; made before tracing starts so that its mmap calls stay outside. */
int operations_prepare(void);
void operations_release(void);

#endif
