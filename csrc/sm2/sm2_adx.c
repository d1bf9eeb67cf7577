/* SM2 for x86-64 with BMI2, ADX and AVX2: the arithmetic of sm2_adx_field.h under the multiplications of sm2_multiply.h. */
#if defined(__x86_64__)
#define CSVF_TARGET_ADX
#include "../target_begin.h"

#include "../cpu.h"
#include "sm2_adx_field.h"
#include "sm2_multiply.h"

const csvf_sm2_kernel csvf__sm2_adx = {
    .name = "adx",
    .features = CSVF_CPU_BMI2 | CSVF_CPU_ADX | CSVF_CPU_AVX2,
    .multiply_base = multiply_base,
    .multiply = multiply,
    .verify_var = verify_var,
    .fill_table_var = fill_table_var,
    .combine_var = combine_var,
    .field_multiply = field_multiply_call,
    .scalar_multiply = scalar_multiply,
    .scalar_invert = scalar_invert,
};

#include "../target_end.h"
#endif
