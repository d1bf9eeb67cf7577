/* The arithmetic of the SM2 kernel for BMI2 and ADX at its limits. */
#define _GNU_SOURCE 1
#if defined(__x86_64__)
#define csvf__sm2_adx tested_adx
#include "../sm2/sm2_adx.c"
#undef csvf__sm2_adx

#include "../target_begin.h"
#include "sm2_field_cases.h"
#include "../target_end.h"

int main(void)
{
    if (!csvf_kernel_available(CSVF_PRIMITIVE_SM2, "adx")) {
        printf("skipped: this CPU has no BMI2 and ADX\n0 passed, 0 failed\n");
        return 0;
    }
    return run_field_cases();
}
#else
#include <stdio.h>

int main(void)
{
    printf("skipped: no x86-64\n0 passed, 0 failed\n");
    return 0;
}
#endif
