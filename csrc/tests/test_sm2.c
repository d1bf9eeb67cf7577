/* SM2 one operation at a time: the vectors of GB/T 32918.5-2017, every kernel against a slow independent reference, the edges of every range,
 * and points and scalars chosen so that additions meet equal, opposite and infinite points. */
#include "test.h"

#include "../include/csvfast.h"
#include "../sm2/sm2_kernel.h"
#include "../sm2/sm2_objects.h"
#include "reference_sm2.h"

/* Sanitizers look at memory, which is the same for every number: they see a fifth of the long lists, in a tenth of the time. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#  define SPARSE 5
#elif defined(__has_feature)
#  if __has_feature(address_sanitizer) || __has_feature(memory_sanitizer) || __has_feature(thread_sanitizer)
#    define SPARSE 5
#  endif
#endif
#if !defined(SPARSE)
#  define SPARSE 1
#endif

static const uint8_t ID[16] = "1234567812345678";
static const char D_HEX[] = "3945208f7b2144b13f36e38ac6d39f95889393692860b51a42fb81ef4df7c5b8";
static const char P_HEX[] = "09f9df311e5421a150dd7d161e4bc5c672179fad1833fc076bb08ff356f35020ccea490ce26775a52dc6ea718cc1aa600aed05fbf35e084a6632f6072da9ad13";
static const char K_HEX[] = "59276e27d506861a16680f3ad9c02dccef3cc1fa3cdbe4ce6d54b80deac1bc21";

/* Runs a test under every kernel this CPU has. */
static void with_kernels(void (*test)(void))
{
    for (size_t i = 0; i < csvf_kernel_count(CSVF_PRIMITIVE_SM2); i++) {
        const char *name = csvf_kernel_at(CSVF_PRIMITIVE_SM2, i);
        if (csvf_force_kernel(CSVF_PRIMITIVE_SM2, name) != CSVF_OK)
            continue;
        test_case("kernel %s", name);
        test();
    }
    (void)csvf_force_kernel(CSVF_PRIMITIVE_SM2, NULL);
}

static csvf_sm2_private private_of(const char *hex)
{
    csvf_sm2_private key;
    uint8_t d[32];
    test_hex(d, 32, hex);
    CHECK_STATUS(csvf_sm2_private_init(&key, d), CSVF_OK);
    return key;
}

static csvf_sm2_private private_from(ref_number d)
{
    csvf_sm2_private key;
    uint8_t bytes[32];
    ref_to_bytes(bytes, d);
    CHECK_STATUS(csvf_sm2_private_init(&key, bytes), CSVF_OK);
    return key;
}

static csvf_sm2_public public_of(const csvf_sm2_private *key)
{
    csvf_sm2_public out;
    csvf_sm2_private_public(&out, key);
    return out;
}

/* ---- Vectors ---------------------------------------------------------------------------------------------------------- */

static void signature_vectors(void)
{
    uint8_t want[64], got[64], k[32], digest[32];
    const csvf_sm2_private key = private_of(D_HEX);
    const csvf_sm2_public point = public_of(&key);
    test_hex(want, 64, P_HEX);
    csvf_sm2_public_bytes(got, &point);
    CHECK_BYTES(got, want, 64);
    test_hex(want, 32, D_HEX);
    csvf_sm2_private_bytes(got, &key);
    CHECK_BYTES(got, want, 32);
    CHECK_STATUS(csvf_sm2_z(got, &point, ID, sizeof ID), CSVF_OK);
    test_hex(want, 32, "b2e14c5c79c6df5b85f4fe7ed8db7a262b9da7e07ccb0ea9f4747b8ccda8a4f3");
    CHECK_BYTES(got, want, 32);
    CHECK_STATUS(csvf_sm2_digest(digest, &point, ID, sizeof ID, "message digest", 14), CSVF_OK);
    test_hex(want, 32, "f0b43e94ba45accaace692ed534382eb17e6ab5a19ce7b31f4486fdfc0d28640");
    CHECK_BYTES(digest, want, 32);
    test_hex(k, 32, K_HEX);
    CHECK_STATUS(csvf_sm2_sign_digest_with_nonce(got, &key, digest, k), CSVF_OK);
    test_hex(want, 64, "f5a03b0648d2c4630eeac513e1bb81a15944da3827d5b74143ac7eaceee720b3b1b6aa29df212fd8763182bc0d421ca1bb9038fd1f7f42d4840b69c485bbc1aa");
    CHECK_BYTES(got, want, 64);
    CHECK_STATUS(csvf_sm2_verify_var(&point, NULL, want, ID, sizeof ID, "message digest", 14), CSVF_OK);
    CHECK_STATUS(csvf_sm2_verify_var(&point, NULL, want, ID, sizeof ID, "message digesT", 14), CSVF_ERR_AUTHENTICATION);
    CHECK_STATUS(csvf_sm2_verify_var(&point, NULL, want, ID, sizeof ID - 1, "message digest", 14), CSVF_ERR_AUTHENTICATION);
}

