/* SM2 in plain C, for any 64-bit CPU: the arithmetic of sm2_field.h under the multiplications of sm2_multiply.h. */
#include "sm2_field.h"
#include "sm2_multiply.h"

const csvf_sm2_kernel csvf__sm2_portable = {
    .name = "portable",
    .features = 0,
    .multiply_base = multiply_base,
    .multiply = multiply,
    .verify_var = verify_var,
    .fill_table_var = fill_table_var,
    .combine_var = combine_var,
    .field_multiply = field_multiply_call,
    .scalar_multiply = scalar_multiply,
    .scalar_invert = scalar_invert,
};
