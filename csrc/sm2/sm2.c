/* SM2: the list of kernels, points and keys. Standards: GB/T 32918.1-2016 (4.2 conversions, 6.1 keys), curve GB/T 32918.5-2017. */
#include "../include/csvfast.h"
#include "../declassify.h"
#include "sm2_kernel.h"
#include "sm2_objects.h"

const csvf_sm2_kernel *const csvf__sm2_kernels[] = {
#if defined(__x86_64__)
    &csvf__sm2_adx,
#endif
    &csvf__sm2_portable,
    NULL,
};

static const uint64_t field_r[4] = {0x0000000000000001, 0x00000000ffffffff, 0x0000000000000000, 0x0000000100000000};           /* 2^256 mod p */
static const uint64_t field_r_squared[4] = {0x0000000200000003, 0x00000002ffffffff, 0x0000000100000001, 0x0000000400000002};
static const uint64_t curve_b[4] = {0x90d230632bc0dd42, 0x71cf379ae9b537ab, 0x527981505ea51c3c, 0x240fe188ba20e2c8};           /* Montgomery form */

/* ---- Points ----------------------------------------------------------------------------------------------------------- */

void csvf__sm2_point_bytes(uint8_t bytes[64], const csvf_sm2_affine *point)
{
    static const uint64_t one[4] = {1, 0, 0, 0};
    const csvf_sm2_kernel *kernel = csvf__sm2();
    uint64_t t[4];
    kernel->field_multiply(t, point->x, one);
    number_store(bytes, t);
    kernel->field_multiply(t, point->y, one);
    number_store(bytes + 32, t);
    csvf_wipe(t, sizeof t);
}

/* out = x^3 - 3 x + b, everything in Montgomery form */
static void curve_right_side(const csvf_sm2_kernel *kernel, uint64_t out[4], const uint64_t x[4])
{
    uint64_t t[4];
    kernel->field_multiply(t, x, x);
    for (int i = 0; i < 3; i++)
        number_subtract_modulo(t, t, field_r, csvf__sm2_p);
    kernel->field_multiply(t, t, x);
    number_add_modulo(out, t, curve_b, csvf__sm2_p);
}

int csvf__sm2_point_init(csvf_sm2_affine *point, const uint8_t bytes[64])
{
    const csvf_sm2_kernel *kernel = csvf__sm2();
    csvf_sm2_affine p;
    uint64_t left[4], right[4];
    number_load(p.x, bytes);
    number_load(p.y, bytes + 32);
    if (!number_is_below(p.x, csvf__sm2_p) || !number_is_below(p.y, csvf__sm2_p))
        return CSVF_ERR_POINT;
    kernel->field_multiply(p.x, p.x, field_r_squared);
    kernel->field_multiply(p.y, p.y, field_r_squared);
    curve_right_side(kernel, right, p.x);
    kernel->field_multiply(left, p.y, p.y);
    if (!number_is_equal(left, right))
        return CSVF_ERR_POINT;
    *point = p;
    return CSVF_OK;
}

/* x || y from x and the parity of y. A square root modulo p = 3 mod 4 is a power: y = (y^2)^((p + 1) / 4). Public, variable time. */
static int decompress_var(uint8_t bytes[64], const uint8_t x_bytes[32], unsigned parity)
{
    static const uint64_t exponent[4] = {0x4000000000000000, 0xffffffffc0000000, 0xffffffffffffffff, 0x3fffffffbfffffff};
    const csvf_sm2_kernel *kernel = csvf__sm2();
    csvf_sm2_affine point;
    uint64_t square[4];
    number_load(point.x, x_bytes);
    if (!number_is_below(point.x, csvf__sm2_p))
        return CSVF_ERR_POINT;
    kernel->field_multiply(point.x, point.x, field_r_squared);
    curve_right_side(kernel, square, point.x);
    memcpy(point.y, field_r, sizeof point.y);
    for (int i = 253; i >= 0; i--) {
        kernel->field_multiply(point.y, point.y, point.y);
        if (exponent[i / 64] >> i % 64 & 1)
            kernel->field_multiply(point.y, point.y, square);
    }
    csvf__sm2_point_bytes(bytes, &point);
    if ((bytes[63] & 1) != parity) {
        uint64_t y[4];
        number_load(y, bytes + 32);
        (void)number_subtract(y, csvf__sm2_p, y);
        number_store(bytes + 32, y);
    }
    return CSVF_OK;     /* where y^2 has no root, the caller's check of the curve equation refuses the point */
}

/* ---- Public keys ------------------------------------------------------------------------------------------------------ */