static void encryption_vectors(void)
{
    uint8_t want[97 + 19], got[97 + 19], k[32], plain[19];
    const csvf_sm2_private key = private_of(D_HEX);
    const csvf_sm2_public point = public_of(&key);
    test_hex(k, 32, K_HEX);
    test_hex(want, sizeof want, "04 04ebfc718e8d1798620432268e77feb6415e2ede0e073c0f4f640ecd2e149a73"
                                "e858f9d81e5430a57b36daab8f950a3c64e6ee6a63094d99283aff767e124df0"
                                "59983c18f809e262923c53aec295d30383b54e39d609d160afcb1908d0bd8766 21886ca989ca9c7d58087307ca93092d651efa");
    CHECK_STATUS(csvf_sm2_encrypt_with_nonce(got, &point, (const uint8_t *)"encryption standard", 19, k), CSVF_OK);
    CHECK_BYTES(got, want, sizeof want);
    CHECK_STATUS(csvf_sm2_decrypt(plain, &key, want, sizeof want), CSVF_OK);
    CHECK_BYTES(plain, "encryption standard", 19);
}

static void agreement_vectors(void)
{
    const csvf_sm2_private a = private_of("81eb26e941bb5af16df116495f90695272ae2cd63d6c4ae1678418be48230029");
    const csvf_sm2_private b = private_of("785129917d45a9ea5437a59356b82338eaadda6ceb199088f14ae10defa229b5");
    const csvf_sm2_private ra = private_of("d4de15474db74d06491c440d305e012400990f3e390c7e87153c12db2ea60bb3");
    const csvf_sm2_private rb = private_of("7e07124814b309489125eaed101113164ebf0f3458c5bd88335c1f9d596243d6");
    const csvf_sm2_public pa = public_of(&a), pb = public_of(&b), pra = public_of(&ra), prb = public_of(&rb);
    uint8_t za[32], zb[32], key_a[16], key_b[16], want[16], both_a[64], both_b[64], s[64];
    CHECK_STATUS(csvf_sm2_z(za, &pa, ID, sizeof ID), CSVF_OK);
    CHECK_STATUS(csvf_sm2_z(zb, &pb, ID, sizeof ID), CSVF_OK);
    CHECK_STATUS(csvf_sm2_agree(key_a, 16, both_a, 1, &a, &ra, za, &pb, &prb, zb), CSVF_OK);
    CHECK_STATUS(csvf_sm2_agree(key_b, 16, both_b, 0, &b, &rb, zb, &pa, &pra, za), CSVF_OK);
    test_hex(want, 16, "6c89347354de2484c60b4ab1fde4c6e5");
    CHECK_BYTES(key_a, want, 16);
    CHECK_BYTES(key_b, want, 16);
    /* GB/T 32918.5 annex C: S_B and S_A */
    test_hex(s, 64, "d3a0fe15dee185ceae907a6b595cc32a266ed7b3367e9983a896dc32fa20f8eb18c7894b3816df16cf07b05c5ec0bef5d655d58f779cc1b400a4f3884644db88");
    CHECK_BYTES(both_a, s, 64);
    CHECK_BYTES(both_b, s, 64);
    CHECK_STATUS(csvf_sm2_agree(key_a, 16, NULL, 1, &a, &ra, za, &pb, &prb, zb), CSVF_OK);
    CHECK_BYTES(key_a, want, 16);
}

static void test_vectors(void)
{
    with_kernels(signature_vectors);
    with_kernels(encryption_vectors);
    with_kernels(agreement_vectors);
}

/* ---- Multiples against the reference ---------------------------------------------------------------------------------- */

static ref_number structured[1200];
static size_t structured_count;

