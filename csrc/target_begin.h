/* Makes the rest of a file compile for the instruction sets of one kernel, whatever flags the build uses. The file defines
 * exactly one CSVF_TARGET_* name, includes this before every other header, and target_end.h at its end. Keeping the flags here
 * lets csrc/ drop into a foreign build, and keeps wide instructions out of every other file. */
#if defined(__clang__)
#  if defined(CSVF_TARGET_AESNI_AVX2)
#    pragma clang attribute push(__attribute__((target("avx2,aes,pclmul,bmi2"))), apply_to = function)
#  elif defined(CSVF_TARGET_GFNI_AVX2)
#    pragma clang attribute push(__attribute__((target("avx2,gfni,bmi2"))), apply_to = function)
#  elif defined(CSVF_TARGET_GFNI_AVX512)
#    pragma clang attribute push(__attribute__((target("avx2,bmi2,gfni,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi"))), apply_to = function)
#  elif defined(CSVF_TARGET_AVX2)
#    pragma clang attribute push(__attribute__((target("avx2,bmi2"))), apply_to = function)
#  elif defined(CSVF_TARGET_AVX512_IFMA)
#    pragma clang attribute push(__attribute__((target("avx2,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512ifma"))), apply_to = function)
#  elif defined(CSVF_TARGET_AVX512)
#    pragma clang attribute push(__attribute__((target("avx2,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi"))), apply_to = function)
#  elif defined(CSVF_TARGET_PCLMUL)
#    pragma clang attribute push(__attribute__((target("avx2,pclmul"))), apply_to = function)
#  elif defined(CSVF_TARGET_ADX)
#    pragma clang attribute push(__attribute__((target("avx2,bmi2,adx"))), apply_to = function)
#  elif defined(CSVF_TARGET_SHA)
#    pragma clang attribute push(__attribute__((target("sse4.1,sha"))), apply_to = function)
#  else
#    error "define one CSVF_TARGET_* before target_begin.h"
#  endif
#elif defined(__GNUC__)
#  pragma GCC push_options
#  if defined(CSVF_TARGET_AESNI_AVX2)
#    pragma GCC target("avx2,aes,pclmul,bmi2")
#  elif defined(CSVF_TARGET_GFNI_AVX2)
#    pragma GCC target("avx2,gfni,bmi2")
#  elif defined(CSVF_TARGET_GFNI_AVX512)
#    pragma GCC target("avx2,bmi2,gfni,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")
#  elif defined(CSVF_TARGET_AVX2)
#    pragma GCC target("avx2,bmi2")
#  elif defined(CSVF_TARGET_AVX512_IFMA)
#    pragma GCC target("avx2,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512ifma")
#  elif defined(CSVF_TARGET_AVX512)
#    pragma GCC target("avx2,bmi2,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")
#  elif defined(CSVF_TARGET_PCLMUL)
#    pragma GCC target("avx2,pclmul")
#  elif defined(CSVF_TARGET_ADX)
#    pragma GCC target("avx2,bmi2,adx")
#  elif defined(CSVF_TARGET_SHA)
#    pragma GCC target("sse4.1,sha")
#  else
#    error "define one CSVF_TARGET_* before target_begin.h"
#  endif
#endif
