// The XLA custom call: checks what it is given, and runs the update.

#include <cmath>
#include <functional>
#include <limits>
#include <new>
#include <string>
#include <utility>

#include "update.h"
#include "xla/ffi/api/ffi.h"

namespace sparse_adam {
namespace {

// The attributes of the call: all that is known when it is compiled.
struct Options {
  float beta_1, beta_2, epsilon, decay;
  bool decay_by_rate, sum_inside_sqrt, lazy, accumulate;
  float gradient_min, gradient_max, weight_min, weight_max;
};

}  // namespace
}  // namespace sparse_adam

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    sparse_adam::Options, StructMember<float>("beta_1"), StructMember<float>("beta_2"),
    StructMember<float>("epsilon"), StructMember<float>("decay"),
    StructMember<bool>("decay_by_rate"), StructMember<bool>("sum_inside_sqrt"),
    StructMember<bool>("lazy"), StructMember<bool>("accumulate"),
    StructMember<float>("gradient_min"), StructMember<float>("gradient_max"),
    StructMember<float>("weight_min"), StructMember<float>("weight_max"));

namespace sparse_adam {
namespace {

namespace ffi = xla::ffi;

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

bool HasShape(const ffi::AnyBuffer& x, int64_t rows, int64_t columns) {
  const auto shape = x.dimensions();
  return shape.size() == 2 && shape[0] == rows && shape[1] == columns;
}

bool IsStored(const ffi::AnyBuffer& x) {
  return x.element_type() == ffi::F32 || x.element_type() == ffi::BF16;
}

Matrix MatrixOf(const ffi::AnyBuffer& x) {
  return {x.untyped_data(), x.element_type() == ffi::BF16};
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

using Result = ffi::Result<ffi::AnyBuffer>;

ffi::Error Handle(ffi::ThreadPool thread_pool, ffi::AnyBuffer table,
                  ffi::AnyBuffer momenta, ffi::AnyBuffer velocities,
                  ffi::AnyBuffer grads, ffi::BufferR1<ffi::S32> ids,
                  ffi::BufferR1<ffi::S32> sources, ffi::BufferR1<ffi::F32> gains,
                  ffi::BufferR0<ffi::F32> rate, Result new_table, Result new_momenta,
                  Result new_velocities, const Options& options) {
  if (table.dimensions().size() != 2) return Refuse("the table must be [V, D]");
  const int64_t num_rows = table.dimensions()[0], dim = table.dimensions()[1];
  const int64_t num_ids = ids.dimensions()[0];
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (num_rows < 1 || num_rows > kMost || dim < 1 || num_ids > kMost) {
    return Refuse("V must be in [1, 2**31), D at least 1 and N below 2**31");
  }
  const std::pair<ffi::AnyBuffer, ffi::AnyBuffer> aliased[] = {
      {table, *new_table}, {momenta, *new_momenta}, {velocities, *new_velocities}};
  for (const auto& [before, after] : aliased) {
    if (!HasShape(before, num_rows, dim) || !HasShape(after, num_rows, dim)) {
      return Refuse("the three arrays must have one shape [V, D]");
    }
    if (!IsStored(before) || before.element_type() != after.element_type()) {
      return Refuse("the three arrays must be float32 or bfloat16");
    }
    if (before.untyped_data() != after.untyped_data()) {
      return Refuse("the three arrays must be updated in place");
    }
  }
  if (grads.dimensions().size() != 2 || grads.dimensions()[1] != dim) {
    return Refuse("the gradients must be [B, D]");
  }
  if (!IsStored(grads)) return Refuse("the gradients must be float32 or bfloat16");
  if (sources.dimensions()[0] != num_ids) return Refuse("sources must be [N]");
  const int64_t num_gains = gains.dimensions()[0];
  if (num_gains != 0 && num_gains != num_ids) return Refuse("gains must be [N] or [0]");

  const Update update = {MatrixOf(table),
                         MatrixOf(momenta),
                         MatrixOf(velocities),
                         MatrixOf(grads),
                         ids.typed_data(),
                         sources.typed_data(),
                         num_gains == 0 ? nullptr : gains.typed_data(),
                         num_rows,
                         dim,
                         num_ids,
                         grads.dimensions()[0],
                         options.lazy,
                         options.accumulate,
                         FormulaOf(options, *rate.typed_data())};
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
        .Arg<ffi::AnyBuffer>()             // table
        .Arg<ffi::AnyBuffer>()             // momenta
        .Arg<ffi::AnyBuffer>()             // velocities
        .Arg<ffi::AnyBuffer>()             // grads
        .Arg<ffi::BufferR1<ffi::S32>>()    // ids
        .Arg<ffi::BufferR1<ffi::S32>>()    // sources
        .Arg<ffi::BufferR1<ffi::F32>>()    // gains
        .Arg<ffi::BufferR0<ffi::F32>>()    // rate
        .Ret<ffi::AnyBuffer>()
        .Ret<ffi::AnyBuffer>()
        .Ret<ffi::AnyBuffer>()
        .Attrs<sparse_adam::Options>());