static void prepare_structured(void)
{
    uint64_t state = 77;
    structured_count = 0;
    for (uint64_t i = 0; i <= 40; i++) {
        structured[structured_count++] = ref_small(i);
        if (i)
            structured[structured_count++] = ref_minus(REF_N, ref_small(i));
    }
    for (int i = 1; i < 256; i++) {
        ref_number k = {{0}};
        k.v[i / 64] = UINT64_C(1) << i % 64;
        structured[structured_count++] = k;
        structured[structured_count++] = ref_minus(k, ref_small(1));
        if (i % 7 == 0)
            structured[structured_count++] = ref_minus(REF_N, k);
    }
    ref_number half = REF_N;     /* around n / 2, where multiply() turns signs */
    for (int i = 0; i < 4; i++)
        half.v[i] = REF_N.v[i] >> 1 | (i < 3 ? REF_N.v[i + 1] << 63 : 0);
    for (uint64_t i = 0; i < 70; i++) {
        structured[structured_count++] = ref_minus(half, ref_small(i));
        structured[structured_count++] = ref_plus(half, ref_small(i + 1), REF_N);
    }
    for (int i = 0; i < 30; i++)
        structured[structured_count++] = ref_random(&state);
    if (structured_count > sizeof structured / sizeof *structured)
        abort();
}

static void test_multiples(void)
{
    uint64_t state = 5;
    uint8_t want[64], got[64], bytes[64];
    csvf_sm2_affine base, other, out;
    prepare_structured();
    ref_bytes(bytes, ref_base());
    CHECK_STATUS(csvf__sm2_point_init(&base, bytes), CSVF_OK);
    CHECK(!memcmp(&base, &csvf__sm2_base_table[0], sizeof base));
    const ref_point other_point = ref_times(ref_random(&state), ref_base());
    ref_bytes(bytes, other_point);
    CHECK_STATUS(csvf__sm2_point_init(&other, bytes), CSVF_OK);
    for (size_t i = 0; i < structured_count; i += SPARSE) {
        const ref_number k = structured[i];
        const int is_zero = !ref_compare(k, ref_small(0));
        uint8_t want_other[64];
        ref_bytes(want, ref_times(k, ref_base()));
        if (i % 4 == 0)
            ref_bytes(want_other, ref_times(k, other_point));
        for (size_t j = 0; csvf__sm2_kernels[j]; j++) {
            const csvf_sm2_kernel *kernel = csvf__sm2_kernels[j];
            if (!csvf_kernel_available(CSVF_PRIMITIVE_SM2, kernel->name))
                continue;
            test_case("kernel %s, scalar %zu", kernel->name, i);
            if (!is_zero) {
                kernel->multiply_base(&out, k.v);
                csvf__sm2_point_bytes(got, &out);
                CHECK_BYTES(got, want, 64);
            }
            CHECK(kernel->multiply(&out, &base, k.v) == !is_zero);
            csvf__sm2_point_bytes(got, &out);
            CHECK_BYTES(got, want, 64);
            if (i % 4 == 0) {
                CHECK(kernel->multiply(&out, &other, k.v) == !is_zero);
                csvf__sm2_point_bytes(got, &out);
                CHECK_BYTES(got, want_other, 64);
            }
        }
    }
}

/* s G + t P with P = k G, compared by its x: small and structured numbers make every addition formula meet its exceptions. */
static void exceptional_sums(void)
{
    static const int64_t small[] = {1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, -1, -2, -3, -5, -16, -32, -64, -128};
    enum { SMALL = sizeof small / sizeof *small };
    static ref_number numbers[SMALL + 4];
    const csvf_sm2_kernel *kernel = csvf__sm2();
    static csvf_sm2_table table;
    uint64_t state = 9;
    for (size_t i = 0; i < SMALL; i++)
        numbers[i] = small[i] > 0 ? ref_small((uint64_t)small[i]) : ref_minus(REF_N, ref_small((uint64_t)-small[i]));
    for (size_t i = SMALL; i < SMALL + 4; i++)
        numbers[i] = ref_random(&state);
    for (size_t a = 0; a < SMALL + 4; a += 3 * SPARSE) {
        csvf_sm2_affine point, sum;
        uint8_t bytes[64];
        ref_bytes(bytes, ref_times(numbers[a], ref_base()));
        CHECK_STATUS(csvf__sm2_point_init(&point, bytes), CSVF_OK);
        kernel->fill_table_var(&table, &point);
        for (size_t b = 0; b < SMALL + 4; b++)
            for (size_t c = 0; c < SMALL + 5; c++) {
                const ref_number t = numbers[b];
                /* the last c: s = -t k, so that the sum is infinite */
                const ref_number product = ref_mul(t, numbers[a], REF_N), s = c < SMALL + 4 ? numbers[c] : ref_negate(product, REF_N);
                const ref_number k = ref_plus(product, s, REF_N);
                ref_number x = {{0}};
                const int finite = ref_compare(k, ref_small(0)) != 0;
                if (finite) {
                    kernel->multiply_base(&sum, k.v);     /* checked against the reference above */
                    csvf__sm2_point_bytes(bytes, &sum);
                    x = ref_plus(ref_from_bytes(bytes), ref_small(0), REF_N);
                }
                const ref_number wrong = ref_plus(x, ref_small(1), REF_N);
                CHECK(kernel->verify_var(s.v, t.v, &point, NULL, x.v) == finite);
                CHECK(kernel->verify_var(s.v, t.v, &point, &table, x.v) == finite);
                CHECK(!kernel->verify_var(s.v, t.v, &point, NULL, wrong.v));
                CHECK(!kernel->verify_var(s.v, t.v, &point, &table, wrong.v));
                if (c == 0) {     /* point + t G */
                    csvf_sm2_affine base = csvf__sm2_base_table[0], out;
                    const ref_number whole = ref_plus(numbers[a], t, REF_N);
                    CHECK(kernel->combine_var(&out, &point, &base, t.v) == (ref_compare(whole, ref_small(0)) != 0));
                    if (ref_compare(whole, ref_small(0))) {
                        kernel->multiply_base(&sum, whole.v);
                        CHECK_BYTES(&out, &sum, sizeof out);
                    }
                }
            }
    }
}

