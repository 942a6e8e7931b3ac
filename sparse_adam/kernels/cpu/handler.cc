// The XLA custom call: checks what it is given, and runs the update.

#include <cstdlib>
#include <string>
#include <string_view>

#include "update.h"
#include "xla.h"

namespace sparse_adam {
namespace {

namespace ffi = xla::ffi;
using Integers = ffi::Span<const int32_t>;

// The attributes of the call: all that is known when it is compiled.
struct Options {
  int32_t num_rows;                              // V
  int32_t rows_per_group, stride, group_stride;  // of Storage
  // Of the weights and each slot: the item where row 0 begins; its Encoding; whether it
  // has one number for each row.
  Integers first, encodings, per_row;
  bool lazy, accumulate;
  bool decays, scales;  // whether these two of the numbers count
  std::string_view rule;
  ffi::Span<const float> constants;  // of the rule
  float gradient_min, gradient_max, weight_min, weight_max;
  float ema_share;  // 0 for no average
};

}  // namespace
}  // namespace sparse_adam

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    sparse_adam::Options, StructMember<int32_t>("num_rows"),
    StructMember<int32_t>("rows_per_group"), StructMember<int32_t>("stride"),
    StructMember<int32_t>("group_stride"), StructMember<sparse_adam::Integers>("first"),
    StructMember<sparse_adam::Integers>("encodings"),
    StructMember<sparse_adam::Integers>("per_row"), StructMember<bool>("lazy"),
    StructMember<bool>("accumulate"), StructMember<bool>("decays"),
    StructMember<bool>("scales"), StructMember<std::string_view>("rule"),
    StructMember<xla::ffi::Span<const float>>("constants"),
    StructMember<float>("gradient_min"), StructMember<float>("gradient_max"),
    StructMember<float>("weight_min"), StructMember<float>("weight_max"),
    StructMember<float>("ema_share"));

