// Selections. Their arrays are read where they lie and kept alive by the selection.
#include "heddle/select.h"

#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>

#include "arguments.h"
#include "module.h"
#include "tensor.h"

#include "core/check.h"
#include "heddle/error.h"

namespace heddle::python {
namespace {

std::string bound(std::optional<std::int64_t> side) { return side ? std::to_string(*side) : "None"; }

std::string describe_selection(const Selection& selection) {
  return std::visit(
      [](const auto& kind) -> std::string {
        using K = std::decay_t<decltype(kind)>;
        if constexpr (std::is_same_v<K, select::WindowGlobal>) {
          return check::text("Selection.window(left=", bound(kind.window.left), ", right=", bound(kind.window.right),
                             ", n_global=", kind.n_global, ")");
        } else if constexpr (std::is_same_v<K, select::Strided>) {
          return check::text("Selection.strided(width=", kind.width, ", stride=", kind.stride, ")");
        } else if constexpr (std::is_same_v<K, select::BlockMask>) {
          return check::text("Selection.block_mask(mask=", kind.mask.shape_string(), ", block=(", kind.block_q, ", ",
                             kind.block_k, "))");
        } else if constexpr (std::is_same_v<K, select::Tokens>) {
          return check::text("Selection.tokens(indices=", kind.indices.shape_string(),
                             ", lengths=", kind.lengths.given() ? kind.lengths.shape_string() : "None", ")");
        } else if constexpr (std::is_same_v<K, select::PageList>) {
          return check::text("Selection.page_list(indices=", kind.indices.shape_string(),
                             ", lengths=", kind.lengths.given() ? kind.lengths.shape_string() : "None", ")");
        } else {
          return "Selection()";
        }
      },
      selection.kind());
}

// A read-only view of one of the selection's arrays, or None where it has none.
template <class K, auto Member>
py::object storage(const py::object& self) {
  const auto* kind = std::get_if<K>(&self.cast<const Selection&>().kind());
  if (kind == nullptr || !(kind->*Member).given()) return py::none();
  const TensorView& view = kind->*Member;
  check::device("selection", view, {}, "what numpy reads");
  const py::object result = view_of_memory(view, self);
  result.attr("setflags")(py::arg("write") = false);
  return result;
}

py::object block(const Selection& self) {
  const auto* mask = std::get_if<select::BlockMask>(&self.kind());
  return mask == nullptr ? py::object(py::none()) : py::make_tuple(mask->block_q, mask->block_k);
}

double density(const Selection& self) {
  if (self.density() != self.density()) {
    check::fail(ErrorCode::kValue, "selection",
                check::text(describe_selection(self), " was not made for a call; allowed are those that were"));
  }
  return self.density();
}

Selection block_mask(py::object mask, py::object block) {
  const Array array_of_mask = array(mask, "mask");
  std::int64_t sides[2];
  if (py::isinstance<py::tuple>(block) || py::isinstance<py::list>(block)) {
    const auto pair = py::reinterpret_borrow<py::sequence>(block);
    if (pair.size() != 2) {
      check::fail(ErrorCode::kValue, "block", check::text("got ", pair.size(), " numbers; allowed is (queries, keys)"));
    }
    sides[0] = to_int(pair[0], "block");
    sides[1] = to_int(pair[1], "block");
  } else {
    sides[0] = sides[1] = to_int(block, "block");
  }
  return Selection::block_mask(array_of_mask.view, sides[0], sides[1], keep_alive(array_of_mask));
}

// Of token lists and page lists.
template <auto OfTokens, auto OfPages>
py::object list_storage(const py::object& self) {
  const bool pages = std::holds_alternative<select::PageList>(self.cast<const Selection&>().kind());
  return pages ? storage<select::PageList, OfPages>(self) : storage<select::Tokens, OfTokens>(self);
}

Selection page_list(py::object indices, py::object lengths) {
  const Array array_of_indices = array(indices, "indices");
  const Array array_of_lengths = optional_array(lengths, "lengths");
  return Selection::page_list(array_of_indices.view, array_of_lengths.view,
                              keep_alive(array_of_indices, array_of_lengths));
}

Selection tokens(py::object indices, py::object lengths) {
  const Array array_of_indices = array(indices, "indices");
  const Array array_of_lengths = optional_array(lengths, "lengths");
  return Selection::tokens(array_of_indices.view, array_of_lengths.view,
                           keep_alive(array_of_indices, array_of_lengths));
}

}  // namespace

void bind_select(py::module_& m) {
  py::class_<Selection>(m, "Selection", R"(Which keys a query reads, beyond what causal and window say.

Made by the functions of heddle.select; the argument `selection` of heddle.attention and heddle.decode. Its arrays are
read where they lie at every call, and kept alive.)")
      .def_property_readonly("indices", &list_storage<&select::Tokens::indices, &select::PageList::indices>,
                             "The token lists (or page lists), int32 [B, Hkv, n] or [B, Sq, Hkv, n] (packed: [total_q, "
                             "Hkv, n]), ascending, "
                             "padded with -1: a read-only numpy array that shares the selection's memory, or None.")
      .def_property_readonly("lengths", &list_storage<&select::Tokens::lengths, &select::PageList::lengths>,
                             "How many entries of each list count, or None.")
      .def_property_readonly("mask", &storage<select::BlockMask, &select::BlockMask::mask>,
                             "The block mask, bool [nQ, nK], [H, nQ, nK] or [B, H, nQ, nK], or None.")
      .def_property_readonly("block", &block, "(queries, keys) of a block of the mask, or None.")
      .def("density", &density, R"(density() -> float

The kept part of the (query, key) pairs that the call it was made for sees without it, over all heads. HeddleValueError if it
was not made for a call.)")
      .def("__repr__", &describe_selection);
  m.def("select_window", [](py::object left, py::object right, py::object n_global) {
    return Selection::window(to_optional_int(left, "left"), to_optional_int(right, "right"),
                             to_int(n_global, "n_global"));
  });
  m.def("select_strided", [](py::object width, py::object stride) {
    return Selection::strided(to_int(width, "width"), to_int(stride, "stride"));
  });
  m.def("select_block_mask", &block_mask);
  m.def("select_tokens", &tokens);
  m.def("select_page_list", &page_list);
}

}  // namespace heddle::python
