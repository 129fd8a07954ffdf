#include "tensor.h"

#include <algorithm>
#include <array>
#include <unordered_map>
#include <utility>

#include "core/check.h"
#include "heddle/error.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace heddle::python {
namespace {

using check::fail;
using check::text;

// How each element type is called: by numpy and ml_dtypes, by torch, and by DLPack.
struct DTypeName {
  DType dtype;
  const char* numpy;
  const char* torch;
  std::uint8_t code;
  std::uint8_t bits;
};
constexpr std::array<DTypeName, 9> kDTypes = {{
    {DType::kFloat64, "float64", "float64", kDLFloat, 64},
    {DType::kFloat32, "float32", "float32", kDLFloat, 32},
    {DType::kFloat16, "float16", "float16", kDLFloat, 16},
    {DType::kBFloat16, "bfloat16", "bfloat16", kDLBfloat, 16},
    {DType::kFloat8E4M3, "float8_e4m3fn", "float8_e4m3fn", kDLFloat8_e4m3fn, 8},
    {DType::kInt8, "int8", "int8", kDLInt, 8},
    {DType::kInt32, "int32", "int32", kDLInt, 32},
    {DType::kInt64, "int64", "int64", kDLInt, 64},
    {DType::kBool, "bool", "bool", kDLBool, 8},
}};

const DTypeName& name_of(DType dtype) { return *std::ranges::find(kDTypes, dtype, &DTypeName::dtype); }

[[noreturn]] void fail_dtype(const char* argument, const std::string& given) {
  std::string allowed;
  for (const auto& known : kDTypes) allowed += text(allowed.empty() ? "" : ", ", known.numpy);
  fail(ErrorCode::kDType, argument, text("dtype ", given, "; heddle knows ", allowed));
}

void check_rank(const char* argument, std::int64_t rank) {
  if (rank > kMaxRank) fail(ErrorCode::kShape, argument, text("rank ", rank, "; allowed are ranks up to ", kMaxRank));
}

void check_aligned(const char* argument, const TensorView& view) {
  const std::size_t size = size_of(view.dtype);
  if (reinterpret_cast<std::uintptr_t>(view.data) % size != 0) {
    fail(ErrorCode::kLayout, argument, text("its memory is not aligned to its elements of ", size, " bytes"));
  }
}

// A library refused to hand out its memory. Torch appends a stack trace to its reason; the first line says it.
[[noreturn]] void fail_export(const char* argument, py::handle object, py::error_already_set& error) {
  if (!error.matches(PyExc_Exception) || error.matches(PyExc_MemoryError)) throw error;
  const auto reason = py::str(error.value()).cast<std::string>();
  fail(ErrorCode::kValue, argument,
       text(describe(object), " that DLPack cannot export: ", reason.substr(0, reason.find('\n'))));
}

// ---- numpy ----------------------------------------------------------------------------------------------------------

DType dtype_of(const py::array& array, const char* argument) {
  // By type number: ml_dtypes registers its own at import, so these stay valid for the life of the process.
  static std::unordered_map<int, DType> by_number;
  const py::dtype dtype = array.dtype();
  if (dtype.byteorder() == '>') fail_dtype(argument, "in big-endian byte order");
  const auto known = by_number.find(dtype.num());
  if (known != by_number.end()) return known->second;
  const auto name = dtype.attr("name").cast<std::string>();
  const auto* found = std::ranges::find(kDTypes, name, &DTypeName::numpy);
  if (found == kDTypes.end()) fail_dtype(argument, name);
  by_number.emplace(dtype.num(), found->dtype);
  return found->dtype;
}

Array from_numpy(py::array array, const char* argument) {
  Array result;
  TensorView& view = result.view;
  view.dtype = dtype_of(array, argument);
  check_rank(argument, array.ndim());
  view.rank = static_cast<int>(array.ndim());
  view.data = const_cast<void*>(array.data());
  const auto size = static_cast<std::int64_t>(array.itemsize());
  for (int axis = 0; axis < view.rank; ++axis) {
    view.shape[axis] = array.shape(axis);
    view.strides[axis] = array.strides(axis) / size;
    if (view.strides[axis] * size != array.strides(axis) && view.shape[axis] > 1) {
      fail(ErrorCode::kLayout, argument,
           text("axis ", axis, " has a stride of ", array.strides(axis), " bytes; allowed are whole elements of ",
                size));
    }
  }
  check_aligned(argument, view);
  result.writable = array.writeable();
  result.object = std::move(array);
  return result;
}

py::dtype numpy_dtype(DType dtype) {
  const char* name = name_of(dtype).numpy;
  if (dtype != DType::kBFloat16 && dtype != DType::kFloat8E4M3) return py::dtype(name);
  try {
    return py::dtype::from_args(py::module_::import("ml_dtypes").attr(name));
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_ImportError)) throw;
    fail(ErrorCode::kUnsupported, "dtype", text("numpy has no ", name, " of its own: pip install ml_dtypes"));
  }
}

