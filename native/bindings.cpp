// The Python module mnemos._native. Arrays are checked for type, shape and contiguity here, for content in the core.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <optional>

#include "foreign_step.h"
#include "linear/product_kernels.h"
#include "program/program.h"
#include "quantize/encode.h"
#include "quantize/search.h"
#include "sampler.h"
#include "system/bounds.h"
#include "system/error.h"
#include "system/mapping.h"
#include "system/trial.h"
#include "text/bind.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace mnemos {
namespace {

template <typename T, typename... Shape>
using Array = nb::ndarray<const T, Shape..., nb::c_contig, nb::device::cpu>;
using Floats = Array<float, nb::ndim<1>>;
using FloatRows = Array<float, nb::ndim<2>>;
using Doubles = Array<double, nb::ndim<1>>;
using Ints = Array<int32_t, nb::ndim<1>>;
using Bytes = Array<uint8_t, nb::ndim<1>>;

const char *error_class(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::config: return "ConfigError";
    case ErrorKind::request: return "RequestError";
    case ErrorKind::unsupported: return "UnsupportedError";
    case ErrorKind::capacity: return "CapacityError";
    case ErrorKind::format: return "FormatError";
  }
  return "MnemosError";
}

void translate(const std::exception_ptr &pointer, void *) {
  try {
    std::rethrow_exception(pointer);
  } catch (const Error &error) {
    nb::object type = nb::module_::import_("mnemos.errors").attr(error_class(error.kind));
    PyErr_SetString(type.ptr(), error.what());
  }
}

// The kernels of the level in use; a level without its own uses those of the next lower one.
const ProductKernels &linear_kernels(Isa isa) {
  for (int level = static_cast<int>(isa); level >= 0; level--) {
    if (const ProductKernels *kernels = find_kernels(isa_name(static_cast<Isa>(level)))) return *kernels;
  }
  throw unsupported_error("no kernels for matrix products run on this machine");
}

OperatorClass class_of(WeightType type, bool as_float32) {
  return as_float32 || !layout_of(type).quantized() ? OperatorClass::floats : OperatorClass::quantized;
}

OperatorClass find_class(const std::string &name) {
  for (int c = 0; c < operator_classes; c++) {
    if (name == class_name(static_cast<OperatorClass>(c))) return static_cast<OperatorClass>(c);
  }
  throw config_error("operators '" + name + "' are unknown; there are quantized, floats and attention");
}

const char *form_name(Form form) {
  switch (form) {
    case Form::f32: return "float32";
    case Form::bf16:
    case Form::bf16_sums: return "bfloat16";
    default: return "int8";
  }
}

double measure_multiply_rate(Pool &pool, const std::string &isa, const std::string &form, int repeats) {
  const ProductKernels *kernels = find_kernels(isa.c_str());
  if (kernels == nullptr)
    throw unsupported_error("there are no " + isa + " kernels for matrix products on this machine");
  for (Form known : {Form::f32, Form::bf16, Form::int8}) {
    if (form != form_name(known)) continue;
    if (known == Form::bf16 && kernels->bf16_form != known) break;
    return multiply_rate(pool, *kernels, known, repeats);
  }
  throw unsupported_error(isa + " kernels multiply no inputs in " + form);
}

double measure_trial(const std::string &operators, const std::string &isa) {
  const OperatorClass which = find_class(operators);
  const Isa level = find_level(isa, "the instruction set");
  return which == OperatorClass::attention ? time_attention(vector_kernels(level), keeps_bfloats(level))
                                           : time_products(linear_kernels(level), which == OperatorClass::quantized);
}

using Order = Array<int64_t, nb::ndim<1>>;

// A matrix with fewer zero blocks than one in so many is multiplied faster with all of them: whole ones, by two panels.
constexpr int64_t least_skipped = 8;

// A matrix that has no bytes until `pack_matrices` has run; with `order` it has these of the rows, in this order. With
// `skip_zeros`, blocks of 16 rows and 32 columns that are zero are left out, if that pays.
std::shared_ptr<Matrix> allocate_matrix(Bytes data, int type, int64_t rows, int64_t columns, bool as_float32,
                                        std::optional<Order> order, bool skip_zeros) {
  if (!is_weight_type(type))
    throw unsupported_error("a weight of storage type " + std::to_string(type) + " cannot be multiplied");
  const WeightType weight = static_cast<WeightType>(type);
  if (rows < 1 || columns < 1 || columns % block_columns(weight) != 0) {
    throw config_error("a weight of " + std::to_string(rows) + " x " + std::to_string(columns) +
                       " values is not a whole number of blocks of " + std::to_string(block_columns(weight)));
  }
  int64_t bytes = 0;
  if (__builtin_mul_overflow(row_bytes(weight, columns), rows, &bytes) || bytes != static_cast<int64_t>(data.size())) {
    throw config_error("a weight of " + std::to_string(rows) + " x " + std::to_string(columns) + " values has " +
                       std::to_string(data.size()) + " bytes; its type needs " + std::to_string(bytes));
  }
  if (order) {
    const int64_t *begin = order->data(), *end = begin + order->size();
    const auto wrong = std::find_if(begin, end, [&](int64_t row) { return row < 0 || row >= rows; });
    if (begin == end) throw config_error("a weight's order names no rows");
    if (wrong != end)
      throw config_error("a weight's order names row " + std::to_string(*wrong) + " of " + std::to_string(rows));
    rows = end - begin;
  }
  const ProductKernels &kernels = linear_kernels(current_isa(class_of(weight, as_float32)));
  if (skip_zeros && !as_float32 && !order && can_skip_blocks(weight, columns)) {
    KeptBlocks kept = find_kept_blocks(weight, rows, columns, data.data());
    const int64_t all = (rows + panel_rows - 1) / panel_rows * (columns / 32);
    if ((all - static_cast<int64_t>(kept.places.size())) * least_skipped >= all)
      return std::make_shared<Matrix>(weight, rows, columns, false, kernels, std::move(kept));
  }
  return std::make_shared<Matrix>(weight, rows, columns, as_float32, kernels);
}

