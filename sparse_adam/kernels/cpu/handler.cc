// The XLA custom call: checks what it is given, and runs the update.

#include <functional>
#include <limits>
#include <new>
#include <string>
#include <utility>

#include "update.h"
#include "xla/ffi/api/ffi.h"

namespace sparse_adam {
namespace {

namespace ffi = xla::ffi;
using Integers = ffi::Span<const int32_t>;

// The attributes of the call: all that is known when it is compiled.
struct Options {
  int32_t num_rows;                              // V
  int32_t rows_per_group, stride, group_stride;  // of Storage
  Integers first, encodings;  // of w, m, v: the item where row 0 begins; its Encoding
  float beta_1, beta_2, epsilon, decay;
  bool decay_by_rate, sum_inside_sqrt, lazy, accumulate;
  float gradient_min, gradient_max, weight_min, weight_max;
};

}  // namespace
}  // namespace sparse_adam

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    sparse_adam::Options, StructMember<int32_t>("num_rows"),
    StructMember<int32_t>("rows_per_group"), StructMember<int32_t>("stride"),
    StructMember<int32_t>("group_stride"), StructMember<sparse_adam::Integers>("first"),
    StructMember<sparse_adam::Integers>("encodings"), StructMember<float>("beta_1"),
    StructMember<float>("beta_2"), StructMember<float>("epsilon"),
    StructMember<float>("decay"), StructMember<bool>("decay_by_rate"),
    StructMember<bool>("sum_inside_sqrt"), StructMember<bool>("lazy"),
    StructMember<bool>("accumulate"), StructMember<float>("gradient_min"),
    StructMember<float>("gradient_max"), StructMember<float>("weight_min"),
    StructMember<float>("weight_max"));

namespace sparse_adam {
namespace {

class XlaPool : public Pool {
 public:
  explicit XlaPool(ffi::ThreadPool pool) : pool_(pool) {}
  int64_t num_threads() const override { return pool_.num_threads(); }
  void Schedule(std::function<void()> task) override {
    pool_.Schedule(std::move(task));
  }

