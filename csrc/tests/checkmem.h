/* Marks memory as secret for a dynamic checker: reading a branch condition or an address from it is then an error.
 * valgrind (memcheck) and clang's MemorySanitizer both track exactly this as "uninitialised"; without either the macros
 * check nothing and CHECKMEM_RUNNING() is 0. The idea is that of ctgrind (Langley) and bitcoin-core/secp256k1 src/checkmem.h. */
#ifndef CSVF_TESTS_CHECKMEM_H
#define CSVF_TESTS_CHECKMEM_H

#if defined(__has_feature)
#  if __has_feature(memory_sanitizer)
#    include <sanitizer/msan_interface.h>
#    define SECRET(pointer, length) __msan_allocated_memory((pointer), (length))
#    define PUBLIC(pointer, length) __msan_unpoison((pointer), (length))
#    define CHECKMEM_RUNNING() 1
#    define CHECKMEM_NAME "MemorySanitizer"
#  endif
#endif
#if !defined(SECRET) && defined(__has_include)
#  if __has_include(<valgrind/memcheck.h>)
#    include <valgrind/memcheck.h>
#    define SECRET(pointer, length) VALGRIND_MAKE_MEM_UNDEFINED((pointer), (length))
#    define PUBLIC(pointer, length) VALGRIND_MAKE_MEM_DEFINED((pointer), (length))
#    define CHECKMEM_RUNNING() (RUNNING_ON_VALGRIND != 0)
#    define CHECKMEM_NAME "valgrind"
#  endif
#endif
#if !defined(SECRET)
#  define SECRET(pointer, length) ((void)(pointer), (void)(length))
#  define PUBLIC(pointer, length) ((void)(pointer), (void)(length))
#  define CHECKMEM_RUNNING() 0
#  define CHECKMEM_NAME "none"
#endif

#endif