// (matrix, data, order: as for `allocate_matrix`; whether to release the pages of the file with the data) each.
using Unpacked = std::vector<std::tuple<std::shared_ptr<Matrix>, Bytes, std::optional<Order>, bool>>;

// One call for all, so that the interpreter is free in the meantime, and one region of the pool: its threads may share
// their cores with the interpreter, and would wait for each other at each matrix's end.
void pack_matrices(const Unpacked &matrices, Pool &pool) {
  nb::gil_scoped_release release_gil;
  constexpr int64_t most = 8;  // panels per piece of work
  std::vector<Matrix *> unplaced;
  std::vector<std::pair<size_t, int64_t>> pieces;  // matrix, its first panel
  std::vector<std::atomic<int64_t>> left(matrices.size());
  size_t bytes = 0;
  for (size_t i = 0; i < matrices.size(); i++) {
    Matrix *matrix = std::get<0>(matrices[i]).get();
    unplaced.push_back(matrix);
    bytes += matrix->bytes();
    left[i] = matrix->panels();
    for (int64_t panel = 0; panel < matrix->panels(); panel += most) pieces.emplace_back(i, panel);
  }
  try {
    place(unplaced);
  } catch (const std::bad_alloc &) {
    throw capacity_error("the system has no memory left for weights of " + std::to_string(bytes) + " bytes");
  }
  pool.for_each(static_cast<int64_t>(pieces.size()), 1, [&](int64_t piece, int64_t, int) {
    const auto [index, begin] = pieces[static_cast<size_t>(piece)];
    const auto &[matrix, data, order, release] = matrices[index];
    const int64_t end = std::min(begin + most, matrix->panels());
    pack_panels(*matrix, data.data(), begin, end, order ? order->data() : nullptr);
    const bool last = left[index].fetch_sub(end - begin) == end - begin;
    if (last && release) release_file_pages(data.data(), data.size());
  });
}

// The values of `count` rows by the int64 numbers at `ids`, into (count, columns) floats at `y`.
void gather_rows(const Matrix &matrix, uintptr_t ids, int64_t count, uintptr_t y) {
  nb::gil_scoped_release release_gil;
  const auto *rows = reinterpret_cast<const int64_t *>(ids);
  auto *out = reinterpret_cast<float *>(y);
  for (int64_t i = 0; i < count; i++, out += matrix.columns) {
    if (rows[i] < 0 || rows[i] >= matrix.rows) {
      throw request_error("index " + std::to_string(rows[i]) + " is outside of a table of " +
                          std::to_string(matrix.rows) + " rows; expected 0 to " + std::to_string(matrix.rows - 1));
    }
    dequantize_row(matrix, rows[i], out);
  }
}

VectorPointer copy_vector(const std::optional<Floats> &array) {
  if (!array) return nullptr;
  return std::make_shared<const std::vector<float>>(array->data(), array->data() + array->size());
}

ActivationKind activation_kind(const std::string &name) {
  if (name == "silu") return ActivationKind::silu;
  if (name == "gelu") return ActivationKind::gelu;
  if (name == "gelu_tanh") return ActivationKind::gelu_tanh;
  if (name == "relu") return ActivationKind::relu;
  if (name == "sigmoid") return ActivationKind::sigmoid;
  if (name == "tanh") return ActivationKind::tanh;
  throw config_error("activation '" + name + "' is unknown; it must be silu, gelu, gelu_tanh, relu, sigmoid or tanh");
}

nb::object as_array(const OutputView &output) {
  auto *owner = new std::shared_ptr<Workspace>(output.owner);
  nb::capsule capsule(owner, [](void *p) noexcept { delete static_cast<std::shared_ptr<Workspace> *>(p); });
  const size_t shape[2] = {static_cast<size_t>(output.rows), static_cast<size_t>(output.width)};
  void *data = const_cast<void *>(output.data);
  if (output.type == ValueType::int32) {
    return nb::ndarray<nb::numpy, int32_t, nb::ndim<2>>(data, 2, shape, capsule).cast();
  }
  return nb::ndarray<nb::numpy, float, nb::ndim<2>>(data, 2, shape, capsule).cast();
}

