// Attention of few queries to a cache on a GPU (flash-decoding, Dao et al. 2023), and what puts new
// keys and values there: blocks share out the keys, and a second kernel adds up what they leave.
#include "attention/scores.cuh"

namespace fastattn::cuda {
namespace {

// Where the positions of sequences lie. A length that has no room and a page that is none stop the
// kernel, for the host has not read them.
struct Cache {
  const CacheScalars& in;
  const void *lengths, *table;

  struct Place {
    int page, slot;
  };

  __device__ int length(int sequence, int more) const {
    const int64_t found = integer(lengths, in.lengths, 0, sequence);
    if (found < 0 || found > in.most - more) __trap();
    return static_cast<int>(found) + more;
  }
  __device__ Place at(int sequence, int position) const {
    if (table == nullptr) return {sequence, position};
    const int64_t page = integer(table, in.table, sequence, position / in.size);
    if (page < 0 || page >= in.pages) __trap();
    return {static_cast<int>(page), position % in.size};
  }
};

// One head of a cache, whose row is the place's.
template <class T>
__device__ Matrix<T> head_of(T* cache, const Layout& layout, int head, int cols) {
  return matrix(cache, layout, 0, head, 0, 0, cols);
}
template <class T>
__device__ T* row_of(const Matrix<T>& head, const Layout& layout, const Cache::Place& place) {
  return head.data + place.page * layout.stride[0] + place.slot * layout.stride[2];
}

// Rotary embedding, element by element.
template <class T>
struct Rotary {
  const RotaryScalars& in;
  const void *cos, *sin;

