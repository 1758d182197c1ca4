// What the CUDA kernels of the attention room take by value, and the tiles that they work in.
#pragma once

#include <cstdint>

namespace fastattn::cuda {

// The tiles for elements of `Bytes` and rows of at most `Dim`: of queries, 16 for each warp, and of
// keys, which are there twice, one being copied while the other is worked on.
template <int Bytes, int Dim>
struct AttentionTiles {
  static constexpr int kWidth = Bytes * Dim;  // of a row
  static_assert(kWidth <= 512);               // more does not fit into registers
  static constexpr bool kNarrow = Bytes == 2 && kWidth <= 256;
  static constexpr int kWarps = kNarrow ? 8 : 4, kThreads = 32 * kWarps, kQueries = 16 * kWarps;
  static constexpr int kKeys = kNarrow ? 64 : 32;
  static constexpr int kShared = kWidth * (kQueries + 2 * 2 * kKeys);
};

// Dynamic shared memory that a block can have on sm_90, with some static beside it.
constexpr int kMostGroupShared = 216 * 1024;

// The same for warp groups of sm_90a, which have 64 queries each, beside one that copies. `Extras`:
// see cuda_sm90.cu.
template <int Dim, bool Extras>
struct GroupTiles {
  static constexpr int kGroups = Dim == 64 && !Extras ? 3 : 2;      // as registers allow
  static constexpr int kAttending = 128 * kGroups, kCopying = 128;  // threads
  static constexpr int kThreads = kAttending + kCopying, kQueries = 64 * kGroups;
  static constexpr int kKeys = Extras || Dim == 256 ? 64 : Dim == 128 ? 128 : 112;
  static constexpr int kStages = 2;
  static constexpr int kShared = 2 * Dim * (kQueries + 2 * kStages * kKeys);
  // Registers of a thread that attends, and of one that copies: all, in shares of 8.
  static constexpr int kMore = kGroups == 3 ? 160 : 224, kFewer = kGroups == 3 ? 32 : 56;
  static constexpr int kUnrolled = Dim == 128 ? 2 : 1;  // of copying, as registers allow
};

// The gradients of 64 rows, of queries or of keys, sum over what they meet: the other side, which
// is there twice, one block being copied while another is worked on.
template <int Bytes, int Dim>
struct BackwardTiles {
  static constexpr int kWidth = Bytes * Dim;
  static constexpr int kWarps = 4, kThreads = 32 * kWarps, kRows = 16 * kWarps;
  static constexpr int kOthers = kWidth <= 256 ? 32 : 16;
  static constexpr int kShared = 2 * kWidth * (kRows + 2 * kOthers);
  // Where the sums of both do not fit into registers, keys and values have blocks of their own.
  static constexpr bool kApart = kWidth > 256;
};

// Bytes of a row of a bias in shared memory, for elements of so many: lanes whose rows are keys, or
// queries, read from all banks.
template <bool OfKeys, int Keys, int Bytes>
constexpr int kBiasPitch = OfKeys ? Keys * Bytes + 16 : (Keys + 16) * Bytes;

// The same for warp groups of sm_90a, which have 64 rows each, of queries or of keys. `Extras`: see
// cuda_backward_sm90.cu.
template <int Dim, bool OfKeys, bool Extras>
struct GroupBackwardTiles {
  static constexpr int kGroups = Dim == 64 && !(OfKeys && Extras) ? 3 : 2;  // as registers allow
  static constexpr int kThreads = 128 * kGroups, kRows = 64 * kGroups;
  static constexpr int kOthers = 64;
  static constexpr int kCopying = 256;  // threads that copy
  static constexpr int kShared = 2 * 2 * Dim * (kRows + 2 * kOthers);
  // Of two blocks of a bias, see BiasTile.
  static constexpr int kQueries = OfKeys ? kOthers : kRows, kKeys = OfKeys ? kRows : kOthers;
  template <int Bytes>
  static constexpr int kBias = 2 * kQueries * kBiasPitch<OfKeys, kKeys, Bytes>;
};

// The gradient of a bias sums over all that share it, whose both sides are there twice.
template <int Dim>
struct GroupBiasTiles {
  static constexpr int kGroups = Dim == 64 ? 3 : 2;  // as shared memory allows
  static constexpr int kThreads = 128 * kGroups, kRows = 64 * kGroups;
  static constexpr int kOthers = 64;
  static constexpr int kCopying = 256;  // threads that copy
  static constexpr int kShared = 2 * 2 * 2 * Dim * (kRows + kOthers);
};

// Strides count elements; those of a dimension that broadcasts are 0. `aligned`: see Matrix.
struct Layout {
  int64_t stride[4];
  int32_t aligned;
};

// Numbers of int32 or int64.
struct Integers {
  int64_t stride[2];
  int32_t wide;
};

// Where the sequences of a packed batch begin, and where the last ends.
struct Boundaries {
  Integers numbers;
  int32_t longest;  // no sequence has more rows
};

// A batch of packed sequences is one of 1 whose rows are theirs, one sequence after the other.
struct AttentionScalars {
  int32_t batch, heads, group;  // group: query heads that share a head of keys
  int32_t q_len, kv_len, head_dim, value_dim;
  int32_t query_blocks, key_blocks;  // of a sequence; of all packed ones, at most
  int32_t sequences;                 // packed, or 0
  int32_t bottom_right;              // of packed sequences
  Boundaries query_starts, key_starts;
  Layout query, key, value, out;
  int64_t mask[4], bias[4];
  int32_t wide_bias;     // fp32, whatever query is
  int32_t aligned_bias;  // four elements of a row can be loaded at once
  int32_t chunked_bias;  // 16 bytes of a row can be copied at once
  int32_t offset;        // where sequences are not packed
  int32_t left, right;   // query i sees the keys i + offset - left ... i + offset + right
  int32_t hides;         // whether some keys may be invisible
  int32_t plain;         // whether logits are no more than products times a positive scale
  float scale;           // of products, to logits in base 2, or to softcap's argument
  float softcap;         // in base 2, 0 for none
  uint32_t threshold;    // of dropout, 0 without
  float kept;
};

struct AttentionBackwardScalars {
  AttentionScalars in;
  Layout grad_out, grad_query, grad_key, grad_value;
  int32_t bias_sizes[4];         // 1 where the bias broadcasts
  float scale;                   // of products, to logits
  int32_t first_head;            // of all batches', whose gradients come from this launch
  int32_t kept_rows, kept_cols;  // tiles of a head, see KeptWords
};

// A warp has 16 rows of queries, those of all heads that share a head of keys, and tiles of keys of
// its own, which are there twice, one being copied while the other is worked on. In the end it has
// room there for its sums.
template <int Bytes, int Dim>
struct DecodeTiles {
  static constexpr int kWidth = Bytes * Dim;
  static constexpr int kWarps = kWidth <= 256 ? 4 : 2, kRows = 16, kKeys = 16;
  static constexpr int kEach = 2 * 2 * kKeys * kWidth;  // of a warp
  static constexpr int kPitch = Dim + 8;  // of a row of sums, so that rows lie in different banks
  static constexpr int kShared = kRows * kWidth + kWarps * kEach;
  static_assert(kRows * kPitch * 4 <= kEach);
};

// A cache [pages, Hkv, size, D] in which sequence b has the pages of row b of a table; without a
// table it has page b.
struct CacheScalars {
  Integers lengths, table;
  int32_t pages, size;
  int32_t most;  // positions of a sequence
  Layout key, value;
};

struct RotaryScalars {
  int64_t cos[2], sin[2];
  int32_t positions, pairs, interleaved;
  int32_t wide;  // fp32, whatever query is
};

struct AttentionDecodeScalars {
  AttentionScalars in;
  CacheScalars cache;
  RotaryScalars rotary;
  int32_t appended;    // to the lengths
  int32_t splits;      // of the keys
  int32_t row_blocks;  // of the queries that share a head of keys
  int32_t width;       // of a row of a split's sums, a multiple of 4
};

struct AttentionAppendScalars {
  CacheScalars cache;
  RotaryScalars rotary;
  Layout key, value;
  int32_t batch, kv_heads, new_len, head_dim, value_dim;
};

constexpr int kRowWarps = 4;             // of a block, in which each warp has one row
constexpr int kFewSplits = 4;            // which one warp adds up
constexpr int kStatisticsTeam = 8;       // threads for each row
constexpr int kStatisticsThreads = 256;  // of a block
constexpr int32_t kFar = 1 << 29;        // no bound of a window

}  // namespace fastattn::cuda