// ---- torch and DLPack -----------------------------------------------------------------------------------------------

// torch.Tensor, once somebody has imported torch. heddle does not.
PyTypeObject* torch_tensor_type() {
  static PyTypeObject* type = nullptr;  // held for the life of the process, as torch itself is
  if (type == nullptr) {
    const auto torch = py::reinterpret_steal<py::object>(PyImport_GetModule(py::str("torch").ptr()));
    if (torch && py::hasattr(torch, "Tensor")) {
      type = reinterpret_cast<PyTypeObject*>(py::object(torch.attr("Tensor")).release().ptr());
    }
  }
  return type;
}

// A name that is looked up on every call, made once.
PyObject* interned(const char* name) { return PyUnicode_InternFromString(name); }

py::object attribute(py::handle object, PyObject* name) {
  auto value = py::reinterpret_steal<py::object>(PyObject_GetAttr(object.ptr(), name));
  if (!value) {
    if (!PyErr_ExceptionMatches(PyExc_AttributeError)) throw py::error_already_set();
    PyErr_Clear();
  }
  return value;
}

const DLPackExchangeAPI* exchange_api(PyTypeObject* type) {
  static PyObject* const name = interned("__dlpack_c_exchange_api__");
  const py::object capsule = attribute(reinterpret_cast<PyObject*>(type), name);
  if (!capsule || !PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  const auto* header =
      static_cast<const DLPackExchangeAPIHeader*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (header != nullptr && header->version.major != DLPACK_MAJOR_VERSION) header = header->prev_api;
  const auto* api = reinterpret_cast<const DLPackExchangeAPI*>(header);
  return api != nullptr && api->dltensor_from_py_object_no_sync != nullptr ? api : nullptr;
}

// Of an element type that heddle does not know.
std::string dtype_name(DLDataType dtype) {
  constexpr std::array<std::pair<std::uint8_t, const char*>, 4> kCodes = {
      {{kDLInt, "int"}, {kDLUInt, "uint"}, {kDLFloat, "float"}, {kDLComplex, "complex"}}};
  for (const auto& [code, name] : kCodes) {
    if (dtype.code == code && dtype.lanes == 1) return text(name, int{dtype.bits});
  }
  return text("DLPack code ", int{dtype.code}, ", ", int{dtype.bits}, " bits, ", dtype.lanes, " lanes");
}

TensorView view_of(const DLTensor& tensor, const char* argument) {
  TensorView view;
  const auto* known = std::ranges::find_if(kDTypes, [&](const DTypeName& n) {
    return n.code == tensor.dtype.code && n.bits == tensor.dtype.bits && tensor.dtype.lanes == 1;
  });
  if (known == kDTypes.end()) fail_dtype(argument, dtype_name(tensor.dtype));
  view.dtype = known->dtype;
  switch (tensor.device.device_type) {
    case kDLCPU:
    case kDLCUDAHost: break;
    case kDLCUDA:
    case kDLCUDAManaged: view.device = {DeviceType::kCuda, tensor.device.device_id}; break;
    default:
      fail(ErrorCode::kDevice, argument,
           text("DLPack device type ", static_cast<int>(tensor.device.device_type),
                "; allowed are CPU (1) and CUDA (2)"));
  }
  check_rank(argument, tensor.ndim);
  view.rank = tensor.ndim;
  view.data = static_cast<std::byte*>(tensor.data) + tensor.byte_offset;
  std::int64_t contiguous = 1;
  for (int axis = view.rank - 1; axis >= 0; --axis) {
    view.shape[axis] = tensor.shape[axis];
    view.strides[axis] = tensor.strides != nullptr ? tensor.strides[axis] : contiguous;
    contiguous *= view.shape[axis];
  }
  check_aligned(argument, view);
  return view;
}

bool requires_grad(py::handle tensor) {
  static PyObject* const name = interned("requires_grad");
  const py::object value = attribute(tensor, name);
  return value && value.ptr() == Py_True;
}

// Reading a tensor whose operations are being recorded would drop its gradient without a word.
void check_gradient(py::handle tensor, const char* argument) {
  if (requires_grad(tensor) && py::module_::import("torch").attr("is_grad_enabled")().cast<bool>()) {
    fail(ErrorCode::kUnsupported, argument,
         "a tensor that requires grad, and heddle computes no gradients; allowed are tensor.detach(), or the call "
         "under torch.no_grad()");
  }
}

// The stream argument of __dlpack__: whose work on a CUDA tensor must be done before ours begins. Torch's queue is
// the one that we use ourselves.
constexpr int kNoSynchronisation = -1;
constexpr int kLegacyDefaultStream = 1;

// Calls object.__dlpack__(), new and old forms.
py::object dlpack_capsule(py::handle object, int stream) {
  py::dict options;
  const auto device = object.attr("__dlpack_device__")().cast<std::pair<int, int>>();
  if (device.first == kDLCUDA || device.first == kDLCUDAManaged) options["stream"] = stream;
  const py::object method = object.attr("__dlpack__");
  try {
    return method(**options, py::arg("max_version") = py::make_tuple(DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION));
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;  // a producer from before versions
    return method(**options);
  }
}

Array from_dlpack(py::handle object, const char* argument, int stream) {
  Array result;
  try {
    result.holder = dlpack_capsule(object, stream);
  } catch (py::error_already_set& error) {
    fail_export(argument, object, error);
  }
  // The capsule stays ours and unconsumed: dropping it returns the tensor to its producer.
  PyObject* capsule = result.holder.ptr();
  if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
    const auto& managed = *static_cast<DLManagedTensorVersioned*>(PyCapsule_GetPointer(capsule, "dltensor_versioned"));
    if (managed.version.major != DLPACK_MAJOR_VERSION) {
      fail(ErrorCode::kUnsupported, argument,
           text("DLPack version ", managed.version.major, "; allowed is ", DLPACK_MAJOR_VERSION));
    }
    result.view = view_of(managed.dl_tensor, argument);
    result.writable = (managed.flags & DLPACK_FLAG_BITMASK_READ_ONLY) == 0;
  } else if (PyCapsule_IsValid(capsule, "dltensor")) {
    result.view =
        view_of(static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"))->dl_tensor, argument);
  } else {
    fail(ErrorCode::kValue, argument, text(describe(object), " whose __dlpack__() returned no DLPack capsule"));
  }
  result.object = py::reinterpret_borrow<py::object>(object);
  return result;
}

Array from_torch(py::handle object, const char* argument) {
  check_gradient(object, argument);
  Array result;
  const DLPackExchangeAPI* api = exchange_api(Py_TYPE(object.ptr()));
  if (api != nullptr) {
    DLTensor tensor;
    if (api->dltensor_from_py_object_no_sync(object.ptr(), &tensor) != 0) {
      py::error_already_set error;
      fail_export(argument, object, error);
    }
    result.view = view_of(tensor, argument);
    result.object = py::reinterpret_borrow<py::object>(object);
  } else {
    const py::object detached =
        requires_grad(object) ? object.attr("detach")() : py::reinterpret_borrow<py::object>(object);
    result = from_dlpack(detached, argument, kNoSynchronisation);
  }
  result.kind = Kind::kTorch;
  result.exchange = api;
  return result;
}

py::object empty_torch(std::span<const std::int64_t> shape, DType dtype, const Array& like) {
  if (like.exchange == nullptr) {
    const auto torch = py::module_::import("torch");
    py::tuple sizes(shape.size());
    for (std::size_t axis = 0; axis < shape.size(); ++axis) sizes[axis] = shape[axis];
    return torch.attr("empty")(sizes, py::arg("dtype") = torch.attr(name_of(dtype).torch),
                               py::arg("device") = like.object.attr("device"));
  }
  const DTypeName& name = name_of(dtype);
  DLTensor prototype{};
  prototype.device = {like.view.device.type == DeviceType::kCuda ? kDLCUDA : kDLCPU, like.view.device.index};
  prototype.ndim = static_cast<std::int32_t>(shape.size());
  prototype.dtype = {name.code, name.bits, 1};
  prototype.shape = const_cast<std::int64_t*>(shape.data());
  DLManagedTensorVersioned* managed = nullptr;
  const auto set_error = [](void*, const char*, const char* message) {
    const py::gil_scoped_acquire gil;
    PyErr_SetString(PyExc_MemoryError, message);
  };
  void* object = nullptr;
  if (like.exchange->managed_tensor_allocator(&prototype, &managed, nullptr, set_error) != 0 ||
      like.exchange->managed_tensor_to_py_object_no_sync(managed, &object) != 0) {
    throw py::error_already_set();
  }
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
}

}  // namespace