InputView input_view(nb::handle object) {
  FloatRows floats;
  if (nb::try_cast(object, floats, false)) {
    return {floats.data(), static_cast<int64_t>(floats.shape(0)), static_cast<int64_t>(floats.shape(1)),
            ValueType::float32};
  }
  Array<int32_t, nb::ndim<2>> ints;
  if (nb::try_cast(object, ints, false)) {
    return {ints.data(), static_cast<int64_t>(ints.shape(0)), static_cast<int64_t>(ints.shape(1)), ValueType::int32};
  }
  throw config_error("a program's inputs must be float32 or int32 arrays of two axes, contiguous in memory");
}

using RecallFields = std::tuple<int64_t, int64_t, int64_t, int64_t, std::vector<bool>, std::vector<int64_t>,
                                std::vector<std::vector<int64_t>>, bool>;

std::unique_ptr<const Recall> make_recall(const RecallFields &fields) {
  const auto &[window, recalled, sinks, farthest, heads, components, naming, measured] = fields;
  return std::unique_ptr<const Recall>(
      new Recall{{window, recalled, sinks}, farthest, {heads.begin(), heads.end()}, components, naming, measured});
}

nb::list run_program(Program &program, Ints token_ids, Ints positions, Ints sequence_starts, Ints pages,
                     Ints page_positions, Ints page_starts, Ints logit_rows, nb::list inputs, bool argmax,
                     std::optional<Ints> states, int threads, std::optional<Ints> adapters,
                     std::optional<Ints> sights) {
  BatchView batch;
  batch.argmax = argmax;
  batch.threads = threads;
  batch.tokens = static_cast<int64_t>(positions.size());
  batch.chosen = static_cast<int64_t>(logit_rows.size());
  batch.sequences = static_cast<int64_t>(sequence_starts.size()) - 1;
  if (token_ids.size() != positions.size() || batch.sequences < 0 || page_starts.size() == 0) {
    throw request_error(
        "a batch needs as many token_ids as positions, and its sequence_starts and page_starts begin with 0; it has " +
        std::to_string(token_ids.size()) + ", " + std::to_string(positions.size()) + ", " +
        std::to_string(sequence_starts.size()) + " and " + std::to_string(page_starts.size()));
  }
  if (page_positions.size() != pages.size()) {
    throw request_error("a batch needs as many page_positions as pages; it has " +
                        std::to_string(page_positions.size()) + " and " + std::to_string(pages.size()));
  }
  batch.tables = static_cast<int64_t>(page_starts.size()) - 1;
  batch.table_pages = static_cast<int64_t>(pages.size());
  batch.token_ids = token_ids.data();
  batch.positions = positions.data();
  batch.sequence_starts = sequence_starts.data();
  batch.pages = pages.data();
  batch.page_positions = page_positions.data();
  batch.page_starts = page_starts.data();
  batch.logit_rows = logit_rows.data();
  if (states) batch.states = states->data(), batch.state_slots = static_cast<int64_t>(states->size());
  if (adapters) batch.adapters = adapters->data(), batch.adapter_count = static_cast<int64_t>(adapters->size());
  if (sights) batch.sights = sights->data(), batch.sight_values = static_cast<int64_t>(sights->size());
  std::vector<InputView> views;
  for (nb::handle input : inputs) views.push_back(input_view(input));
  std::vector<OutputView> outputs;
  {
    nb::gil_scoped_release release_gil;
    outputs = program.run(batch, views);
  }
  nb::list result;
  for (const OutputView &output : outputs) result.append(as_array(output));
  return result;
}

std::shared_ptr<LowRank> make_low_rank_factors(
    int64_t columns, int64_t rows, int32_t type,
    const std::vector<std::optional<std::tuple<Bytes, Bytes, int64_t, float>>> &pairs) {
  const auto kind = static_cast<WeightType>(type);
  const ProductKernels &kernels = linear_kernels(current_isa(class_of(kind, false)));
  auto factors = std::make_shared<LowRank>(columns, rows, kind, kernels);
  for (const auto &pair : pairs) {
    LowRank::Pair own;
    if (pair) {
      const auto &[a, b, rank, scale] = *pair;
      if (static_cast<int64_t>(a.size()) != rank * row_bytes(kind, columns) ||
          static_cast<int64_t>(b.size()) != rows * row_bytes(kind, rank))
        throw config_error("an adapter's factors must be (rank, " + std::to_string(columns) + ") and (" +
                           std::to_string(rows) + ", rank)");
      own.rank = rank, own.scale = scale;
      own.a.assign(a.data(), a.data() + a.size());
      own.b.assign(b.data(), b.data() + b.size());
    }
    factors->pairs.push_back(std::move(own));
  }
  return factors;
}