namespace sparse_adam {
namespace {

// Whether this can hold numbers of an encoding. In packed storage all are words.
bool Holds(const ffi::AnyBuffer& x, bool packed, Encoding encoding) {
  switch (x.element_type()) {
    case ffi::F32:
      return !packed && encoding == Encoding::kFloat32;
    case ffi::BF16:
      return !packed && encoding == Encoding::kBFloat16;
    case ffi::S32:
      return packed && encoding != Encoding::kBFloat16;
    default:
      return false;
  }
}

// Whether no number of an array is in another one, where all are in one buffer: those
// of a group stand beside each other, or in the two halves of the same words.
ffi::Error CheckApart(const Options& options, const Groups& groups, int64_t dim) {
  const int64_t size = groups.Size(options.num_rows, dim);
  const bool grouped = options.num_rows > groups.rows_per_group;
  for (size_t i = 0; i < options.first.size(); ++i) {
    for (size_t j = 0; j < i; ++j) {
      const auto one = static_cast<Encoding>(options.encodings[i]);
      const auto other = static_cast<Encoding>(options.encodings[j]);
      const int64_t apart = std::abs(int64_t{options.first[i]} - options.first[j]);
      const bool halves =
          apart == 0 && ((one == Encoding::kLowHalf && other == Encoding::kHighHalf) ||
                         (one == Encoding::kHighHalf && other == Encoding::kLowHalf));
      const bool beside =
          apart >= size && (!grouped || apart + size <= groups.group_stride);
      if (!halves && !beside) {
        return Refuse("first=" + std::to_string(options.first[j]) + " and " +
                      std::to_string(options.first[i]) + " of arrays " +
                      std::to_string(j) + " and " + std::to_string(i) +
                      " must be further apart, within a group: the arrays overlap");
      }
    }
  }
  return ffi::Error::Success();
}

// Finds the arrays, each in its own buffer or all in one.
ffi::Error Locate(const Options& options, int64_t dim, ffi::RemainingArgs before,
                  ffi::RemainingRets after, Storage* state) {
  const size_t num_arrays = options.first.size();
  if (num_arrays < 1 || num_arrays > kMostArrays ||
      options.encodings.size() != num_arrays || options.per_row.size() != num_arrays) {
    return Refuse("first, encodings and per_row must be of the same 1 to " +
                  std::to_string(kMostArrays) + " arrays");
  }
  const bool alone = before.size() == 1;
  if ((!alone && before.size() != num_arrays) || after.size() != before.size()) {
    return Refuse("the state must be " + std::to_string(num_arrays) +
                  " arrays, or one of lines");
  }
  state->rows_per_group = options.rows_per_group;
  state->stride = options.stride;
  state->group_stride = options.group_stride;
  if (auto e = CheckGroups(*state, options.num_rows, dim); e.failure()) return e;
  if (alone) {
    if (auto e = CheckApart(options, *state, dim); e.failure()) return e;
  }
  for (size_t i = 0; i < num_arrays; ++i) {
    const auto old = before.get<ffi::AnyBuffer>(alone ? 0 : i);
    auto updated = after.get<ffi::AnyBuffer>(alone ? 0 : i);
    if (!old || !updated) return Refuse("the state must be arrays");
    const bool packed = alone && (num_arrays > 1 || old->element_type() == ffi::S32);
    const bool per_row = options.per_row[i] != 0;
    const auto encoding = static_cast<Encoding>(options.encodings[i]);
    if (options.encodings[i] < 0 || options.encodings[i] >= kEncodings ||
        !Holds(*old, packed, encoding) ||
        (per_row && (packed || encoding != Encoding::kFloat32))) {
      return Refuse("the arrays must be float32 or bfloat16, or packed int32");
    }
    if (old->untyped_data() != (*updated)->untyped_data() ||
        old->size_bytes() != (*updated)->size_bytes()) {
      return Refuse("the state must be updated in place");
    }
    const int64_t first = options.first[i];
    const int64_t end = per_row ? options.num_rows : state->End(options.num_rows, dim);
    if (first < 0 || first + end > static_cast<int64_t>(old->element_count())) {
      return Refuse(per_row ? "an array is too small for [V]"
                            : "an array is too small for [V, D]");
    }
    char* data = static_cast<char*>(old->untyped_data());
    data += first * ItemSize(encoding);
    if (per_row) {
      state->row_arrays[state->num_row_arrays++] = reinterpret_cast<float*>(data);
    } else {
      state->arrays[state->num_arrays++] = {data, encoding};
    }
  }
  return ffi::Error::Success();
}

// Finds the loops of the rule and makes it ready.
ffi::Error Prepare(const Options& options, ffi::BufferR1<ffi::F32> numbers,
                   Update* update) {
  const int64_t count = numbers.dimensions()[0];
  if (count != 3 && count != 4) return Refuse("numbers must be [3] or [4]");
  const RegisteredRule* rule = RegisteredRule::Find(options.rule);
  if (rule == nullptr) {
    return Refuse("it has no loop for " + std::string(options.rule));
  }
  if (static_cast<int>(options.constants.size()) != rule->num_constants()) {
    return Refuse(std::string(options.rule) + " has " +
                  std::to_string(rule->num_constants()) + " constants");
  }
  const float* given = numbers.typed_data();
  const float* constants = options.constants.begin();
  update->rule = &rule->LoopsFor(constants);
  const int averages = options.ema_share != 0;
  if (update->state.num_arrays != 1 + update->rule->slots + averages ||
      update->state.num_row_arrays != update->rule->row_slots ||
      options.per_row[0] != 0) {
    return Refuse("these are not the arrays of " + std::string(options.rule));
  }
  update->prepared = update->rule->prepare(constants, given[0]);
  update->numbers = {options.decays,
                     given[1],
                     options.scales ? given[2] : 1.0f,
                     options.gradient_min,
                     options.gradient_max,
                     options.weight_min,
                     options.weight_max,
                     options.ema_share,
                     count == 4 ? given[3] : 0.0f};
  return ffi::Error::Success();
}

// Takes the seeds of the arrays that can be rounded, which rows' own numbers cannot.
ffi::Error TakeSeeds(const Options& options, ffi::BufferR1<ffi::S32> seeds,
                     Update* update) {
  const auto num_seeds = static_cast<size_t>(seeds.dimensions()[0]);
  update->stochastic = num_seeds != 0;
  if (num_seeds == 0) return ffi::Error::Success();
  if (num_seeds != options.first.size()) {
    return Refuse("seeds must be one for each array, or [0]");
  }
  int t = 0;
  for (size_t i = 0; i < num_seeds; ++i) {
    if (options.per_row[i] == 0) update->seeds[t++] = seeds.typed_data()[i];
  }
  return ffi::Error::Success();
}

ffi::Error Handle(ffi::ThreadPool thread_pool, ffi::AnyBuffer grads,
                  ffi::BufferR1<ffi::S32> ids, ffi::BufferR1<ffi::S32> sources,
                  ffi::BufferR1<ffi::F32> gains, ffi::BufferR1<ffi::F32> numbers,
                  ffi::BufferR1<ffi::S32> seeds, ffi::RemainingArgs state,
                  ffi::RemainingRets new_state, const Options& options) {
  const auto grads_shape = grads.dimensions();
  const int64_t num_ids = ids.dimensions()[0];
  if (grads_shape.size() != 2) return Refuse("the gradients must be [B, D]");
  const int64_t dim = grads_shape[1];
  if (num_ids > kMost) return RefuseNumber("N", num_ids, "below 2**31");
  const bool narrow = grads.element_type() == ffi::BF16;
  if (!narrow && grads.element_type() != ffi::F32) {
    return Refuse("the gradients must be float32 or bfloat16");
  }
  if (sources.dimensions()[0] != num_ids) return Refuse("sources must be [N]");
  const int64_t num_gains = gains.dimensions()[0];
  if (num_gains != 0 && num_gains != num_ids) return Refuse("gains must be [N] or [0]");

  Update update = {};
  if (auto e = Locate(options, dim, state, new_state, &update.state); e.failure()) {
    return e;
  }
  if (auto e = Prepare(options, numbers, &update); e.failure()) return e;
  if (auto e = TakeSeeds(options, seeds, &update); e.failure()) return e;
  update.grads = {static_cast<char*>(grads.untyped_data()),
                  narrow ? Encoding::kBFloat16 : Encoding::kFloat32};
  update.ids = ids.typed_data();
  update.sources = sources.typed_data();
  update.gains = OrNull(gains);
  update.num_rows = options.num_rows;
  update.dim = dim;
  update.num_ids = num_ids;
  update.num_grads = grads_shape[0];
  update.lazy = options.lazy;
  update.accumulate = options.accumulate;
  return RunOnXla(update, thread_pool);
}

}  // namespace
}  // namespace sparse_adam

namespace ffi = xla::ffi;

// The rules that it has loops for: the names of their Python classes, with a space
// behind each.
SHOWN const char* sparse_adam_cpu_rules() {
  static const std::string* const names = [] {
    auto* all = new std::string;
    for (auto* rule = sparse_adam::RegisteredRule::First(); rule; rule = rule->next()) {
      *all += std::string(rule->name()) + " ";
    }
    return all;
  }();
  return names->c_str();
}

SHOWN XLA_FFI_Error* sparse_adam_cpu(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    sparse_adam_cpu, sparse_adam::Handle,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<ffi::AnyBuffer>()             // grads
        .Arg<ffi::BufferR1<ffi::S32>>()    // ids
        .Arg<ffi::BufferR1<ffi::S32>>()    // sources
        .Arg<ffi::BufferR1<ffi::F32>>()    // gains
        .Arg<ffi::BufferR1<ffi::F32>>()    // learning rate, decay, scale; step
        .Arg<ffi::BufferR1<ffi::S32>>()    // seeds
        .RemainingArgs()                   // weights and slots; or lines
        .RemainingRets()                   // the same
        .Attrs<sparse_adam::Options>());