 private:
  ffi::ThreadPool pool_;
};

ffi::Error Refuse(const std::string& what) {
  return ffi::Error::InvalidArgument("sparse_adam on a CPU: " + what);
}

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

// Finds the three arrays, each in its own buffer or all in one. All numbers are below
// 2**31, so no sum of two products overflows.
ffi::Error Locate(const Options& options, int64_t dim, ffi::RemainingArgs before,
                  ffi::RemainingRets after, Storage* state) {
  const bool packed = before.size() == 1;
  if ((!packed && before.size() != 3) || after.size() != before.size()) {
    return Refuse("the state must be three arrays, or one");
  }
  if (options.num_rows < 1 || options.rows_per_group < 1 || options.stride < 0 ||
      options.group_stride < 0 || options.first.size() != 3 ||
      options.encodings.size() != 3) {
    return Refuse("its attributes make no sense");
  }
  state->rows_per_group = options.rows_per_group;
  state->stride = options.stride;
  state->group_stride = options.group_stride;
  for (int i = 0; i < 3; ++i) {
    const auto old = before.get<ffi::AnyBuffer>(packed ? 0 : i);
    auto updated = after.get<ffi::AnyBuffer>(packed ? 0 : i);
    if (!old || !updated) return Refuse("the state must be arrays");
    const auto encoding = static_cast<Encoding>(options.encodings[i]);
    if (options.encodings[i] < 0 || options.encodings[i] >= kEncodings ||
        !Holds(*old, packed, encoding)) {
      return Refuse("the arrays must be float32 or bfloat16, or packed int32");
    }
    if (old->untyped_data() != (*updated)->untyped_data() ||
        old->size_bytes() != (*updated)->size_bytes()) {
      return Refuse("the state must be updated in place");
    }
    const int64_t first = options.first[i], end = state->End(options.num_rows, dim);
    if (first < 0 || first + end > static_cast<int64_t>(old->element_count())) {
      return Refuse("an array is too small for [V, D]");
    }
    char* data = static_cast<char*>(old->untyped_data());
    state->arrays[i] = {data + first * ItemSize(encoding), encoding};
  }
  return ffi::Error::Success();
}

Formula FormulaOf(const Options& options, float rate) {
  return {rate,
          options.beta_1,
          options.beta_2,
          options.epsilon,
          options.decay_by_rate ? options.decay * rate : options.decay,
          options.sum_inside_sqrt,
          options.gradient_min,
          options.gradient_max,
          options.weight_min,
          options.weight_max};
}

// A buffer of as many numbers as there should be, or null if it is empty.
template <typename Buffer>
auto OrNull(const Buffer& x) {
  return x.element_count() == 0 ? nullptr : x.typed_data();
}

ffi::Error Handle(ffi::ThreadPool thread_pool, ffi::AnyBuffer grads,
                  ffi::BufferR1<ffi::S32> ids, ffi::BufferR1<ffi::S32> sources,
                  ffi::BufferR1<ffi::F32> gains, ffi::BufferR0<ffi::F32> rate,
                  ffi::BufferR1<ffi::S32> seeds, ffi::RemainingArgs state,
                  ffi::RemainingRets new_state, const Options& options) {
  const auto grads_shape = grads.dimensions();
  const int64_t num_ids = ids.dimensions()[0];
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (grads_shape.size() != 2) return Refuse("the gradients must be [B, D]");
  const int64_t dim = grads_shape[1];
  if (dim < 1 || dim > kMost || num_ids > kMost) {
    return Refuse("D must be in [1, 2**31) and N below 2**31");
  }
  const bool narrow = grads.element_type() == ffi::BF16;
  if (!narrow && grads.element_type() != ffi::F32) {
    return Refuse("the gradients must be float32 or bfloat16");
  }
  if (sources.dimensions()[0] != num_ids) return Refuse("sources must be [N]");
  const int64_t num_gains = gains.dimensions()[0];
  if (num_gains != 0 && num_gains != num_ids) return Refuse("gains must be [N] or [0]");
  const int64_t num_seeds = seeds.dimensions()[0];
  if (num_seeds != 0 && num_seeds != 3) return Refuse("seeds must be [3] or [0]");

  Update update = {};
  if (auto error = Locate(options, dim, state, new_state, &update.state);
      error.failure()) {
    return error;
  }
  update.grads = {static_cast<char*>(grads.untyped_data()),
                  narrow ? Encoding::kBFloat16 : Encoding::kFloat32};
  update.ids = ids.typed_data();
  update.sources = sources.typed_data();
  update.gains = OrNull(gains);
  update.seeds = OrNull(seeds);
  update.num_rows = options.num_rows;
  update.dim = dim;
  update.num_ids = num_ids;
  update.num_grads = grads_shape[0];
  update.lazy = options.lazy;
  update.accumulate = options.accumulate;
  update.formula = FormulaOf(options, *rate.typed_data());
  XlaPool pool(thread_pool);
  try {
    Run(update, pool);
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                      "sparse_adam on a CPU: no memory to sort the ids");
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace sparse_adam

namespace ffi = xla::ffi;

// The one name that the library shows.
extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* sparse_adam_cpu(
    XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    sparse_adam_cpu, sparse_adam::Handle,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Arg<ffi::AnyBuffer>()             // grads
        .Arg<ffi::BufferR1<ffi::S32>>()    // ids
        .Arg<ffi::BufferR1<ffi::S32>>()    // sources
        .Arg<ffi::BufferR1<ffi::F32>>()    // gains
        .Arg<ffi::BufferR0<ffi::F32>>()    // rate
        .Arg<ffi::BufferR1<ffi::S32>>()    // seeds
        .RemainingArgs()                   // table, momenta, velocities; or lines
        .RemainingRets()                   // the same
        .Attrs<sparse_adam::Options>());