const char* to_string(Kind kind) { return kind == Kind::kNumpy ? "a numpy array" : "a torch tensor"; }

std::string describe(py::handle object) {
  if (py::isinstance<py::array>(object)) return to_string(Kind::kNumpy);
  PyTypeObject* torch = torch_tensor_type();
  if (torch != nullptr && PyType_IsSubtype(Py_TYPE(object.ptr()), torch)) return to_string(Kind::kTorch);
  return Py_TYPE(object.ptr())->tp_name;
}

Array array(py::handle object, const char* argument) {
  static PyObject* const dlpack = interned("__dlpack__");
  static PyObject* const array_interface = interned("__array_interface__");
  if (py::isinstance<py::array>(object)) return from_numpy(py::reinterpret_borrow<py::array>(object), argument);
  PyTypeObject* torch = torch_tensor_type();
  if (torch != nullptr && PyType_IsSubtype(Py_TYPE(object.ptr()), torch)) return from_torch(object, argument);
  if (attribute(object, dlpack)) return from_dlpack(object, argument, kLegacyDefaultStream);
  if (PyObject_CheckBuffer(object.ptr()) != 0 || attribute(object, array_interface)) {
    if (const auto over = py::array::ensure(object)) {
      Array result = from_numpy(over, argument);
      result.holder = std::exchange(result.object, py::reinterpret_borrow<py::object>(object));
      return result;
    }
  }
  fail(ErrorCode::kDType, argument,
       text("got ", describe(object), "; allowed are numpy arrays, torch tensors and objects with __dlpack__"));
}

