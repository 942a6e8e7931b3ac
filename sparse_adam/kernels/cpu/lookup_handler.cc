// The XLA custom calls of a lookup: check what they are given, and run it.

#include "lookup.h"
#include "xla.h"

namespace sparse_adam {
namespace {

namespace ffi = xla::ffi;

// Where the weights stand: all that is known when a call is compiled.
struct Places {
  int32_t num_rows;                              // V
  int32_t first, encoding;                       // the item where row 0 begins
  int32_t rows_per_group, stride, group_stride;  // of Weights
};

}  // namespace
}  // namespace sparse_adam

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    sparse_adam::Places, StructMember<int32_t>("num_rows"),
    StructMember<int32_t>("first"), StructMember<int32_t>("encoding"),
    StructMember<int32_t>("rows_per_group"), StructMember<int32_t>("stride"),
    StructMember<int32_t>("group_stride"));

namespace sparse_adam {
namespace {

// Whether an array can hold numbers of an encoding. In packed storage all are words.
bool Holds(ffi::DataType dtype, Encoding encoding) {
  switch (encoding) {
    case Encoding::kFloat32:
      return dtype == ffi::F32 || dtype == ffi::S32;
    case Encoding::kBFloat16:
      return dtype == ffi::BF16;
    case Encoding::kWidened:
    case Encoding::kLowHalf:
    case Encoding::kHighHalf:
      return dtype == ffi::S32;
  }
  return false;
}

// Finds the weights, of the width of the result.
ffi::Error Locate(const Places& places, const ffi::AnyBuffer& stored,
                  const ffi::AnyBuffer& result, Weights* weights, Encoding* encoding) {
  const auto shape = result.dimensions();
  if (shape.size() != 2) return Refuse("the result must have two axes");
  const int64_t dim = shape[1];
  if (shape[0] > kMost) {
    return RefuseNumber("the number of results", shape[0], "below 2**31");
  }
  const Groups groups = {places.rows_per_group, places.stride, places.group_stride};
  if (auto e = CheckGroups(groups, places.num_rows, dim); e.failure()) return e;
  if (places.encoding < 0 || places.encoding >= kEncodings) {
    return RefuseNumber("encoding", places.encoding,
                        "below " + std::to_string(kEncodings) + ", and not negative");
  }
  if (places.first < 0) return RefuseNumber("first", places.first, "at least 0");
  const auto stored_as = static_cast<Encoding>(places.encoding);
  if (!Holds(stored.element_type(), stored_as)) {
    return Refuse("the weights must be float32 or bfloat16, or packed int32");
  }
  *weights = {groups,
              static_cast<const char*>(stored.untyped_data()) +
                  places.first * ItemSize(stored_as),
              stored_as,
              places.num_rows,
              dim};
  if (stored_as == Encoding::kBFloat16 && weights->grouped()) {
    return Refuse("a table of bfloat16 has its rows one behind the other");
  }
  const auto count = static_cast<int64_t>(stored.element_count());
  if (places.first + weights->End(places.num_rows, dim) > count) {
    return Refuse("the weights are too few for [V, D]");
  }
  const bool narrow = result.element_type() == ffi::BF16;
  if ((!narrow && result.element_type() != ffi::F32) ||
      (narrow && stored_as == Encoding::kFloat32)) {
    return Refuse("the result must be float32, or bfloat16 as the weights are");
  }
  *encoding = narrow ? Encoding::kBFloat16 : Encoding::kFloat32;
  return ffi::Error::Success();
}

ffi::Error HandleLookup(ffi::ThreadPool thread_pool, ffi::AnyBuffer stored,
                        ffi::BufferR1<ffi::S32> ids, ffi::Result<ffi::AnyBuffer> result,
                        const Places& places) {
  Lookup lookup = {};
  if (auto error = Locate(places, stored, *result, &lookup.weights, &lookup.encoding);
      error.failure()) {
    return error;
  }
  lookup.ids = ids.typed_data();
  lookup.num_ids = ids.dimensions()[0];
  lookup.out = static_cast<char*>(result->untyped_data());
  if (lookup.num_ids != result->dimensions()[0]) return Refuse("ids must be [N]");
  return RunOnXla(lookup, thread_pool);
}

ffi::Error HandleCombine(ffi::ThreadPool thread_pool, ffi::AnyBuffer stored,
                         ffi::BufferR1<ffi::S32> ids, ffi::BufferR1<ffi::S32> samples,
                         ffi::BufferR1<ffi::F32> gains, ffi::BufferR1<ffi::F32> scales,
                         ffi::Result<ffi::AnyBuffer> result, const Places& places) {
  Combine combine = {};
  if (auto error = Locate(places, stored, *result, &combine.weights, &combine.encoding);
      error.failure()) {
    return error;
  }
  combine.ids = ids.typed_data();
  combine.num_ids = ids.dimensions()[0];
  combine.gains = OrNull(gains);
  combine.scales = OrNull(scales);
  combine.num_samples = result->dimensions()[0];
  combine.out = static_cast<char*>(result->untyped_data());
  if (combine.num_ids > kMost) return Refuse("N must be below 2**31");
  if (samples.dimensions()[0] == combine.num_ids && combine.num_ids != 0) {
    combine.samples = samples.typed_data();
  } else if (samples.dimensions()[0] == 0 &&
             (combine.num_ids == 0 || combine.num_samples > 0) &&
             (combine.num_ids == 0 || combine.num_ids % combine.num_samples == 0)) {
    combine.places = combine.num_ids == 0 ? 0 : combine.num_ids / combine.num_samples;
  } else {
    return Refuse("samples must be [N], or [0] where N is a multiple of S");
  }
  const int64_t num_gains = gains.dimensions()[0], num_scales = scales.dimensions()[0];
  if (num_gains != 0 && num_gains != combine.num_ids) {
    return Refuse("gains must be [N] or [0]");
  }
  if (num_scales != 0 && num_scales != combine.num_samples) {
    return Refuse("scales must be [S] or [0]");
  }
  return RunOnXla(combine, thread_pool);
}

}  // namespace
}  // namespace sparse_adam

namespace ffi = xla::ffi;

SHOWN XLA_FFI_Error* sparse_adam_cpu_lookup(XLA_FFI_CallFrame* call_frame);
SHOWN XLA_FFI_Error* sparse_adam_cpu_combine(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(sparse_adam_cpu_lookup, sparse_adam::HandleLookup,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()           // the weights
                                  .Arg<ffi::BufferR1<ffi::S32>>()  // ids
                                  .Ret<ffi::AnyBuffer>()           // rows
                                  .Attrs<sparse_adam::Places>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(sparse_adam_cpu_combine, sparse_adam::HandleCombine,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()           // the weights
                                  .Arg<ffi::BufferR1<ffi::S32>>()  // ids
                                  .Arg<ffi::BufferR1<ffi::S32>>()  // samples
                                  .Arg<ffi::BufferR1<ffi::F32>>()  // gains
                                  .Arg<ffi::BufferR1<ffi::F32>>()  // scales
                                  .Ret<ffi::AnyBuffer>()           // combined
                                  .Attrs<sparse_adam::Places>());