PoolKind pool_kind(const std::string &name) {
  if (name == "sequence") return PoolKind::sequence;
  if (name == "sequence-rolling") return PoolKind::sequence_rolling;
  if (name == "rolling") return PoolKind::rolling;
  if (name == "hybrid") return PoolKind::hybrid;
  throw config_error("pooling is '" + name + "'; it must be sequence, sequence-rolling, rolling or hybrid");
}

RowKind row_kind(const std::string &name) {
  if (name == "float32") return RowKind::float32;
  if (name == "float16") return RowKind::float16;
  if (name == "bfloat16") return RowKind::bfloat16;
  if (name == "int8") return RowKind::int8;
  if (name == "int4") return RowKind::int4;
  throw config_error("a bank's vectors are of type '" + name +
                     "'; it must be float32, float16, bfloat16, int8 or int4");
}

RowNorm row_norm(const std::string &name) {
  if (name.empty()) return RowNorm::none;
  if (name == "rms") return RowNorm::rms;
  if (name == "layernorm") return RowNorm::layer;
  throw config_error("a bank's norm is '" + name + "'; it must be rms, layernorm or nothing");
}

std::shared_ptr<Bank> make_bank(Bytes stored, const std::string &kind, Floats scales, FloatRows projections,
                                const std::string &norm, float epsilon, float factor, int64_t rows, int64_t span,
                                int64_t kv_heads, int64_t head_dim, int64_t page_size, const std::string &dtype) {
  BankSource source;
  // The array lives as long as something points to it; it may be let go of by any thread.
  source.stored = std::shared_ptr<const uint8_t>(stored.data(), [owner = new Bytes(stored)](const uint8_t *) {
    nb::gil_scoped_acquire acquire;
    delete owner;
  });
  source.stored_bytes = static_cast<int64_t>(stored.size());
  source.kind = row_kind(kind);
  source.scales.assign(scales.data(), scales.data() + scales.size());
  source.width = static_cast<int64_t>(projections.shape(0));
  source.projections.assign(projections.data(), projections.data() + projections.size());
  source.norm = row_norm(norm);
  source.epsilon = epsilon;
  source.factor = factor;
  const int64_t pages = (rows + page_size - 1) / std::max<int64_t>(page_size, 1);
  auto cache = std::make_shared<Cache>(1, kv_heads, head_dim, page_size, cache_type(dtype), pages);
  return std::make_shared<Bank>(std::move(source), std::move(cache), rows, span);
}

Norm make_norm_params(Norm::Kind kind, const Floats &weight, const std::optional<Floats> &bias, float epsilon) {
  Norm norm;
  norm.kind = kind;
  norm.weight = copy_vector(weight);
  norm.bias = copy_vector(bias);
  norm.epsilon = epsilon;
  return norm;
}

template <typename T>
nb::object owned_array(std::vector<T> values) {
  auto *owner = new std::vector<T>(std::move(values));
  nb::capsule capsule(owner, [](void *p) noexcept { delete static_cast<std::vector<T> *>(p); });
  return nb::ndarray<nb::numpy, T, nb::ndim<1>>(owner->data(), {owner->size()}, capsule).cast();
}

const float *checked_row(const FloatRows &logits, size_t row) {
  if (logits.shape(1) == 0) throw request_error("logits have no columns");
  return logits.data() + row * logits.shape(1);
}

// Calls each(sampler, row pointer, columns, row index) for every row, without the GIL.
template <typename Each>
void for_rows(const FloatRows &logits, const Each &each) {
  nb::gil_scoped_release release_gil;
  Sampler sampler(vector_kernels(current_isa(OperatorClass::attention)));
  for (size_t r = 0; r < logits.shape(0); r++)
    each(sampler, checked_row(logits, r), static_cast<int64_t>(logits.shape(1)), r);
}

nb::object sample_rows(FloatRows logits, Floats temperature, Ints top_k, Doubles top_p, Doubles min_p, Doubles random) {
  const size_t rows = logits.shape(0);
  if (temperature.size() != rows || top_k.size() != rows || top_p.size() != rows || min_p.size() != rows ||
      random.size() != rows) {
    throw config_error("sampling needs one temperature, top_k, top_p, min_p and random number for each of the " +
                       std::to_string(rows) + " rows");
  }
  for (size_t r = 0; r < rows; r++) {
    if (!(temperature.data()[r] > 0))
      throw config_error("temperature is " + std::to_string(temperature.data()[r]) + "; it must be above 0");
  }
  std::vector<int32_t> tokens(rows);
  for_rows(logits, [&](Sampler &sampler, const float *row, int64_t n, size_t r) {
    const Cutoffs cutoffs{temperature.data()[r], top_k.data()[r], top_p.data()[r], min_p.data()[r]};
    tokens[r] = sampler.sample(row, n, cutoffs, random.data()[r]);
  });
  return owned_array(std::move(tokens));
}

nb::object greedy_rows(FloatRows logits) {
  std::vector<int32_t> tokens(logits.shape(0));
  for_rows(logits,
           [&](Sampler &sampler, const float *row, int64_t n, size_t r) { tokens[r] = sampler.greedy(row, n); });
  return owned_array(std::move(tokens));
}