  __device__ float angle(const void* table, const int64_t (&stride)[2], int position,
                         int pair) const {
    const int64_t at = position * stride[0] + pair * stride[1];
    return in.wide ? static_cast<const float*>(table)[at]
                   : static_cast<float>(static_cast<const T*>(table)[at]);
  }
  // Element c of a row at a position, turned.
  __device__ T element(const T* row, int64_t stride, int c, int position) const {
    const T own = row[c * stride];
    if (c >= 2 * in.pairs) return own;
    if (position < 0 || position >= in.positions) __trap();
    const bool first = in.interleaved ? c % 2 == 0 : c < in.pairs;
    const int pair = in.interleaved ? c / 2 : first ? c : c - in.pairs;
    const int apart = in.interleaved ? 1 : in.pairs;
    const float x = static_cast<float>(own);
    const float y = static_cast<float>(row[(first ? c + apart : c - apart) * stride]);
    const float turned = y * angle(sin, in.sin, position, pair);
    return T(x * angle(cos, in.cos, position, pair) + (first ? -turned : turned));
  }
};

// Works on sixteen rows of the queries that share a head of keys, against a split of these. Leaves
// for each row its weighted values relative to its highest logit, and in `statistics` that logit
// and the sum of its weights; where there are no keys, a sum of 0 alone.
template <class T, int Dim>
__device__ void attend(const T* query, const T* key_cache, const T* value_cache, const Cache& cache,
                       const Rotary<T>& rotary, const float* alibi_slopes, float* parts,
                       float2* statistics, const AttentionDecodeScalars& all) {
  using Tiles = DecodeTiles<sizeof(T), Dim>;
  using Values = Tile<T, Dim, sizeof(T) == 2>;  // fp32 reads one row at a time
  constexpr int rows = Tiles::kRows, keys = Tiles::kKeys, warps = Tiles::kWarps;
  constexpr int step = warps * keys;
  const AttentionScalars& in = all.in;
  // Neighbouring blocks have the heads of one split, for these may share pages of memory.
  int block = static_cast<int>(blockIdx.x);
  const auto next = [&](int count) {
    const int own = block % count;
    block /= count;
    return own;
  };
  const int head = next(in.heads / in.group), split = next(all.splits);
  const int first = next(all.row_blocks) * rows, batch = block;
  const int last = min(first + rows, in.group * in.q_len) - 1;
  const auto query_of = [&](int r) { return (first + r) / in.group; };
  const auto head_of_row = [&](int r) { return head * in.group + (first + r) % in.group; };
  const auto number = [&](int r) {  // of a row's split
    return ((int64_t{batch} * in.heads + head_of_row(r)) * in.q_len + query_of(r)) * all.splits +
           split;
  };

  // The keys that any of these queries sees, and this split's, [begin, end).
  const int length = cache.length(batch, all.appended), offset = length - in.q_len;
  const int seen_begin = max(query_of(0) + offset - in.left, 0);
  const int seen_end = min(last / in.group + offset + in.right + 1, length);
  const int share = (max(seen_end - seen_begin, 0) + all.splits - 1) / all.splits;
  const int begin = seen_begin + split * ((share + step - 1) / step * step);
  const int end = min(begin + (share + step - 1) / step * step, seen_end);
  const int thread = static_cast<int>(threadIdx.x), lane = lane_index(), q = lane % 4;
  const int warp = thread / static_cast<int>(kWarp);
  if (begin >= end) {
    if (thread <= last - first) statistics[number(thread)] = {-kInfinity, 0};
    return;
  }

  T* memory = reinterpret_cast<T*>(shared_memory);
  const Tile<T, Dim> queries{memory};
  T* const own = memory + rows * Dim + warp * Tiles::kEach / sizeof(T);
  const auto key_tile = [&](int parity) { return Tile<T, Dim>{own + parity * 2 * keys * Dim}; };
  const auto value_tile = [&](int parity) { return Values{key_tile(parity).memory + keys * Dim}; };
  const auto all_keys = head_of(key_cache, all.cache.key, head, in.head_dim);
  const auto all_values = head_of(value_cache, all.cache.value, head, in.value_dim);

  // The lanes are each in a chunk or, where these are not aligned, in an element.
  const auto copy = [&](const auto& to, const auto& from, const Layout& layout,
                        Cache::Place place) {
    constexpr int chunks = Tile<T, Dim>::kChunks, each = Tile<T, Dim>::kEach;
    const auto row_at = [&](int row, bool& there) {
      const Cache::Place at = {__shfl_sync(kAllLanes, place.page, row),
                               __shfl_sync(kAllLanes, place.slot, row)};
      there = at.page >= 0;
      return row_of(from, layout, at);
    };
    bool there;
    if (from.aligned) {
#pragma unroll 4
      for (int i = lane; i < keys * chunks; i += static_cast<int>(kWarp)) {
        const int row = i / chunks, chunk = i % chunks, col = chunk * each;
        const T* source = row_at(row, there) + col;
        const int count = there ? min(max(from.cols - col, 0), each) : 0;
        ptx::copy_async(to.chunk(row, chunk), source, count * static_cast<int>(sizeof(T)));
      }
    } else {
#pragma unroll 1
      for (int i = lane; i < keys * Dim; i += static_cast<int>(kWarp)) {
        const int row = i / Dim, col = i % Dim;
        const T* source = row_at(row, there) + col * from.col_stride;
        *to.at(row, col) = there && col < from.cols ? *source : T(0.0f);
      }
    }
  };
  // Each lane knows where one of the keys from j on lies; past the end there is none.
  const auto find = [&](int j) {
    return j + lane % keys < end ? cache.at(batch, j + lane % keys) : Cache::Place{-1, 0};
  };
  const auto fetch = [&](const Cache::Place& place, int parity) {
    copy(key_tile(parity), all_keys, all.cache.key, place);
    copy(value_tile(parity), all_values, all.cache.value, place);
  };
  int j = begin + warp * keys;
  fetch(find(j), 0);
  Cache::Place place = find(j + step);

  for (int i = thread; i < rows * Dim; i += static_cast<int>(blockDim.x)) {
    const int r = i / Dim, c = i % Dim;
    T element = T(0.0f);
    if (first + r <= last && c < in.head_dim) {
      const T* from = query + batch * in.query.stride[0] + head_of_row(r) * in.query.stride[1] +
                      query_of(r) * in.query.stride[2];
      element = rotary.element(from, in.query.stride[3], c, offset + query_of(r));
    }
    *queries.at(r, c) = element;
  }
  __syncthreads();

  // To these queries, keys past the split's end are not there.
  const Sequence sequence = {batch, 0, in.q_len, 0, end, offset};
  const Terms terms = {nullptr, nullptr, alibi_slopes};
  const Scores<T> scores[2] = {Scores<T>(in, sequence, terms, head_of_row(lane / 4)),
                               Scores<T>(in, sequence, terms, head_of_row(lane / 4 + 8))};
  Accumulator<Dim> sum = {};
  float highest[2] = {-kInfinity, -kInfinity}, total[2] = {};
#pragma unroll 1
  for (int parity = 0; j < end; j += step, parity ^= 1) {
    ptx::wait_for_copies();
    __syncwarp();
    if (j + step < end) fetch(place, parity ^ 1);
    place = find(j + 2 * step);
    const Values tile = value_tile(parity);
    Accumulator<keys> weights = {};
    multiply_transposed<keys>(weights, Left<T, Dim, false>(queries, 0), key_tile(parity),
                              in.head_dim);
#pragma unroll
    for (int n = 0; n < keys / 8; n++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const auto sight = scores[half].sight(query_of(lane / 4 + half * 8), j + n * 8 + 2 * q);
#pragma unroll
        for (int k = 0; k < 2; k++) {
          float& weight = weights[n][2 * half + k];
          weight = scores[half].template operator()<true>(weight, sight, k);
        }
      }
    // Nothing times NaN is NaN, so that values which some of the rows do not see are looked at.
    if (j < last / in.group + offset - in.left ||
        min(j + keys, end) > query_of(0) + offset + in.right + 1) {
      find_strange<keys, Dim>(tile, in.value_dim, weights, sum);
      __syncwarp();
      clean(tile.memory, keys * Dim, lane, static_cast<int>(kWarp));
      __syncwarp();
    }
    weigh<keys, Dim>(weights, 1, highest, total, sum);
    multiply<keys>(sum, weights, tile);
  }
  ptx::wait_for_copies();

  // The warps' sums become one.
  __shared__ float2 of_warps[warps][rows];  // highest logit, sum of weights
  const auto sums_of = [&](int w) {
    return reinterpret_cast<float*>(memory + rows * Dim + w * Tiles::kEach / sizeof(T));
  };
  __syncwarp();
  add_up(total);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int r = lane / 4 + 8 * half;
    if (q == 0) of_warps[warp][r] = {highest[half], total[half]};
#pragma unroll
    for (int n = 0; n < Dim / 8; n++)
      ptx::store_shared(sums_of(warp) + r * Tiles::kPitch + n * 8 + 2 * q, sum[n][2 * half],
                        sum[n][2 * half + 1]);
  }
  __syncthreads();
  // Eight lanes, which take turns with others, are in one row, for two rows share banks.
  const int chunks = all.width / 4, lanes = (chunks + 7) / 8 * 8;
#pragma unroll 1
  for (int i = thread; i < (last - first + 1) * lanes; i += static_cast<int>(blockDim.x)) {
    const int r = i / lanes, chunk = i % lanes;
    if (chunk >= chunks) continue;
    float top = -kInfinity, weight = 0, values[4] = {};
#pragma unroll
    for (int w = 0; w < warps; w++) top = fmaxf(top, of_warps[w][r].x);
#pragma unroll
    for (int w = 0; w < warps; w++) {
      const float factor = ptx::exp2(of_warps[w][r].x - (top == -kInfinity ? 0 : top));
      float own_values[4];
      load(own_values, sums_of(w) + r * Tiles::kPitch + chunk * 4);
      weight += of_warps[w][r].y * factor;
#pragma unroll
      for (int k = 0; k < 4; k++) values[k] += own_values[k] * factor;
    }
    store(parts + number(r) * all.width + chunk * 4, values);
    if (chunk == 0) statistics[number(r)] = {top, weight};
  }
}

// A warp adds up the splits of one row, in their order, and a sink where there is one.
template <class T>
__device__ void combine(const float* parts, const float2* statistics, const double* sinks, T* out,
                        float* lse, const AttentionDecodeScalars& all) {
  const AttentionScalars& in = all.in;
  const int lane = lane_index();
  const int64_t row = int64_t{blockIdx.x} * kRowWarps + threadIdx.x / kWarp;
  if (row >= int64_t{in.batch} * in.heads * in.q_len) return;
  const int i = static_cast<int>(row % in.q_len),
            head = static_cast<int>(row / in.q_len % in.heads),
            batch = static_cast<int>(row / in.q_len / in.heads);
  const float2* own = statistics + row * all.splits;

  const float sink = sinks == nullptr ? -kInfinity : static_cast<float>(sinks[head]) * kLog2e;
  float top = sink;
  for (int s = lane; s < all.splits; s += static_cast<int>(kWarp)) top = fmaxf(top, own[s].x);
#pragma unroll
  for (unsigned apart = kWarp / 2; apart > 0; apart /= 2)
    top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, apart));
  const float base = top == -kInfinity ? 0 : top;
  float total = 0;
  for (int s = lane; s < all.splits; s += static_cast<int>(kWarp))
    total += own[s].y * ptx::exp2(own[s].x - base);