Array optional_array(py::handle object, const char* argument) {
  return object.is_none() ? Array{} : array(object, argument);
}

Array output_array(py::handle object, const char* argument) {
  Array result = optional_array(object, argument);
  if (!result.writable) fail(ErrorCode::kValue, argument, "a read-only array; allowed are writable ones");
  return result;
}

void require_same_kind(const Array& array, const char* argument, const Array& expected, const char* owner) {
  if (array.given() && array.kind != expected.kind) {
    fail(ErrorCode::kDType, argument,
         text(to_string(array.kind), "; allowed is ", to_string(expected.kind), ", as ", owner));
  }
}

// A wish, as numpy makes it for its own arrays: new memory in small pages costs as much as some of the work that fills
// it.
void ask_for_huge_pages([[maybe_unused]] const TensorView& view) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kPage = 4096;
  constexpr std::uintptr_t kLeast = 4 << 20;
  const auto first = (reinterpret_cast<std::uintptr_t>(view.data) + kPage - 1) / kPage * kPage;
  const std::uintptr_t bytes = static_cast<std::uintptr_t>(view.numel()) * size_of(view.dtype);
  if (view.device.type == DeviceType::kCpu && bytes >= kLeast) {
    madvise(reinterpret_cast<void*>(first), bytes / kPage * kPage - kPage, MADV_HUGEPAGE);
  }
#endif
}

Array empty(std::span<const std::int64_t> shape, DType dtype, const Array& like) {
  if (like.kind == Kind::kTorch) {
    Array array = from_torch(empty_torch(shape, dtype, like), "out");
    ask_for_huge_pages(array.view);
    return array;
  }
  if (like.view.device.type != DeviceType::kCpu) {
    fail(ErrorCode::kUnsupported, "out",
         text("not given, and heddle makes arrays on ", heddle::to_string(like.view.device), " only for torch"));
  }
  // The dtype object of `like` serves bfloat16 without an import.
  const bool same = like.view.dtype == dtype && py::isinstance<py::array>(like.object);
  const py::dtype numpy = same ? py::reinterpret_borrow<py::array>(like.object).dtype() : numpy_dtype(dtype);
  return from_numpy(py::array(numpy, py::array::ShapeContainer(shape.begin(), shape.end())), "out");
}

py::array numpy_view(const TensorView& view, py::handle owner) {
  py::array::ShapeContainer shape(view.shape.begin(), view.shape.begin() + view.rank);
  py::array::StridesContainer strides(view.strides.begin(), view.strides.begin() + view.rank);
  for (auto& stride : *strides) stride *= static_cast<py::ssize_t>(size_of(view.dtype));
  return py::array(numpy_dtype(view.dtype), std::move(shape), std::move(strides), view.data, owner);
}

Stream current_stream(const Array& array) {
  Stream stream;
  if (array.view.device.type == DeviceType::kCpu || array.kind != Kind::kTorch) return stream;
  if (array.exchange != nullptr) {
    if (array.exchange->current_work_stream(kDLCUDA, array.view.device.index, &stream.handle) != 0) {
      throw py::error_already_set();
    }
    return stream;
  }
  const auto torch = py::module_::import("torch");
  const auto handle = torch.attr("cuda").attr("current_stream")(array.view.device.index).attr("cuda_stream");
  stream.handle = reinterpret_cast<void*>(handle.cast<std::uintptr_t>());
  return stream;
}

std::shared_ptr<const void> keep_alive(const Array& array, const Array& another) {
  py::list owners;
  for (const Array* a : {&array, &another}) {
    if (a->given()) owners.append(a->holder ? a->holder : a->object);
  }
  PyObject* held = owners.release().ptr();
  return {static_cast<const void*>(held), [held](const void*) {
            const py::gil_scoped_acquire gil;
            Py_DECREF(held);
          }};
}

}  // namespace heddle::python