/* Every entry of a key's table, for one key per kernel, against multiply(); and the kernels' tables are the same bytes. */
static void table_entries(void)
{
    static csvf_sm2_table table, first;
    static int have_first;
    const csvf_sm2_kernel *kernel = csvf__sm2();
    csvf_sm2_affine point, out;
    uint64_t state = 11;
    const ref_number k = ref_random(&state);
    kernel->multiply_base(&point, k.v);
    kernel->fill_table_var(&table, &point);
    if (have_first)
        CHECK_BYTES(&table, &first, sizeof table);
    first = table;
    have_first = 1;
    for (unsigned w = 0; w < CSVF_SM2_KEY_WINDOWS; w++)
        for (unsigned i = 0; i < CSVF_SM2_KEY_ENTRIES; i += w % 5 == 0 ? 1 : 5) {
            ref_number scale = ref_small(i + 1);
            for (unsigned j = 0; j < CSVF_SM2_KEY_BITS * w; j++)
                scale = ref_plus(scale, scale, REF_N);
            CHECK(kernel->multiply(&out, &point, scale.v) == 1);
            CHECK_BYTES(&table.entries[CSVF_SM2_KEY_ENTRIES * w + i], &out, sizeof out);
        }
}

static void scalars(void)
{
    const csvf_sm2_kernel *kernel = csvf__sm2();
    uint64_t state = 3;
    for (int i = 0; i < 200; i++) {
        ref_number a = ref_random(&state), b = i < (int)structured_count ? structured[i] : ref_random(&state), out;
        kernel->scalar_multiply(out.v, a.v, b.v);
        CHECK(!ref_compare(out, ref_mul(a, b, REF_N)));
        memset(a.v, 0xff, sizeof a.v);       /* the first factor may be any 256 bits */
        kernel->scalar_multiply(out.v, a.v, b.v);
        CHECK(!ref_compare(out, ref_mul(a, b, REF_N)));
        kernel->scalar_invert(out.v, b.v);
        CHECK(!ref_compare(ref_mul(out, b, REF_N), ref_small(ref_compare(b, ref_small(0)) ? 1 : 0)));
    }
}

static void test_exceptions(void) { with_kernels(exceptional_sums); }
static void test_tables(void) { with_kernels(table_entries); }
static void test_scalars(void) { with_kernels(scalars); }

/* ---- Encodings -------------------------------------------------------------------------------------------------------- */

