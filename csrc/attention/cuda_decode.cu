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
  constexpr int each = Tile<T, Dim>::kEach, chunks = Tile<T, Dim>::kChunks;
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

  // Each lane knows where one of the keys from j on lies; past the end there is none.
  const auto find = [&](int j) {
    return j + lane % keys < end ? cache.at(batch, j + lane % keys) : Cache::Place{-1, 0};
  };
  // Copies the keys from j on, which lie at the lanes' places. Eight lanes are in one, or all in
  // its elements where these are not whole chunks.
  const auto copy = [&](const auto& to, const auto& from, const Layout& layout,
                        const Cache::Place& place, int j) {
    constexpr bool permuted = std::decay_t<decltype(to)>::kPermuted;
    const auto own_row = reinterpret_cast<uint64_t>(row_of(from, layout, place));
    const auto row_at = [&](int row) {
      return reinterpret_cast<const T*>(__shfl_sync(kAllLanes, own_row, row));
    };
    if (from.aligned && from.cols % each == 0) {
      const uint32_t target = ptx::shared_address(to.chunk(lane / 8, lane % 8));
#pragma unroll(chunks > 16 ? 1 : keys / 4)
      for (int i = 0; i < keys; i += 4) {
        const T* const source = row_at(i + lane / 8) + lane % 8 * each;
        // No bit is in both i and the lane's row.
        const uint32_t row = (permuted ? target ^ i % 8 * 16 : target) + i * chunks * 16;
#pragma unroll
        for (int c = 0; c < chunks; c += 8)
          ptx::copy_async(row + c * 16, source + c * each,
                          j + i + lane / 8 < end && (lane % 8 + c) * each < from.cols);
      }
    } else {
#pragma unroll 1
      for (int i = lane; i < keys * Dim; i += static_cast<int>(kWarp)) {
        const int row = i / Dim, col = i % Dim;
        const T* const source = row_at(row);
        *to.at(row, col) =
            j + row < end && col < from.cols ? source[col * from.col_stride] : T(0.0f);
      }
    }
  };
  const auto fetch = [&](const Cache::Place& place, int j, int parity) {
    copy(key_tile(parity), all_keys, all.cache.key, place, j);
    copy(value_tile(parity), all_values, all.cache.value, place, j);
  };
  const auto query_at = [&](int r) {
    return row_at(query, in.query, batch, head_of_row(r), query_of(r));
  };
  const bool as_is = in.query.aligned && in.head_dim % each == 0 && rotary.in.pairs == 0;
  if (as_is)
    for (int i = thread; i < rows * chunks; i += static_cast<int>(blockDim.x)) {
      const int r = i / chunks, chunk = i % chunks;
      ptx::copy_async(ptx::shared_address(queries.chunk(r, chunk)), query_at(r) + chunk * each,
                      first + r <= last && chunk * each < in.head_dim);
    }
  ptx::commit_copies();
  int j = begin + warp * keys;
  fetch(find(j), j, 0);
  ptx::commit_copies();
  Cache::Place place = find(j + step);
  if (!as_is)
    for (int i = thread; i < rows * Dim; i += static_cast<int>(blockDim.x)) {
      const int r = i / Dim, c = i % Dim;
      T element = T(0.0f);
      if (first + r <= last && c < in.head_dim)
        element = rotary.element(query_at(r), in.query.stride[3], c, offset + query_of(r));
      *queries.at(r, c) = element;
    }
  ptx::wait_for_groups<1>();
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
    if (j + step < end) fetch(place, j + step, parity ^ 1);
    place = find(j + 2 * step);
    const Values tile = value_tile(parity);
    Accumulator<keys> weights = {};
    multiply_transposed<keys>(weights, Left<T, Dim, false>(queries, 0), key_tile(parity),
                              in.head_dim);
    // Whether all of these rows see all of these keys that there are.
    const bool seen = j >= last / in.group + offset - in.left &&
                      min(j + keys, end) <= query_of(0) + offset + in.right + 1;
    const bool plain = seen && j + keys <= end && in.plain;
    if (plain) {
#pragma unroll
      for (int n = 0; n < keys / 8; n++)
#pragma unroll
        for (int e = 0; e < 4; e++)  // what is infinite is no number, see Scores
          total[e / 2] = fmaf(weights[n][e], 0, total[e / 2]);
    } else {
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
    }
    // Nothing times NaN is NaN, so that values which some of the rows do not see are looked at.
    if (!seen) {
      find_strange<keys, Dim>(tile, in.value_dim, weights, sum);
      __syncwarp();
      clean(tile.memory, keys * Dim, lane, static_cast<int>(kWarp));
      __syncwarp();
    }
    float factors[2];
