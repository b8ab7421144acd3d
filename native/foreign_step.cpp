#include "foreign_step.h"

#include <algorithm>
#include <atomic>
#include <string>

#include "linear/layout.h"
#include "linear/product_kernels.h"
#include "system/cpu.h"
#include "system/error.h"

namespace mnemos {
namespace {

// More weights than this do not stay in the caches until the next pass; keeping them there only costs the caller's code
// and data their place, so they are read bypassing the caches where that is fast.
constexpr int64_t passing_bytes = 32 << 20;
constexpr int64_t piece_bytes = 1024;  // between two checks whether the thread is needed
// Less than this is not worth waking another thread.
constexpr int64_t least_shared_bytes = 128 << 10;
// Nor are fewer activations to round.
constexpr int64_t least_shared_values = 16 << 10;
// With fewer rows, a piece of a product spends too much of its time on unpacking weights.
constexpr int64_t least_rows = 48;

// With more, arithmetic takes longer than reading, and wide registers pay.
constexpr int64_t most_brief_rows = 2;

int64_t parts_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// The kernels of brief operators; null if they are those of all others. In float32 both give the same bits.
const ProductKernels *brief_kernels(OperatorClass which) {
  const Isa level = brief_isa(which);
  return level == current_isa(which) ? nullptr : find_kernels(isa_name(level));
}

}  // namespace

ForeignStep::ForeignStep(std::shared_ptr<Pool> pool)
    : pool_(std::move(pool)), kernels_(vector_kernels(brief_isa(OperatorClass::attention))),
      brief_kernels_(brief_kernels(OperatorClass::floats)), scores_(static_cast<size_t>(pool_->threads())) {}

ForeignStep::~ForeignStep() { pool_->interrupt(); }

bool ForeignStep::passes_by() const { return bytes_ > passing_bytes && bypassing_is_fast(); }

ForeignStep::Link ForeignStep::checked(MatrixPointer matrix, VectorPointer bias, bool precise) const {
  if (matrix->layout.type == WeightType::f16)
    throw config_error("a product outside a program needs weights in float32, bfloat16 or quantized ones");
  if (bias && static_cast<int64_t>(bias->size()) != matrix->rows) {
    throw config_error("a bias has " + std::to_string(bias->size()) + " values; its matrix has " +
                       std::to_string(matrix->rows) + " rows");
  }
  return {
      std::move(matrix), std::move(bias), precise, {}, -1, std::vector<int64_t>(static_cast<size_t>(pool_->threads()))};
}

ForeignStep::Link &ForeignStep::link(int number) {
  if (number < 0 || static_cast<size_t>(number) >= links_.size())
    throw config_error("there is no product " + std::to_string(number));
  return links_[static_cast<size_t>(number)];
}

int ForeignStep::add(MatrixPointer matrix, VectorPointer bias, bool precise) {
  std::lock_guard<std::mutex> lock(mutex_);
  pool_->interrupt();
  links_.push_back(checked(std::move(matrix), std::move(bias), precise));
  bytes_ += static_cast<int64_t>(links_.back().matrix->bytes());
  return static_cast<int>(links_.size()) - 1;
}

void ForeignStep::replace(int number, MatrixPointer matrix, VectorPointer bias) {
  std::lock_guard<std::mutex> lock(mutex_);
  pool_->interrupt();
  Link &place = link(number);
  const auto old = static_cast<int64_t>(place.matrix->bytes());
  place = checked(std::move(matrix), std::move(bias), place.precise);
  bytes_ += static_cast<int64_t>(place.matrix->bytes()) - old;
}

// The caller's memory where the product can read it as it is, else a copy.
Input ForeignStep::input_of(const Link &link, const void *x, int64_t rows) {
  const Matrix &matrix = *link.matrix;
  if (matrix.layout.quantized()) return quantized_input(link, static_cast<const float *>(x), rows);
  const bool bfloats = matrix.layout.type == WeightType::bf16, as_stored = !bfloats || matrix.form == Form::bf16;
  const auto *halves = static_cast<const uint16_t *>(x);
  Input input =
      bind_input(matrix.kernels, matrix.form, rows, matrix.columns, const_cast<void *>(x));  // which is only read
  if (as_stored && input.padded == matrix.columns) return input;
  padded_.assign(input_bytes(matrix.form, rows, matrix.columns), 0);
  input = bind_input(matrix.kernels, matrix.form, rows, matrix.columns, padded_.data());
  if (!bfloats) {
    prepare_rows(input, static_cast<const float *>(x), matrix.columns, 0, rows);
    return input;
  }
  for (int64_t r = 0; r < rows; r++, halves += matrix.columns) {
    if (as_stored) {
      std::copy_n(halves, matrix.columns, input.halves + r * input.padded);
    } else {
      std::transform(halves, halves + matrix.columns, input.values + r * input.padded, bfloat_to_float);
    }
  }
  return input;
}

Input ForeignStep::quantized_input(const Link &link, const float *x, int64_t rows) {
  const Matrix &matrix = *link.matrix;
  const Form form = matrix.input_form(link.precise);
  const size_t bytes = input_bytes(form, rows, matrix.columns);
  if (padded_.size() < bytes + 64) padded_.resize(bytes + 64);
  auto *aligned = reinterpret_cast<uint8_t *>((reinterpret_cast<uintptr_t>(padded_.data()) + 63) / 64 * 64);
  const Input input = bind_input(matrix.kernels, form, rows, matrix.columns, aligned);
  constexpr int64_t together = 4;
  if (rows < 2 * together || rows * matrix.columns < least_shared_values) {
    prepare_rows(input, x, matrix.columns, 0, rows);
  } else {
    pool_->interrupt();
    share(parts_of(rows, together), [&](int64_t item, int) {
      prepare_rows(input, x, matrix.columns, item * together, std::min(rows, (item + 1) * together));
    });
  }
  return input;
}

void ForeignStep::multiply(int number, const void *x, int64_t rows, void *y) {
  std::lock_guard<std::mutex> lock(mutex_);
  Link &own = link(number);
  const Matrix &matrix = *own.matrix;
  Input input = input_of(own, x, rows);
  input.passing = passes_by();
  const bool bfloats = matrix.layout.type == WeightType::bf16;
  const float *bias = own.bias ? own.bias->data() : nullptr;
  Input rounded = bind_input(matrix.kernels, Form::bf16, rows, matrix.rows, y);
  rounded.padded = matrix.rows;
  // Sums that are rounded to bfloat16 afterwards are close together meanwhile: in rows as long as y's they would each
  // be in a page of their own.
  const bool briefly = brief_kernels_ != nullptr && rows <= most_brief_rows && matrix.layout.type == WeightType::f32;
  const ProductKernels &kernels = briefly ? *brief_kernels_ : matrix.kernels;
  const auto multiply_part = [&](int64_t row_begin, int64_t row_end, int64_t begin, int64_t end, float *sums) {
    if (!bfloats)
      return kernels.multiply(matrix, input, row_begin, row_end, begin, end, static_cast<float *>(y), matrix.rows, bias,
                              0);
    const int64_t first = begin * panel_rows, stride = (end - begin) * panel_rows;
    kernels.multiply(matrix, input, row_begin, row_end, begin, end, sums - first, stride, bias, 0);
    prepare_columns(rounded, sums - first, stride, row_begin, row_end, first, std::min(first + stride, matrix.rows));
  };
  const int64_t panels = matrix.panels();
  const int64_t work = static_cast<int64_t>(matrix.bytes()) * (rows > least_rows ? rows / least_rows : 1);
  const bool shared = work >= least_shared_bytes;
  const int64_t size = !shared ? panels : panels >= 32 * pool_->threads() ? 4 : 2;  // panels of an item
  const int64_t outputs = panels * panel_rows, part_floats = rows * size * panel_rows;
  if (bfloats) sums_.resize(static_cast<size_t>(outputs + part_floats * (shared ? pool_->threads() : 1)));
  float *const sums = sums_.data() + outputs;  // after as many as `multiply_part` subtracts at most
  if (!shared) return multiply_part(0, rows, 0, panels, sums);
  pool_->interrupt();
  std::fill(own.fetched.begin(), own.fetched.end(), 0);
  if (last_ >= 0) {
    Link &before = link(last_);
    before.next = number;
    if (!attended_) before.attention = PlainAttention{};
  }
  last_ = number, attended_ = false;
  const int64_t columns = parts_of(panels, size);  // of items; rows are divided if there are too few
  const int64_t parts = std::clamp<int64_t>(rows / least_rows, 1, parts_of(8 * pool_->threads(), columns));
  share(columns * parts, [&](int64_t item, int thread) {
    const int64_t column = item / parts * size, part = item % parts;
    multiply_part(rows * part / parts, rows * (part + 1) / parts, column, std::min(panels, column + size),
                  sums + thread * part_floats);
  });
  fetch_ahead();
}

void ForeignStep::attend(const PlainAttention &a) {
  if (a.batch < 0 || a.count < 1 || a.head_dim < 1 || a.kv_heads < 1 || a.heads % a.kv_heads != 0) {
    throw config_error("attention of " + std::to_string(a.heads) + " heads over " + std::to_string(a.kv_heads) +
                       " with " + std::to_string(a.count) + " keys of " + std::to_string(a.head_dim) +
                       " values does not fit together");
  }
  std::lock_guard<std::mutex> lock(mutex_);
  // Neighbouring heads of the same keys find them in the caches.
  const bool passing = passes_by() && a.heads == a.kv_heads;
  const auto attend_head = [&](int64_t item, int thread) {
    const int64_t b = item / a.heads, h = item % a.heads, kv = h / (a.heads / a.kv_heads);
    std::vector<float> &scores = scores_[static_cast<size_t>(thread)];
    if (static_cast<int64_t>(scores.size()) < a.count) scores.resize(static_cast<size_t>(a.count + a.count / 2));
    kernels_.attend_plain(a.queries.head(b, h), a.keys.head(b, kv), a.values.head(b, kv), a.count, a.head_dim, a.scale,
                          passing, scores.data(), a.y + item * a.head_dim);
  };
  const int64_t items = a.batch * a.heads;
  if (2 * a.batch * a.kv_heads * a.count * a.head_dim * 4 < least_shared_bytes) {
    for (int64_t item = 0; item < items; item++) attend_head(item, 0);
    return;
  }
  share(items, attend_head);
  if (last_ >= 0) link(last_).attention = a, attended_ = true;
  fetch_ahead();
}

// Every thread has a run of neighbouring items; one that is done early helps the others.
void ForeignStep::share(int64_t items, const std::function<void(int64_t item, int thread)> &body) {
  struct alignas(64) Counter {
    std::atomic<int64_t> taken{0};
  };
  const int threads = pool_->threads();
  const auto counters = std::make_unique<Counter[]>(static_cast<size_t>(threads));
  pool_->share(threads, 1, Pool::Team::open, [&](int thread, int) {
    for (int helped = 0; helped < threads; helped++) {
      const int owner = (thread + helped) % threads;
      const int64_t first = items * owner / threads, own = items * (owner + 1) / threads - first;
      std::atomic<int64_t> &taken = counters[static_cast<size_t>(owner)].taken;
      for (int64_t item; (item = taken.fetch_add(1, std::memory_order_relaxed)) < own;) body(first + item, thread);
    }
  });
}

void ForeignStep::fetch_ahead() {
  if (last_ < 0) return;
  pool_->run_behind([this](int thread) {
    int64_t left = near_cache_bytes();
    if (!attended_ && !fetch(links_[static_cast<size_t>(last_)].attention, thread, &left)) return;
    const auto next_of = [this](int number) { return links_[static_cast<size_t>(number)].next; };
    for (int n = next_of(last_); n >= 0 && n != last_ && left > 0; n = next_of(n)) {
      if (!fetch(links_[static_cast<size_t>(n)], thread, &left)) return;
    }
  });
}

// Reads the keys and values of the heads that the thread will have, until `left` is used up, where those of the last
// pass are. False if the thread is needed for something else. Mere prefetches: that memory may be gone, and
// prefetching it does nothing then.
bool ForeignStep::fetch(const PlainAttention &a, int thread, int64_t *left) const {
  const int64_t items = a.batch * a.heads, threads = pool_->threads(), bytes = a.count * a.head_dim * 4;
  const float *before = nullptr;
  for (int64_t item = items * thread / threads; item<items *(thread + 1) / threads && * left> 0; item++) {
    const int64_t b = item / a.heads, kv = item % a.heads / (a.heads / a.kv_heads);
    const float *keys = a.keys.head(b, kv);
    if (keys == before) continue;
    for (const float *part : {keys, a.values.head(b, kv)}) {
      for (int64_t at = 0; at < bytes; at += 64) {
        if (at % piece_bytes == 0 && pool_->wanted()) return false;
        __builtin_prefetch(reinterpret_cast<const uint8_t *>(part) + at);
      }
      *left -= bytes;
    }
    before = keys;
  }
  return true;
}

// Reads weights that the thread will need, until `left` is used up. False if the thread is needed for something else.
bool ForeignStep::fetch(Link &link, int thread, int64_t *left) const {
  const int64_t bytes = static_cast<int64_t>(link.matrix->bytes()), threads = pool_->threads();
  const int64_t begin = bytes * thread / threads / 64 * 64, own = bytes * (thread + 1) / threads / 64 * 64 - begin;
  int64_t &fetched = link.fetched[static_cast<size_t>(thread)];
  *left -= std::min(fetched, own);
  for (const uint8_t *part = link.matrix->panel(0) + begin; fetched<own && * left> 0;) {
    if (pool_->wanted()) return false;
    const int64_t end = std::min(fetched + piece_bytes, own);
    *left -= end - fetched;
    // Loads: the processor may ignore mere prefetches.
    for (; fetched < end; fetched += 64) static_cast<void>(*static_cast<const volatile uint8_t *>(part + fetched));
  }
  return true;
}

}  // namespace mnemos