static void encodings(void)
{
    uint8_t point[64], coded[66], got[64];
    csvf_sm2_public key, untouched;
    uint64_t state = 21;
    for (int i = 0; i < 20; i++) {
        ref_bytes(point, ref_times(ref_random(&state), ref_base()));
        const uint8_t parity = point[63] & 1;
        memcpy(coded + 1, point, 64);
        CHECK_STATUS(csvf_sm2_public_init(&key, point, 64), CSVF_OK);
        csvf_sm2_public_bytes(got, &key);
        CHECK_BYTES(got, point, 64);
        for (unsigned first = 0; first < 256; first++) {
            coded[0] = (uint8_t)first;
            const int full = first == 4 || first == 6u + parity;
            memset(&key, 0xee, sizeof key);
            untouched = key;
            CHECK_STATUS(csvf_sm2_public_init(&key, coded, 65), full ? CSVF_OK : CSVF_ERR_POINT);
            if (full) {
                csvf_sm2_public_bytes(got, &key);
                CHECK_BYTES(got, point, 64);
            } else
                CHECK_BYTES(&key, &untouched, sizeof key);
            CHECK_STATUS(csvf_sm2_public_init(&key, coded, 33), first == 2 || first == 3 ? CSVF_OK : CSVF_ERR_POINT);
            if (first == 2 || first == 3) {
                csvf_sm2_public_bytes(got, &key);
                CHECK(!memcmp(got, point, 32) && (got[63] & 1) == (first & 1));
                CHECK(!memcmp(got + 32, point + 32, 32) == ((first & 1) == parity));
            }
        }
        for (size_t length = 0; length <= 66; length++)
            if (length != 33 && length != 64 && length != 65)
                CHECK_STATUS(csvf_sm2_public_init(&key, coded, length), CSVF_ERR_LENGTH);
        for (int bit = 0; bit < 512; bit += 3) {     /* off the curve */
            point[bit / 8] ^= (uint8_t)(1 << bit % 8);
            CHECK_STATUS(csvf_sm2_public_init(&key, point, 64), CSVF_ERR_POINT);
            point[bit / 8] ^= (uint8_t)(1 << bit % 8);
        }
    }
    memset(coded, 0, sizeof coded);     /* (0, 0), by which some mean infinity; and the standard's one byte for it */
    CHECK_STATUS(csvf_sm2_public_init(&key, coded, 64), CSVF_ERR_POINT);
    CHECK_STATUS(csvf_sm2_public_init(&key, coded, 1), CSVF_ERR_LENGTH);
    memset(coded, 0xff, sizeof coded);
    CHECK_STATUS(csvf_sm2_public_init(&key, coded, 64), CSVF_ERR_POINT);
    CHECK_STATUS(csvf_sm2_public_init(NULL, point, 64), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_sm2_public_init(&key, NULL, 64), CSVF_ERR_ARGUMENT);
}

/* x + p and y + p stand for the same point but are no encodings of it: small x and y with room below 2^256. */
static void noncanonical(void)
{
    uint8_t coded[65] = {2}, point[64];
    csvf_sm2_public key;
    unsigned with_root = 0, without_root = 0;
    for (uint64_t x = 0; x < 64; x++) {
        ref_to_bytes(coded + 1, ref_small(x));
        coded[0] = 2;
        const int status = csvf_sm2_public_init(&key, coded, 33);
        CHECK(status == CSVF_OK || status == CSVF_ERR_POINT);
        coded[0] = 3;
        CHECK_STATUS(csvf_sm2_public_init(&key, coded, 33), status);
        if (status != CSVF_OK) {
            without_root++;
            continue;
        }
        with_root++;
        csvf_sm2_public_bytes(point, &key);
        CHECK_STATUS(csvf_sm2_public_init(&key, point, 64), CSVF_OK);
        const ref_number above = ref_minus(ref_small(x), ref_minus(ref_small(0), REF_P));     /* x + p modulo 2^256 */
        ref_to_bytes(coded + 1, above);
        CHECK_STATUS(csvf_sm2_public_init(&key, coded, 33), CSVF_ERR_POINT);
        memcpy(point, coded + 1, 32);
        CHECK_STATUS(csvf_sm2_public_init(&key, point, 64), CSVF_ERR_POINT);
    }
    CHECK(with_root > 16 && without_root > 16);
    /* The points with y = 1 and y = 2 (roots of x^3 - 3 x + b - y^2, found apart from this library): y + p fits 256 bits too. */
    static const char *const x_of[] = {"9c17043effe1a805a74a9a5e70b9d659705d3242094a566dc016f49311178d1f",
                                       "3b404f94e46027d11401987cd5acb2953e4bff91a7d856b40986700015b4f8a6"};
    for (uint64_t i = 0; i < 2; i++) {
        test_hex(point, 32, x_of[i]);
        ref_to_bytes(point + 32, ref_small(i + 1));
        CHECK_STATUS(csvf_sm2_public_init(&key, point, 64), CSVF_OK);
        ref_to_bytes(point + 32, ref_minus(ref_small(i + 1), ref_minus(ref_small(0), REF_P)));
        CHECK_STATUS(csvf_sm2_public_init(&key, point, 64), CSVF_ERR_POINT);
    }
}