#pragma unroll
    for (int half = 0; half < 2; half++)
      factors[half] = weigh<keys>(weights, half, plain ? in.scale : 1, highest[half], total[half]);
    if (__any_sync(kAllLanes, factors[0] != 1 || factors[1] != 1))
#pragma unroll
      for (int half = 0; half < 2; half++) rescale<Dim>(sum, half, factors[half]);
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
  const int columns = all.width / 4, lanes = (columns + 7) / 8 * 8;
#pragma unroll 1
  for (int i = thread; i < (last - first + 1) * lanes; i += static_cast<int>(blockDim.x)) {
    const int r = i / lanes, column = i % lanes;
    if (column >= columns) continue;
    float top = -kInfinity, weight = 0, values[4] = {};
#pragma unroll
    for (int w = 0; w < warps; w++) top = fmaxf(top, of_warps[w][r].x);
#pragma unroll
    for (int w = 0; w < warps; w++) {
      const float factor = ptx::exp2(of_warps[w][r].x - (top == -kInfinity ? 0 : top));
      float own_values[4];
      load(own_values, sums_of(w) + r * Tiles::kPitch + column * 4);
      weight += of_warps[w][r].y * factor;
#pragma unroll
      for (int k = 0; k < 4; k++) values[k] += own_values[k] * factor;
    }
    store(parts + number(r) * all.width + column * 4, values);
    if (column == 0) statistics[number(r)] = {top, weight};
  }
}

// Adds up the splits of a row, and a sink where there is one. Each warp of a block has a row, or
// all have one. Threads with the same four columns share out the splits of a row; the order of the
// sums is fixed by the shapes alone.
template <class T>
__device__ void combine(const float* parts, const float2* statistics, const double* sinks, T* out,
                        float* lse, const AttentionDecodeScalars& all) {
  constexpr int together = 4;  // loads on their way
  __shared__ float4 sums[kRowWarps * kWarp];
  const AttentionScalars& in = all.in;
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  const bool there = row < int64_t{in.batch} * in.heads * in.q_len;
  const int splits = there ? all.splits : 0;
  const float2* own = statistics + row * splits;
  const int head = static_cast<int>(row / in.q_len % in.heads);

  const float sink = sinks == nullptr ? -kInfinity : static_cast<float>(sinks[head]) * kLog2e;
  float top = sink;
  for (int s = lane_index(); s < splits; s += static_cast<int>(kWarp)) top = fmaxf(top, own[s].x);
#pragma unroll
  for (unsigned apart = kWarp / 2; apart > 0; apart /= 2)
    top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, apart));
  const float base = top == -kInfinity ? 0 : top;
  float total = 0;
  for (int s = lane_index(); s < splits; s += static_cast<int>(kWarp))
    total += own[s].y * ptx::exp2(own[s].x - base);
#pragma unroll
  for (unsigned apart = kWarp / 2; apart > 0; apart /= 2)
    total += __shfl_xor_sync(kAllLanes, total, apart);
  total += ptx::exp2(sink - base);

  const int columns = all.width / 4, teams = threads / columns, team = thread / columns;
  const int c = thread % columns * 4;
  float sum[4] = {};
  if (team < teams)
#pragma unroll 1
    for (int first = team; first < splits; first += together * teams) {
      float factors[together], values[together][4] = {};
#pragma unroll
      for (int n = 0; n < together; n++) {
        const int s = first + n * teams;
        const float2 of_split = s < splits ? own[s] : float2{-kInfinity, 0};
        factors[n] = ptx::exp2(of_split.x - base);
        if (of_split.y != 0)  // or nothing was left there
          load(values[n], parts + (row * splits + s) * all.width + c);
      }
#pragma unroll
      for (int n = 0; n < together; n++)
#pragma unroll
        for (int k = 0; k < 4; k++) sum[k] += values[n][k] * factors[n];
    }
  float4* const of_row = sums + threadIdx.y * threads;
  of_row[thread] = {sum[0], sum[1], sum[2], sum[3]};
  __syncthreads();
  if (!there || team > 0) return;
  for (int other = 1; other < min(teams, splits); other++) {
    const float4 more = of_row[thread + other * columns];
    sum[0] += more.x, sum[1] += more.y, sum[2] += more.z, sum[3] += more.w;
  }
  const float whole = total == 0 ? 0 : 1 / total;
#pragma unroll
  for (int k = 0; k < 4; k++) sum[k] *= whole;
  T* to = row_at(out, in.out, static_cast<int>(row / in.q_len / in.heads), head,
                 static_cast<int>(row % in.q_len)) +
          c;
  if (in.out.aligned) {
    store(to, sum);
  } else {
    for (int k = 0; k < min(4, in.value_dim - c); k++) to[k] = T(sum[k]);
  }
  if (thread == 0) lse[row] = total == 0 ? -kInfinity : (top + log2f(total)) * kLn2;
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