int csvf_sm2_public_init(csvf_sm2_public *public_key, const uint8_t *encoded, size_t length)
{
    csvf__sm2_public key;
    if (!public_key || !encoded)
        return CSVF_ERR_ARGUMENT;
    if (length != 64 && length != 65 && length != 33)
        return CSVF_ERR_LENGTH;
    if (length == 33) {
        if (encoded[0] != 2 && encoded[0] != 3)
            return CSVF_ERR_POINT;
        if (decompress_var(key.bytes, encoded + 1, encoded[0] & 1) != CSVF_OK)
            return CSVF_ERR_POINT;
    } else {
        memcpy(key.bytes, encoded + (length - 64), 64);
        if (length == 65 && encoded[0] != 4 && !((encoded[0] == 6 || encoded[0] == 7) && (encoded[0] & 1) == (key.bytes[63] & 1)))
            return CSVF_ERR_POINT;
    }
    if (csvf__sm2_point_init(&key.point, key.bytes) != CSVF_OK)
        return CSVF_ERR_POINT;
    memset(public_key, 0, sizeof *public_key);
    memcpy(public_key, &key, sizeof key);
    return CSVF_OK;
}

void csvf_sm2_public_bytes(uint8_t point[64], const csvf_sm2_public *public_key)
{
    memcpy(point, csvf__sm2_public_of(public_key)->bytes, 64);
}

/* ---- Private keys ----------------------------------------------------------------------------------------------------- */

/* All ones if d is in 1 .. n - 2. */
static uint64_t is_private(const uint64_t d[4])
{
    static const uint64_t n_less_1[4] = {0x53bbf40939d54122, 0x7203df6b21c6052b, 0xffffffffffffffff, 0xfffffffeffffffff};
    return number_is_below(d, n_less_1) & ~number_is_zero(d);
}

static __attribute__((noinline)) void private_fill(csvf_sm2_private *private_key, const uint64_t d[4])
{
    static const uint64_t one[4] = {1, 0, 0, 0};
    const csvf_sm2_kernel *kernel = csvf__sm2();
    csvf__sm2_private *key = (csvf__sm2_private *)private_key;
    uint64_t sum[4];
    memset(private_key, 0, sizeof *private_key);
    memcpy(key->d, d, sizeof key->d);
    (void)number_add(sum, d, one);
    kernel->scalar_invert(key->inverse, sum);
    kernel->multiply_base(&key->public_key.point, d);
    csvf__declassify(&key->public_key.point, sizeof key->public_key.point);
    csvf__sm2_point_bytes(key->public_key.bytes, &key->public_key.point);
    csvf_wipe(sum, sizeof sum);
}

int csvf_sm2_private_init(csvf_sm2_private *private_key, const uint8_t d[32])
{
    uint64_t number[4];
    if (!private_key || !d)
        return CSVF_ERR_ARGUMENT;
    number_load(number, d);
    uint64_t is_good = is_private(number);
    csvf__declassify(&is_good, sizeof is_good);
    if (is_good) {
        private_fill(private_key, number);
        csvf__sm2_burn_stack();
    }
    csvf_wipe(number, sizeof number);
    return is_good ? CSVF_OK : CSVF_ERR_KEY;
}

int csvf_sm2_private_generate(csvf_sm2_private *private_key)
{
    uint8_t wide[64];
    uint64_t number[4], is_good;
    if (!private_key)
        return CSVF_ERR_ARGUMENT;
    do {
        const int status = csvf__sm2_random(wide, sizeof wide);
        if (status != CSVF_OK)
            return status;
        csvf__sm2_reduce_wide(number, wide);
        is_good = is_private(number);
        csvf__declassify(&is_good, sizeof is_good);
    } while (!is_good);
    private_fill(private_key, number);
    csvf_wipe(wide, sizeof wide);
    csvf_wipe(number, sizeof number);
    csvf__sm2_burn_stack();
    return CSVF_OK;
}

void csvf_sm2_private_bytes(uint8_t d[32], const csvf_sm2_private *private_key)
{
    number_store(d, csvf__sm2_private_of(private_key)->d);
}

void csvf_sm2_private_public(csvf_sm2_public *public_key, const csvf_sm2_private *private_key)
{
    memset(public_key, 0, sizeof *public_key);
    memcpy(public_key, &csvf__sm2_private_of(private_key)->public_key, sizeof(csvf__sm2_public));
}

/* ---- Tables ----------------------------------------------------------------------------------------------------------- */

size_t csvf_sm2_table_bytes(void) { return sizeof(csvf_sm2_table); }