nb::object log_sum_exp_rows(FloatRows logits) {
  std::vector<double> sums(logits.shape(0));
  for_rows(logits,
           [&](Sampler &sampler, const float *row, int64_t n, size_t r) { sums[r] = sampler.log_sum_exp(row, n); });
  return owned_array(std::move(sums));
}

nb::object top_tokens(Floats logits, int64_t count) {
  Sampler sampler(vector_kernels(current_isa(OperatorClass::attention)));
  return owned_array(sampler.top(logits.data(), static_cast<int64_t>(logits.size()), count));
}

// Addresses come from tensors that the caller has checked for type, shape and contiguity.
float *at_address(uintptr_t address) { return reinterpret_cast<float *>(address); }
using HeadsAt = std::tuple<uintptr_t, int64_t, int64_t>;
PlainAttention::Heads heads_at(const HeadsAt &heads) {
  return {at_address(std::get<0>(heads)), std::get<1>(heads), std::get<2>(heads)};
}

void bind_relay(nb::module_ &m) {
  nb::class_<ForeignStep>(m, "ForeignStep")
      .def(nb::init<std::shared_ptr<Pool>>(), "pool"_a)
      .def(
          "add",
          [](ForeignStep &step, std::shared_ptr<Matrix> matrix, std::optional<Floats> bias, bool precise) {
            return step.add(matrix, copy_vector(bias), precise);
          },
          "matrix"_a, "bias"_a.none(), "precise"_a = false)
      .def(
          "replace",
          [](ForeignStep &step, int number, std::shared_ptr<Matrix> matrix, std::optional<Floats> bias) {
            step.replace(number, matrix, copy_vector(bias));
          },
          "number"_a, "matrix"_a, "bias"_a.none())
      .def(
          "multiply",
          [](ForeignStep &step, int number, uintptr_t x, int64_t rows, uintptr_t y) {
            nb::gil_scoped_release release_gil;
            step.multiply(number, at_address(x), rows, at_address(y));
          },
          "number"_a, "x"_a, "rows"_a, "y"_a)
      .def(
          "attend",
          [](ForeignStep &step, const std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t> &sizes, const HeadsAt &q,
             const HeadsAt &k, const HeadsAt &v, float scale, uintptr_t y) {
            PlainAttention a{};
            std::tie(a.batch, a.heads, a.kv_heads, a.count, a.head_dim) = sizes;
            a.queries = heads_at(q), a.keys = heads_at(k), a.values = heads_at(v);
            a.scale = scale;
            a.y = at_address(y);
            nb::gil_scoped_release release_gil;
            step.attend(a);
          },
          "sizes"_a, "q"_a, "k"_a, "v"_a, "scale"_a, "y"_a);
  m.def(
      "copy_heads",
      [](int64_t batch, int64_t heads, int64_t width, const HeadsAt &from, const HeadsAt &to) {
        const PlainAttention::Heads source = heads_at(from);
        float *target = at_address(std::get<0>(to));
        for (int64_t b = 0; b < batch; b++) {
          for (int64_t h = 0; h < heads; h++) {
            float *y = target + b * std::get<1>(to) + h * std::get<2>(to);
            std::memcpy(y, source.head(b, h), static_cast<size_t>(width) * sizeof(float));
          }
        }
      },
      "batch"_a, "heads"_a, "width"_a, "source"_a, "target"_a);
  m.def(
      "rms_norm",
      [](uintptr_t x, uintptr_t weight, float epsilon, uintptr_t y, int64_t rows, int64_t width) {
        vector_kernels(brief_isa(OperatorClass::attention))
            .rms_norm(at_address(x), at_address(weight), epsilon, at_address(y), rows, width);
      },
      "x"_a, "weight"_a, "epsilon"_a, "y"_a, "rows"_a, "width"_a);
}

template <typename T, size_t axes>
using Result = nb::ndarray<T, nb::ndim<axes>, nb::c_contig, nb::device::cpu>;

// Codes, units and integers of a block format, see quantize/search.h; `format` has the fields of SearchFormat.
void search_matrix(FloatRows values, FloatRows products, FloatRows factor, const std::array<int32_t, 9> &format,
                   int sweeps, Result<uint8_t, 2> codes, Result<float, 3> units, Result<int8_t, 3> integers,
                   Pool &pool) {
  const SearchFormat wanted{format[0], format[1], format[2], format[3], format[4],
                            format[5], format[6], format[7], format[8]};
  const size_t rows = values.shape(0), columns = values.shape(1);
  if (wanted.group < 1 || wanted.group > 32 || wanted.super % wanted.group ||
      columns % static_cast<size_t>(wanted.super)) {
    throw config_error("rows of " + std::to_string(columns) + " values do not divide into groups of " +
                       std::to_string(wanted.super));
  }
  const size_t supers = columns / static_cast<size_t>(wanted.super),
               groups = columns / static_cast<size_t>(wanted.group);
  for (const FloatRows &matrix : {products, factor}) {
    if (matrix.shape(0) != columns || matrix.shape(1) != columns)
      throw config_error("the costs have another size than a row");
  }
  if (codes.shape(0) != rows || codes.shape(1) != columns || units.shape(0) != rows || units.shape(1) != supers ||
      units.shape(2) != 2 || integers.shape(0) != rows || integers.shape(1) != groups || integers.shape(2) != 2) {
    throw config_error("the results have another size than the rows need");
  }
  nb::gil_scoped_release release_gil;
  search_rows(wanted, {products.data(), factor.data(), static_cast<int64_t>(columns)}, values.data(),
              static_cast<int64_t>(rows), sweeps, {codes.data(), units.data(), integers.data()}, pool);
}

