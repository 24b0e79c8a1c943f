#pragma once

// One wheel serves every x86-64: code is compiled three times, and chosen when the library is loaded.
#if defined(__x86_64__) && defined(__linux__)
// A function so marked, where the compiler finds the vectors.
#define FASTRPE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
// DEFINE(target, bytes, A) defines functions that are marked with the target and told its vectors' bytes: vectors of
// another length than the target's are taken apart through memory.
#define FASTRPE_FOR_TARGETS(DEFINE, A)                     \
  DEFINE(__attribute__((target("arch=x86-64-v4"))), 64, A) \
  DEFINE(__attribute__((target("arch=x86-64-v3"))), 32, A) \
  DEFINE(__attribute__((target("default"))), 16, A)
#else
#define FASTRPE_CLONES
#define FASTRPE_FOR_TARGETS(DEFINE, A) DEFINE(, 16, A)
#endif
