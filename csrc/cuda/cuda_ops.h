// Launchers of the CUDA kernels: no torch, no CUDA header, so that any compiler can include it.
//
// Pointers of the params are on the current device. A launcher enqueues on `stream`, allocates
// nothing, waits for nothing, and returns nullptr or what the launch failed with. `workspace` has
// as many bytes as the function beside the launcher says, from an allocation aligned to 16.
#pragma once

#include <cstddef>

#include "smartkv/params.h"

namespace smartkv {

const char* merge_states_cuda(const MergeStatesParams& params, void* stream);

const char* quantize_kv_cuda(const QuantizeParams& params, void* stream);
const char* dequantize_kv_cuda(const DequantizeParams& params, void* stream);

size_t append_kv_workspace(const AppendParams& params);
const char* append_kv_cuda(const AppendParams& params, void* workspace, void* stream);

size_t compact_kv_workspace(const CompactParams& params);
const char* compact_kv_cuda(const CompactParams& params, void* workspace, void* stream);

size_t decode_attention_workspace(const DecodeAttentionParams& params);
const char* decode_attention_cuda(const DecodeAttentionParams& params, void* workspace,
                                  void* stream);

size_t attention_mass_workspace(const AttentionMassParams& params);
const char* attention_mass_cuda(const AttentionMassParams& params, void* workspace, void* stream);

size_t select_kv_workspace(const SelectParams& params);
const char* select_kv_cuda(const SelectParams& params, void* workspace, void* stream);

const char* gate_score_cuda(const GateScoreParams& params, void* stream);

const char* change_basis_cuda(const ChangeBasisParams& params, void* stream);

}  // namespace smartkv