// The first row that the type cannot hold, or -1.
int64_t encode_matrix(FloatRows values, int32_t type, std::optional<Floats> importance,
                      nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu> out, Pool &pool) {
  if (!is_weight_type(type)) throw config_error("type " + std::to_string(type) + " has no encoder");
  const WeightType weight_type = static_cast<WeightType>(type);
  const int64_t rows = static_cast<int64_t>(values.shape(0)), columns = static_cast<int64_t>(values.shape(1));
  const int64_t block = block_columns(weight_type);
  if (columns == 0 || columns % block != 0) {
    throw config_error("rows have " + std::to_string(columns) + " values; the type needs a multiple of " +
                       std::to_string(block));
  }
  if (importance && static_cast<int64_t>(importance->size()) != columns) {
    throw config_error("importance has " + std::to_string(importance->size()) + " values; it must have one a column, " +
                       std::to_string(columns));
  }
  if (static_cast<int64_t>(out.shape(0)) != rows ||
      static_cast<int64_t>(out.shape(1)) != row_bytes(weight_type, columns)) {
    throw config_error("the encoded rows have another size than `out`");
  }
  nb::gil_scoped_release release_gil;
  return encode_rows(weight_type, values.data(), rows, columns, importance ? importance->data() : nullptr, out.data(),
                     pool);
}

