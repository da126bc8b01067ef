// The Python face of Program: how octavo/backends/cpu builds and runs one. Errors of contract are ValueErrors.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "program.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace octavo {
namespace {

template <typename T, size_t kDims>
using Array = nb::ndarray<T, nb::ndim<kDims>, nb::c_contig, nb::device::cpu>;

// What must be a contiguous array of T with kDims dimensions.
template <typename T, size_t kDims = 1>
Array<const T, kDims> to_array(nb::handle object, const char* name) {
  Array<const T, kDims> array;
  if (nb::try_cast(object, array, false)) return array;
  throw std::invalid_argument(std::string(name) + " is not a contiguous array of the type and rank that its contract says");
}

template <typename T, size_t kDims = 1>
Array<const T, kDims> array_of(nb::handle object, const char* name) {
  return to_array<T, kDims>(object.attr(name), name);
}

void require_size(size_t size, int64_t wanted, const char* name) {
  if (static_cast<int64_t>(size) != wanted) {
    throw std::invalid_argument(std::string(name) + " has " + std::to_string(size) + " elements, not " + std::to_string(wanted));
  }
}

template <typename T>
const T* sized(nb::handle object, const char* name, int64_t wanted) {
  const auto array = array_of<T>(object, name);
  require_size(array.size(), wanted, name);
  return array.data();
}

const uint8_t* pointer(uintptr_t address) { return reinterpret_cast<const uint8_t*>(address); }

// ---- weights: numpy views that need not be aligned or contiguous, as addresses and strides ------------------------------

using PlaneTuple = std::tuple<uintptr_t, std::tuple<int64_t, int64_t, int64_t>, Array<const uint16_t, 1>,
                              Array<const uint8_t, 1>, int, int, int>;
using CodesTuple = std::tuple<std::vector<PlaneTuple>, int>;
using ScaleTuple = std::tuple<uintptr_t, std::tuple<int64_t, int64_t>, CodesTuple, bool>;

// NOTE: the view points into the tuple's arrays.
CodesView codes_view(const CodesTuple& codes) {
  CodesView view{};
  view.zero = std::get<1>(codes);
  if (std::get<0>(codes).size() > 3) throw std::invalid_argument("codes have at most three planes");
  for (const auto& [address, strides, byte_of, shift_of, bits, lift, flip] : std::get<0>(codes)) {
    PlaneView& plane = view.planes[view.num_planes++];
    plane.data = pointer(address);
    std::tie(plane.row_stride, plane.block_stride, plane.byte_stride) = strides;
    plane.byte_of = byte_of.data();
    plane.shift_of = shift_of.data();
    plane.block_len = static_cast<int32_t>(byte_of.size());
    require_size(shift_of.size(), plane.block_len, "shift_of");
    plane.bits = bits;
    plane.lift = lift;
    plane.flip = flip;
  }
  return view;
}

ScaleView scale_view(const ScaleTuple& scale) {
  const auto& [address, strides, factors, is_negated] = scale;
  return {pointer(address), std::get<0>(strides), std::get<1>(strides), codes_view(factors), is_negated};
}

int add_grouped(Program& program, std::tuple<int64_t, int64_t> shape, std::tuple<int, int> sizes, const CodesTuple& codes,
                const ScaleTuple& scales, const std::optional<ScaleTuple>& minimums) {
  GroupedView view{};
  std::tie(view.n, view.k) = shape;
  std::tie(view.group, view.bits) = sizes;
  view.codes = codes_view(codes);
  if (view.codes.num_planes == 0) throw std::invalid_argument("a grouped weight has one to three planes");
  view.scales = scale_view(scales);
  if (minimums.has_value()) view.minimums = scale_view(*minimums);
  nb::gil_scoped_release release;
  return program.weights().add(view, program.pool());
}

int add_dense(Program& program, std::tuple<int64_t, int64_t> shape, const std::string& dtype, uintptr_t address,
              int64_t row_stride) {
  DenseView view{};
  std::tie(view.n, view.k) = shape;
  view.kind = dtype == "f32" ? WeightKind::kF32 : dtype == "f16" ? WeightKind::kF16 : WeightKind::kBF16;
  view.data = pointer(address);
  view.row_stride = row_stride;
  nb::gil_scoped_release release;
  return program.weights().add(view, program.pool());
}

// ---- stages ----------------------------------------------------------------------------------------------------------

RowOp::Kind row_kind(const std::string& name) {
  using Kind = RowOp::Kind;
  static constexpr std::pair<const char*, Kind> kKinds[] = {
      {"input", Kind::kInput}, {"embed", Kind::kEmbed},       {"select", Kind::kSelect},     {"copy", Kind::kCopy},
      {"norm", Kind::kRmsNorm}, {"add", Kind::kAdd},          {"silu_mul", Kind::kSiluMul},  {"quantize", Kind::kQuantize},
      {"rope", Kind::kRope},   {"write_kv", Kind::kWriteKv},  {"gelu_mul", Kind::kGeluMul},
  };
  for (const auto& [kind_name, kind] : kKinds) {
    if (name == kind_name) return kind;
  }
  throw std::invalid_argument("unknown row operator " + name);
}

RowOp row_op(nb::dict fields) {
  RowOp op{};
  for (auto [key, value] : fields) {
    const auto name = nb::cast<std::string>(key);
    if (name == "kind") op.kind = row_kind(nb::cast<std::string>(value));
    else if (name == "features") op.features = nb::cast<int64_t>(value);
    else if (name == "a") op.a = nb::cast<int64_t>(value);
    else if (name == "b") op.b = nb::cast<int64_t>(value);
    else if (name == "out") op.out = nb::cast<int64_t>(value);
    else if (name == "weight") op.weight = nb::cast<int>(value);
    else if (name == "eps") op.eps = nb::cast<float>(value);
    else if (name == "scale") op.scale = nb::cast<float>(value);
    else if (name == "quantized") op.quantized = nb::cast<int>(value);
    else if (name == "table") op.table = nb::cast<int>(value);
    else if (name == "num_heads") op.num_heads = nb::cast<int32_t>(value);
    else if (name == "cache") op.cache = nb::cast<int>(value);
    else if (name == "input") op.input = nb::cast<int>(value);
    else throw std::invalid_argument("unknown field of a row operator: " + name);
  }
  return op;
}

void add_rows_stage(Program& program, bool selected, const std::vector<nb::dict>& ops) {
  Stage stage{};
  stage.kind = Stage::Kind::kRows;
  stage.selected = selected;
  for (const nb::dict& fields : ops) stage.ops.push_back(row_op(fields));
  program.add_stage(std::move(stage));
}

void add_linear_stage(Program& program, bool selected, Place x, int quantized,
                      const std::vector<std::tuple<int, Place, int, Place>>& parts) {
  Stage stage{};
  stage.kind = Stage::Kind::kLinear;
  stage.selected = selected;
  stage.x = x;
  stage.quantized = quantized;
  for (const auto& [weight, out, bias, residual] : parts) stage.parts.push_back({weight, out, bias, residual});
  program.add_stage(std::move(stage));
}

void add_attention_stage(Program& program, int cache, Place query, Place out) {
  program.add_attention(cache, query, out);
}

// ---- a step ------------------------------------------------------------------------------------------------------------

BatchView batch_view(nb::handle batch, nb::handle inputs, bool has_cache) {
  BatchView view{};
  const auto token_ids = array_of<int32_t>(batch, "token_ids");
  const auto positions = array_of<int32_t, 2>(batch, "positions");
  const auto logits_rows = array_of<int32_t>(batch, "logits_rows");
  const auto seq_lens = array_of<int32_t>(batch, "seq_lens");
  view.num_tokens = static_cast<int64_t>(token_ids.size());
  view.num_sequences = static_cast<int64_t>(seq_lens.size());
  view.num_selected = static_cast<int64_t>(logits_rows.size());
  require_size(positions.size(), view.num_tokens, "positions");
  view.token_ids = token_ids.data();
  view.positions = positions.data();
  view.seq_lens = seq_lens.data();
  view.logits_rows = logits_rows.data();
  view.query_start_loc = sized<int32_t>(batch, "query_start_loc", view.num_sequences + 1);
  if (has_cache) {
    const nb::tuple tables = nb::cast<nb::tuple>(batch.attr("block_tables"));
    const nb::tuple slots = nb::cast<nb::tuple>(batch.attr("slot_mapping"));
    if (tables.size() != 1 || slots.size() != 1) throw std::invalid_argument("this program has one cache group");
    Array<const int32_t, 2> table;
    Array<const int32_t, 1> slot;
    if (!nb::try_cast(tables[0], table, false) || !nb::try_cast(slots[0], slot, false)) {
      throw std::invalid_argument("block_tables and slot_mapping hold contiguous int32 arrays of two and of one dimension");
    }
    require_size(table.shape(0), view.num_sequences, "block_tables");
    require_size(slot.size(), view.num_tokens, "slot_mapping");
    view.table_width = static_cast<int64_t>(table.shape(1));
    view.block_table = table.data();
    view.slots = slot.data();
  }
  for (nb::handle item : nb::cast<nb::list>(inputs)) {
    const auto [name, features] = nb::cast<std::tuple<std::string, int64_t>>(item);
    Array<const float, 2> values;
    const nb::object given = batch.attr("inputs").attr("get")(name);
    if (!nb::try_cast(given, values, false) || static_cast<int64_t>(values.shape(0)) != view.num_tokens ||
        static_cast<int64_t>(values.shape(1)) != features) {
      throw std::invalid_argument("input " + name + " is not a contiguous float32 array of tokens and " +
                                  std::to_string(features) + " features");
    }
    view.inputs.push_back(values.data());
  }
  return view;
}

SamplingView sampling_view(nb::handle rows, int64_t count) {
  const nb::object filters = rows.attr("filters"), noise = rows.attr("noise");
  const nb::object penalties = rows.attr("penalties"), bias = rows.attr("bias");
  SamplingView view{};
  view.temperature = sized<float>(filters, "temperature", count);
  view.top_k = sized<int32_t>(filters, "top_k", count);
  view.top_p = sized<float>(filters, "top_p", count);
  view.min_p = sized<float>(filters, "min_p", count);
  view.seed = sized<uint64_t>(noise, "seed", count);
  view.index = sized<int32_t>(noise, "index", count);
  view.position = sized<int32_t>(noise, "position", count);
  view.repetition = sized<float>(penalties, "repetition", count);
  view.presence = sized<float>(penalties, "presence", count);
  view.frequency = sized<float>(penalties, "frequency", count);
  view.seen_start = sized<int32_t>(penalties, "start", count + 1);
  const auto seen_ids = array_of<int32_t>(penalties, "token_ids");
  view.num_seen = static_cast<int64_t>(seen_ids.size());
  view.seen_ids = seen_ids.data();
  view.seen_counts = sized<int32_t>(penalties, "counts", view.num_seen);
  view.bias_start = sized<int32_t>(bias, "start", count + 1);
  const auto bias_ids = array_of<int32_t>(bias, "token_ids");
  view.num_bias = static_cast<int64_t>(bias_ids.size());
  view.bias_ids = bias_ids.data();
  view.bias_values = sized<float>(bias, "values", view.num_bias);
  view.num_logprobs = sized<int32_t>(rows, "num_logprobs", count);
  return view;
}

// tokens, logprobs [S]; top_ids, top_logprobs [S, K]
using SampledArrays = std::tuple<Array<int32_t, 1>, Array<float, 1>, Array<int32_t, 2>, Array<float, 2>>;

void run(Program& program, nb::handle batch, nb::handle inputs, bool has_cache, nb::handle rows,
         std::optional<SampledArrays> sampled) {
  const BatchView view = batch_view(batch, inputs, has_cache);
  if (rows.is_none() || !sampled.has_value()) {
    nb::gil_scoped_release release;
    return program.run(view, nullptr);
  }
  SamplingView sampling = sampling_view(rows, view.num_selected);
  auto& [tokens, logprobs, top_ids, top_logprobs] = *sampled;
  require_size(tokens.size(), view.num_selected, "tokens");
  require_size(logprobs.size(), view.num_selected, "logprobs");
  require_size(top_ids.shape(0), view.num_selected, "top_ids");
  require_size(top_logprobs.size(), static_cast<int64_t>(top_ids.size()), "top_logprobs");
  sampling.tokens = tokens.data();
  sampling.logprobs = logprobs.data();
  sampling.top_ids = top_ids.data();
  sampling.top_logprobs = top_logprobs.data();
  sampling.top_width = static_cast<int64_t>(top_ids.shape(1));
  nb::gil_scoped_release release;
  program.run(view, &sampling);
}

// ---- blocks of the KV cache --------------------------------------------------------------------------------------------

void copy_blocks(Program& program, nb::handle pairs_object) {
  const auto pairs = to_array<int32_t, 2>(pairs_object, "pairs");
  const auto count = static_cast<int64_t>(pairs.shape(0));
  require_size(pairs.size(), 2 * count, "pairs");
  nb::gil_scoped_release release;
  program.copy_blocks(pairs.data(), count);
}

void read_blocks(Program& program, nb::handle ids_object, Array<uint8_t, 2> out) {
  const auto ids = to_array<int32_t>(ids_object, "ids");
  const auto count = static_cast<int64_t>(ids.size());
  require_size(out.size(), count * program.block_bytes(), "out");
  nb::gil_scoped_release release;
  program.read_blocks(ids.data(), count, out.data());
}

void write_blocks(Program& program, nb::handle ids_object, nb::handle data_object) {
  const auto ids = to_array<int32_t>(ids_object, "ids");
  const auto data = to_array<uint8_t, 2>(data_object, "data");
  const auto count = static_cast<int64_t>(ids.size());
  require_size(data.size(), count * program.block_bytes(), "data");
  nb::gil_scoped_release release;
  program.write_blocks(ids.data(), count, data.data());
}

}  // namespace
}  // namespace octavo

