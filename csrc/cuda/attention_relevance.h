// Relevance that attention moves from queries to keys, on CUDA: plain functions on device pointers, no torch header.
#pragma once

#ifdef FGA_CUDA_ON_HOST
#include "cuda_on_host.h"
#else
#include <cuda_runtime.h>
#endif

#include <cstdint>

namespace fga::cuda {

enum class NumberType { bf16, half, float32 };

constexpr int kWidestHead = 128;

// [images or rows, heads, tokens, width] in device memory, strides in elements. The last dim is contiguous; data and
// every stride of a dim longer than 1 are multiples of 16 bytes.
struct HeadTensor {
  const void* data;
  int64_t batch_stride, head_stride, token_stride;
};

// Added to the scaled logits; [images, heads, queries, keys] by strides, of which any may be 0. No data: none.
struct LogitBias {
  const void* data;
  int64_t batch_stride, head_stride, query_stride, key_stride;
  bool float32;  // else of the type of q
};

struct AttentionRelevance {
  NumberType type;       // of q, k, v and grad_out
  HeadTensor q, k, v;    // [images, heads, queries, width] [images, heads, keys, width] twice
  HeadTensor grad_out;   // [rows, heads, queries, width]
  LogitBias bias;        // [images, heads, queries, keys]
  const float* lse;      // [images, heads, queries] log of the sum of exponentials of the logits
  const float* row;      // [rows, queries] relevance that arrives
  const float* gate;     // [rows, keys] or none: 1
  const int64_t* image;  // [rows] or none: row m is image m
  float* messages;       // [rows, heads, keys] workspace
  float* row_out;        // [rows, keys]
  int64_t rows, images, heads, queries, keys;
  int width;  // a multiple of 8, at most kWidestHead
  float scale;
  bool is_signed;
};

// What one launch can take; the caller refuses more.
bool fits(const AttentionRelevance& a);

// messages = sum over queries of row * relu(A * dA), A = exp(scale * q k^T + bias - lse), dA = grad_out v^T, for every
// head; is_signed: without the relu. A row whose image index is out of range comes out NaN. Queues one kernel.
void attention_messages(const AttentionRelevance& a, cudaStream_t stream);

// row_out = gate * mean over heads of messages. Queues one kernel.
void attention_combine(const AttentionRelevance& a, cudaStream_t stream);

}  // namespace fga::cuda