void bind_program(nb::module_ &m) {
  nb::class_<LowRank>(m, "LowRank").def(nb::new_(&make_low_rank_factors), "columns"_a, "rows"_a, "type"_a, "pairs"_a);
  using ProgramClass = nb::class_<Program>;
  ProgramClass(m, "Program")
      .def(nb::init<std::shared_ptr<Pool>, std::vector<std::shared_ptr<Cache>>>(), "pool"_a, "caches"_a)
      .def(
          "input",
          [](Program &p, int64_t width, bool integers) {
            return p.input(width, integers ? ValueType::int32 : ValueType::float32);
          },
          "width"_a, "integers"_a)
      .def(
          "embed",
          [](Program &p, std::shared_ptr<Matrix> matrix, bool by_position) {
            return p.embed(matrix, by_position ? Index::positions : Index::token_ids);
          },
          "matrix"_a, "by_position"_a)
      .def("rows", &Program::choose_rows, "x"_a)
      .def(
          "linear",
          [](Program &p, int x, std::shared_ptr<Matrix> matrix, std::optional<Floats> bias) {
            return p.linear(x, matrix, copy_vector(bias));
          },
          "x"_a, "matrix"_a, "bias"_a.none())
      .def(
          "rms_norm",
          [](Program &p, int x, Floats weight, float epsilon) {
            return p.norm(x, make_norm_params(Norm::rms, weight, std::nullopt, epsilon));
          },
          "x"_a, "weight"_a, "epsilon"_a)
      .def(
          "layer_norm",
          [](Program &p, int x, Floats weight, std::optional<Floats> bias, float epsilon) {
            return p.norm(x, make_norm_params(Norm::layer, weight, bias, epsilon));
          },
          "x"_a, "weight"_a, "bias"_a.none(), "epsilon"_a)
      .def(
          "rope",
          [](Program &p, int x, Floats frequencies, int64_t head_dim, float magnitude) {
            return p.rope(x, {frequencies.data(), frequencies.data() + frequencies.size()}, head_dim, magnitude);
          },
          "x"_a, "frequencies"_a, "head_dim"_a, "magnitude"_a)
      .def(
          "attention",
          [](Program &p, int q, int k, int v, int64_t group, int64_t layer, int64_t heads, int64_t kv_heads,
             int64_t head_dim, float scale, int64_t window, float softcap) {
            Attention attention{};
            attention.group = group;
            attention.layer = layer;
            attention.heads = heads;
            attention.kv_heads = kv_heads;
            attention.head_dim = head_dim;
            attention.scale = scale;
            attention.window = window;
            attention.softcap = softcap;
            return p.attention(q, k, v, attention);
          },
          "q"_a, "k"_a, "v"_a, "group"_a, "layer"_a, "heads"_a, "kv_heads"_a, "head_dim"_a, "scale"_a, "window"_a,
          "softcap"_a)
      .def(
          "activation",
          [](Program &p, int x, const std::string &kind) {
            return p.elementwise({ElementwiseKind::activation, 0, activation_kind(kind)}, x, -1);
          },
          "x"_a, "kind"_a)
      .def(
          "gated_activation",
          [](Program &p, int gate, int up, const std::string &kind) {
            return p.elementwise({ElementwiseKind::gated_activation, 0, activation_kind(kind)}, gate, up);
          },
          "gate"_a, "up"_a, "kind"_a)
      .def(
          "add",
          [](Program &p, int x, int y) {
            return p.elementwise({ElementwiseKind::add, 0, ActivationKind::silu}, x, y);
          },
          "x"_a, "y"_a)
      .def(
          "scale",
          [](Program &p, int x, float factor) {
            return p.elementwise({ElementwiseKind::scale, factor, ActivationKind::silu}, x, -1);
          },
          "x"_a, "factor"_a)
      .def(
          "softcap",
          [](Program &p, int x, float cap) {
            return p.elementwise({ElementwiseKind::softcap, cap, ActivationKind::silu}, x, -1);
          },
          "x"_a, "cap"_a)
      .def(
          "route",
          [](Program &p, int x, std::shared_ptr<Matrix> router, int64_t top_k, bool normalise) {
            return p.route(x, router, top_k, normalise);
          },
          "x"_a, "router"_a, "top_k"_a, "normalise"_a)
      .def(
          "experts",
          [](Program &p, int x, int ids, int weights, const std::vector<std::shared_ptr<Matrix>> &gate,
             const std::vector<std::shared_ptr<Matrix>> &up, const std::vector<std::shared_ptr<Matrix>> &down,
             const std::string &kind) {
            Experts experts{};
            experts.gate.assign(gate.begin(), gate.end());
            experts.up.assign(up.begin(), up.end());
            experts.down.assign(down.begin(), down.end());
            experts.activation = activation_kind(kind);
            return p.experts(x, ids, weights, std::move(experts));
          },
          "x"_a, "ids"_a, "weights"_a, "gate"_a, "up"_a, "down"_a, "kind"_a)
      .def("choose", &Program::choose, "logits"_a, "top_k"_a)
      .def(
          "pool",
          [](Program &p, int x, std::shared_ptr<Windows> windows, int64_t layer, const std::string &kind,
             int64_t window) {
            return p.pool(x, {pool_kind(kind), window, layer, std::move(windows)});
          },
          "x"_a, "windows"_a.none(), "layer"_a, "kind"_a, "window"_a)
      .def(
          "memory_attention",
          [](Program &p, int q, int ids, int weights, std::shared_ptr<Bank> bank, int64_t heads, int64_t kv_heads,
             int64_t head_dim, float scale, int64_t rows, int64_t chapters, int64_t shared, float scaling,
             bool separate) {
            MemoryAttention memory{heads,    kv_heads, head_dim, scale,    rows,
                                   chapters, shared,   scaling,  separate, std::move(bank)};
            return p.memory(q, ids, weights, std::move(memory));
          },
          "q"_a, "ids"_a, "weights"_a, "bank"_a, "heads"_a, "kv_heads"_a, "head_dim"_a, "scale"_a, "rows"_a,
          "chapters"_a, "shared"_a, "scaling"_a, "separate"_a)
      .def(
          "low_rank",
          [](Program &p, int y, int x, std::shared_ptr<LowRank> factors) {
            return p.low_rank(y, x, std::move(factors));
          },
          "y"_a, "x"_a, "factors"_a)
      .def("width", &Program::width, "value"_a)
      .def("finish", &Program::finish, "outputs"_a)
      .def("run", &run_program, "token_ids"_a, "positions"_a, "sequence_starts"_a, "pages"_a, "page_positions"_a,
           "page_starts"_a, "logit_rows"_a, "inputs"_a, "argmax"_a = false, "states"_a = nb::none(), "threads"_a = 0,
           "adapters"_a = nb::none(), "sights"_a = nb::none())
      .def_prop_ro("finds_argmax", &Program::finds_argmax)
      .def("poison", &Program::poison, "on"_a)
      .def("workspace_bytes", &Program::workspace_bytes, "tokens"_a, "chosen"_a)
      .def_prop_ro("tasks", &Program::tasks)
      .def_prop_ro("barriers", &Program::barriers);
}

}  // namespace