NB_MODULE(_native, m) {
  using namespace octavo;
  m.doc() = "The CPU backend's native program; see csrc/program.h.";
  m.def("has_isa", [](const std::string& name) { return kernel_table(name.c_str()) != nullptr; }, "name"_a);
  nb::class_<Program>(m, "Program")
      .def(
          "__init__",
          [](Program* self, std::optional<std::string> isa, int num_threads, int64_t block_size, int64_t max_num_tokens,
             int64_t max_num_rows, int64_t max_model_len, const std::string& kv_dtype) {
            if (num_threads < 1 || max_num_tokens < 1 || max_num_rows < 1 || max_model_len < 1) {
              throw std::invalid_argument("threads, tokens, rows and positions must be at least 1");
            }
            if (kv_dtype != "fp16" && kv_dtype != "int8") throw std::invalid_argument("K and V are kept as fp16 or int8, not " + kv_dtype);
            const KvKind kind = kv_dtype == "int8" ? KvKind::kInt8 : KvKind::kF16;
            const Limits limits = {block_size, max_num_tokens, max_num_rows, max_model_len, kind};
            new (self) Program(isa.has_value() ? isa->c_str() : nullptr, num_threads, limits);
          },
          "isa"_a.none(), "num_threads"_a, "block_size"_a, "max_num_tokens"_a, "max_num_rows"_a, "max_model_len"_a,
          "kv_dtype"_a)
      .def_prop_ro("isa", &Program::isa)
      .def_prop_ro("num_threads", &Program::num_threads)
      .def_prop_ro("weights_bytes", &Program::weights_bytes)
      .def("add_grouped", &add_grouped, "shape"_a, "sizes"_a, "codes"_a, "scales"_a, "minimums"_a.none())
      .def("add_dense", &add_dense, "shape"_a, "dtype"_a, "address"_a, "row_stride"_a)
      .def(
          "add_vector",
          [](Program& program, Array<const float, 1> values) {
            return program.weights().add_vector(values.data(), static_cast<int64_t>(values.size()));
          },
          "values"_a)
      .def("add_rope_table", &Program::add_rope_table, "inv_freq"_a)
      .def(
          "add_cache_geometry",
          [](Program& program, int64_t layer, int32_t num_heads, int32_t num_kv_heads, int32_t head_dim, float scale,
             int64_t window, float soft_cap, int factors, int inverses) {
            return program.add_cache_geometry(
                {layer, num_heads, num_kv_heads, head_dim, scale, window, soft_cap, factors, inverses});
          },
          "layer"_a, "num_heads"_a, "num_kv_heads"_a, "head_dim"_a, "scale"_a, "window"_a, "soft_cap"_a, "factors"_a,
          "inverses"_a)
      .def(
          "add_quantized",
          [](Program& program, Place codes, Place scales, Place sums, Place scaled_sums, int64_t features, int32_t group) {
            return program.add_quantized({codes, scales, sums, scaled_sums, features, group});
          },
          "codes"_a, "scales"_a, "sums"_a, "scaled_sums"_a, "features"_a, "group"_a)
      .def("add_rows_stage", &add_rows_stage, "selected"_a, "ops"_a)
      .def("add_linear_stage", &add_linear_stage, "selected"_a, "x"_a, "quantized"_a, "parts"_a)
      .def("add_attention_stage", &add_attention_stage, "cache"_a, "query"_a, "out"_a)
      .def("finish", &Program::finish, "arena_bytes"_a, "logits"_a, "vocab"_a)
      .def("allocate_cache", &Program::allocate_cache, "num_layers"_a, "num_blocks"_a)
      .def("copy_blocks", &copy_blocks, "pairs"_a)
      .def("read_blocks", &read_blocks, "ids"_a, "out"_a)
      .def("write_blocks", &write_blocks, "ids"_a, "data"_a)
      .def("run", &run, "batch"_a, "inputs"_a, "has_cache"_a, "rows"_a.none(), "sampled"_a.none())
      .def(
          "read_value",
          [](const Program& program, Place place, Array<float, 2> out) {
            std::copy_n(program.value(place), out.size(), out.data());
          },
          "place"_a, "out"_a);
}