#pragma unroll
  for (unsigned apart = kWarp / 2; apart > 0; apart /= 2)
    total += __shfl_xor_sync(kAllLanes, total, apart);
  total += ptx::exp2(sink - base);

  const float whole = total == 0 ? 0 : 1 / total;
  T* to = out + batch * in.out.stride[0] + head * in.out.stride[1] + i * in.out.stride[2];
  for (int c = 4 * lane; c < all.width; c += 4 * static_cast<int>(kWarp)) {
    float sum[4] = {};
#pragma unroll 4
    for (int s = 0; s < all.splits; s++) {
      const float2 of_split = own[s];
      if (of_split.y == 0) continue;  // nothing was left there
      const float factor = ptx::exp2(of_split.x - base) * whole;
      float values[4];
      load(values, parts + (row * all.splits + s) * all.width + c);
#pragma unroll
      for (int k = 0; k < 4; k++) sum[k] += values[k] * factor;
    }
    if (in.out.aligned) {
      store(to + c, sum);
    } else {
      for (int k = 0; k < min(4, in.value_dim - c); k++) to[c + k] = T(sum[k]);
    }
  }
  if (lane == 0) lse[row] = total == 0 ? -kInfinity : (top + log2f(total)) * kLn2;
}

// A warp puts one new key of a head, turned to its position, and its value into the caches.
template <class T>
__device__ void append(const T* key, const T* value, T* key_cache, T* value_cache,
                       const Cache& cache, const Rotary<T>& rotary,
                       const AttentionAppendScalars& all) {
  const int lane = lane_index();
  const int64_t number = int64_t{blockIdx.x} * kRowWarps + threadIdx.x / kWarp;
  const int head = static_cast<int>(number % all.kv_heads),
            j = static_cast<int>(number / all.kv_heads % all.new_len);
  const int64_t batch = number / all.kv_heads / all.new_len;
  if (batch >= all.batch) return;
  const int sequence = static_cast<int>(batch);
  const int position = cache.length(sequence, all.new_len) - all.new_len + j;
  const Cache::Place place = cache.at(sequence, position);

  // Where sequences share pages the last wins, whichever comes first: it alone writes.
  if (cache.table != nullptr) {
    bool written = false;
    for (int other = sequence + lane; other < all.batch; other += static_cast<int>(kWarp)) {
      const int end = cache.length(other, all.new_len), size = cache.in.size;
      int at = other == sequence ? position + 1 : end - all.new_len;
      for (at += (place.slot - at % size + size) % size; at < end; at += size)
        written = written || cache.at(other, at).page == place.page;
    }
    if (__any_sync(kAllLanes, written)) return;
  }

  const auto put = [&](const T* from, const Layout& source, T* to, const Layout& target, int cols,
                       const auto& element) {
    const T* row = from + batch * source.stride[0] + head * source.stride[1] + j * source.stride[2];
    T* into = row_of(head_of(to, target, head, cols), target, place);
    for (int c = lane; c < cols; c += static_cast<int>(kWarp))
      into[c * target.stride[3]] = element(row, source.stride[3], c);
  };
  put(key, all.key, key_cache, all.cache.key, all.head_dim,
      [&](const T* row, int64_t stride, int c) {
        return rotary.element(row, stride, c, position);
      });
  put(value, all.value, value_cache, all.cache.value, all.value_dim,
      [&](const T* row, int64_t stride, int c) { return row[c * stride]; });
}

}  // namespace
}  // namespace fastattn::cuda