NB_MODULE(_native, m) {
  nb::register_exception_translator(translate);
  nb::set_leak_warnings(false);  // the shared pools outlive the interpreter's bookkeeping

  m.def(
      "isa", [](const std::string &operators) { return std::string(isa_name(current_isa(find_class(operators)))); },
      "operators"_a);
  m.def(
      "likely_isa",
      [](const std::string &operators) { return std::string(isa_name(likely_isa(find_class(operators)))); },
      "operators"_a);
  m.def("available_isas", &available_isas);
  m.def("select_isa", &select_isa, "levels"_a);
  m.def("keeps_bfloats", [] { return keeps_bfloats(current_isa(OperatorClass::attention)); });
  m.def("prefer_isas", &prefer_isas, "levels"_a);
  m.def("trial_seconds", &measure_trial, "operators"_a, "isa"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def("usable_cores", &usable_cores);
  m.def("available_memory", &available_memory);

  nb::class_<Pool>(m, "Pool").def_prop_ro("threads", &Pool::threads).def_prop_ro("contended", &Pool::contended);
  m.def("shared_pool", &shared_pool, "threads"_a);
  m.def("read_bandwidth", &read_bandwidth, "pool"_a, "bytes"_a, "repeats"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def("multiply_rate", &measure_multiply_rate, "pool"_a, "isa"_a, "form"_a, "repeats"_a,
        nb::call_guard<nb::gil_scoped_release>());

  nb::class_<Matrix>(m, "Matrix")
      .def_ro("rows", &Matrix::rows)
      .def_ro("columns", &Matrix::columns)
      .def_prop_ro("bytes", &Matrix::bytes)
      .def_prop_ro("form", [](const Matrix &matrix) { return form_name(matrix.form); });
  m.def("allocate_matrix", &allocate_matrix, "data"_a, "type"_a, "rows"_a, "columns"_a, "as_float32"_a,
        "order"_a.none(), "skip_zeros"_a = false);
  m.def("pack_matrices", &pack_matrices, "matrices"_a, "pool"_a);
  m.def("search_rows", &search_matrix, "values"_a, "products"_a, "factor"_a, "format"_a, "sweeps"_a, "codes"_a,
        "units"_a, "integers"_a, "pool"_a);
  m.def("encode_rows", &encode_matrix, "values"_a, "type"_a, "importance"_a.none(), "out"_a, "pool"_a);
  m.def("gather_rows", &gather_rows, "matrix"_a, "ids"_a, "count"_a, "y"_a);

  nb::class_<Bank>(m, "Bank")
      .def(nb::new_(&make_bank), "stored"_a, "kind"_a, "scales"_a, "projections"_a, "norm"_a, "epsilon"_a, "factor"_a,
           "rows"_a, "span"_a, "kv_heads"_a, "head_dim"_a, "page_size"_a, "dtype"_a)
      .def_prop_ro("bytes", &Bank::bytes);

  nb::class_<Windows>(m, "Windows")
      .def(nb::init<int64_t, int64_t, int64_t>(), "layers"_a, "width"_a, "length"_a)
      .def("reserve", &Windows::reserve, "slots"_a)
      .def("copy", &Windows::copy, "source"_a, "target"_a)
      .def("clear", &Windows::clear, "slot"_a);

  nb::class_<Cache>(m, "Cache")
      .def(
          "__init__",
          [](Cache *cache, int64_t layers, int64_t kv_heads, int64_t head_dim, int64_t page_size,
             const std::string &dtype, int64_t pages, const std::optional<RecallFields> &recall) {
            new (cache) Cache(layers, kv_heads, head_dim, page_size, cache_type(dtype), pages,
                              recall ? make_recall(*recall) : nullptr);
          },
          "layers"_a, "kv_heads"_a, "head_dim"_a, "page_size"_a, "dtype"_a, "pages"_a, "recall"_a = nb::none())
      .def_ro("pages", &Cache::pages)
      .def_prop_ro("page_bytes", &Cache::page_bytes)
      .def("copy", &Cache::copy, "source"_a, "target"_a)
      .def("release", &Cache::release, "page"_a)
      .def(
          "read",
          [](Cache &cache, int64_t page) {
            std::vector<uint8_t> content(static_cast<size_t>(cache.page_bytes()));
            cache.read(page, content.data());
            return owned_array(std::move(content));
          },
          "page"_a)
      .def(
          "write",
          [](Cache &cache, int64_t page, Bytes content) {
            if (static_cast<int64_t>(content.size()) != cache.page_bytes()) {
              throw config_error("a page's content has " + std::to_string(content.size()) +
                                 " bytes; this cache's pages have " + std::to_string(cache.page_bytes()));
            }
            nb::gil_scoped_release release_gil;
            cache.write(page, content.data());
          },
          "page"_a, "content"_a)
      .def_prop_ro("spilled", [](const Cache &cache) { return cache.spill() != nullptr ? cache.spill()->count() : 0; })
      .def("spill_to", &Cache::spill_to, "file"_a)
      .def(
          "begin_recall", [](Cache &cache, const RecallFields &recall) { cache.begin_recall(make_recall(recall)); },
          "recall"_a)
      .def("recalled", [](const Cache &cache) { return owned_array(cache.recalled()); });

  bind_program(m);
  bind_relay(m);
  bind_text(m);

  m.def("uniform", &uniform, "seed"_a, "position"_a, "draw"_a = 0);
  m.def("sample", &sample_rows, "logits"_a, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a, "random"_a);
  m.def("greedy", &greedy_rows, "logits"_a);
  m.def("log_sum_exp", &log_sum_exp_rows, "logits"_a);
  m.def("top_tokens", &top_tokens, "logits"_a, "count"_a);
}

}  // namespace mnemos