static void test_encodings(void)
{
    with_kernels(encodings);
    with_kernels(noncanonical);
}

/* ---- Private keys ----------------------------------------------------------------------------------------------------- */

static void private_range(void)
{
    uint8_t d[32], got[64], want[64];
    csvf_sm2_private key, other;
    for (uint64_t i = 0; i < 4; i++) {     /* n - 1 is refused: 1 + d has no inverse */
        ref_to_bytes(d, ref_minus(REF_N, ref_small(i)));
        CHECK_STATUS(csvf_sm2_private_init(&key, d), i < 2 ? CSVF_ERR_KEY : CSVF_OK);
        ref_to_bytes(d, ref_small(i));
        CHECK_STATUS(csvf_sm2_private_init(&key, d), i == 0 ? CSVF_ERR_KEY : CSVF_OK);
        if (i) {
            const csvf_sm2_public point = public_of(&key);
            csvf_sm2_public_bytes(got, &point);
            ref_bytes(want, ref_times(ref_small(i), ref_base()));
            CHECK_BYTES(got, want, 64);
        }
    }
    memset(d, 0xff, sizeof d);
    CHECK_STATUS(csvf_sm2_private_init(&key, d), CSVF_ERR_KEY);
    CHECK_STATUS(csvf_sm2_private_init(NULL, d), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_sm2_private_init(&key, NULL), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_sm2_private_generate(NULL), CSVF_ERR_ARGUMENT);
    CHECK_STATUS(csvf_sm2_private_generate(&key), CSVF_OK);
    CHECK_STATUS(csvf_sm2_private_generate(&other), CSVF_OK);
    csvf_sm2_private_bytes(d, &key);
    csvf_sm2_private_bytes(got, &other);
    CHECK(memcmp(d, got, 32) != 0);
    CHECK_STATUS(csvf_sm2_private_init(&other, d), CSVF_OK);
    CHECK_BYTES(&other, &key, sizeof key);
    ref_bytes(want, ref_times(ref_from_bytes(d), ref_base()));
    const csvf_sm2_public point = public_of(&key);
    csvf_sm2_public_bytes(got, &point);
    CHECK_BYTES(got, want, 64);
}

static void test_private(void) { with_kernels(private_range); }

/* Every kernel computes the same bytes from the same random inputs. */
static void test_kernels_agree(void)
{
    uint64_t state = 1234;
    for (int i = 0; i < 60; i++) {
        const csvf_sm2_private key = private_from(ref_minus(ref_random(&state), ref_small(1)));
        const csvf_sm2_public point = public_of(&key);
        uint8_t digest[32], nonce[32], signature[2][64], sealed[2][97 + 40], plain[40];
        test_fill(digest, 32, test_random(&state));
        test_fill(plain, 40, test_random(&state));
        ref_to_bytes(nonce, ref_random(&state));
        for (size_t k = 0; k < csvf_kernel_count(CSVF_PRIMITIVE_SM2); k++) {
            if (csvf_force_kernel(CSVF_PRIMITIVE_SM2, csvf_kernel_at(CSVF_PRIMITIVE_SM2, k)) != CSVF_OK)
                continue;
            CHECK_STATUS(csvf_sm2_sign_digest_with_nonce(signature[k > 0], &key, digest, nonce), CSVF_OK);
            CHECK_STATUS(csvf_sm2_encrypt_with_nonce(sealed[k > 0], &point, plain, 40, nonce), CSVF_OK);
            if (k > 0 && csvf_kernel_available(CSVF_PRIMITIVE_SM2, csvf_kernel_at(CSVF_PRIMITIVE_SM2, 0))) {
                CHECK_BYTES(signature[1], signature[0], 64);
                CHECK_BYTES(sealed[1], sealed[0], sizeof sealed[0]);
            }
            CHECK_STATUS(csvf_sm2_verify_digest_var(&point, NULL, signature[k > 0], digest), CSVF_OK);
        }
    }
    (void)csvf_force_kernel(CSVF_PRIMITIVE_SM2, NULL);
}

int main(void)
{
    RUN(test_vectors);
    RUN(test_multiples);
    RUN(test_exceptions);
    RUN(test_tables);
    RUN(test_scalars);
    RUN(test_encodings);
    RUN(test_private);
    RUN(test_kernels_agree);
    return test_report();
}