using namespace fastattn::cuda;

#define FASTATTN_DECODE(name, T, Dim)                                                             \
  extern "C" __global__ void __launch_bounds__(DecodeTiles<sizeof(T), Dim>::kWarps* kWarp, 1)     \
      attention_decode_##name##_##Dim(                                                            \
          const T* query, const T* key_cache, const T* value_cache, const void* lengths,          \
          const void* table, const void* cos, const void* sin, const float* alibi_slopes,         \
          float* parts, float2* statistics, const __grid_constant__ AttentionDecodeScalars all) { \
    attend<T, Dim>(query, key_cache, value_cache, {all.cache, lengths, table},                    \
                   {all.rotary, cos, sin}, alibi_slopes, parts, statistics, all);                 \
  }

FASTATTN_DECODE(f32, float, 64)
FASTATTN_DECODE(f32, float, 128)
FASTATTN_DECODE(bf16, __nv_bfloat16, 64)
FASTATTN_DECODE(bf16, __nv_bfloat16, 128)
FASTATTN_DECODE(bf16, __nv_bfloat16, 256)
FASTATTN_DECODE(f16, __half, 64)
FASTATTN_DECODE(f16, __half, 128)
FASTATTN_DECODE(f16, __half, 256)

#define FASTATTN_ROWS(name, T)                                                                \
  extern "C" __global__ void __launch_bounds__(kRowWarps* kWarp, 1) attention_combine_##name( \
      const float* parts, const float2* statistics, const double* sinks, T* out, float* lse,  \
      const __grid_constant__ AttentionDecodeScalars all) {                                   \
    combine(parts, statistics, sinks, out, lse, all);                                         \
  }                                                                                           \
  extern "C" __global__ void __launch_bounds__(kRowWarps* kWarp, 1) attention_append_##name(  \
      const T* key, const T* value, T* key_cache, T* value_cache, const void* lengths,        \
      const void* table, const void* cos, const void* sin,                                    \
      const __grid_constant__ AttentionAppendScalars all) {                                   \
    append<T>(key, value, key_cache, value_cache, {all.cache, lengths, table},                \
              {all.rotary, cos, sin}, all);                                                   \
  }

FASTATTN_ROWS(f32, float)
FASTATTN_ROWS(bf16, __nv_bfloat16)
FASTATTN_ROWS(f16, __half)
