// All kernels of one set, in namespace smartkv::SMARTKV_ISA, and their table.
#pragma once

// clang-format off: each header uses the ones before it
#include "simd.h"
#include "convert.h"
#include "rotate.h"
#include "gemm.h"
#include "encode.h"
#include "turns.h"
#include "record.h"
#include "move.h"
#include "quantize.h"
#include "compact.h"
#include "codec.h"
#include "feed.h"
#include "tile.h"
#include "fused.h"
#include "dense.h"
#include "section.h"
#include "dot.h"
#include "digits.h"
#include "attention_tile.h"
#include "attention_rows.h"
#include "softmax.h"
#include "attention_run.h"
#include "attention_turns.h"
#include "attention_products.h"
#include "attention_mass.h"
#include "attention.h"
#include "merge.h"
#include "gate.h"
#include "basis.h"
// clang-format on

#define SMARTKV_STRING_OF(x) #x
#define SMARTKV_STRING(x) SMARTKV_STRING_OF(x)

namespace smartkv::SMARTKV_ISA {

const KernelTable& kernel_table() {
  static constexpr KernelTable TABLE = {SMARTKV_STRING(SMARTKV_ISA),
                                        quantize_kv,
                                        dequantize_kv,
                                        append_kv,
                                        compact_kv,
                                        decode_attention,
                                        attention_mass,
                                        merge_states,
                                        gate_score,
                                        change_basis,
                                        select_kv_cpu};
  return TABLE;
}

}  // namespace smartkv::SMARTKV_ISA
