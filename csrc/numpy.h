// Arrays of numpy as the bindings see them: never converted, and handed on as plain views.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "array.h"

namespace twinhead {

template <typename T>
using Numpy = pybind11::array_t<T, pybind11::array::c_style>;

template <typename T>
Array<const T> readable(const Numpy<T>& array) {
  return {array.data(), array.size()};
}

template <typename T>
Array<const T> readable(const std::optional<Numpy<T>>& array) {
  return array ? readable(*array) : Array<const T>{nullptr, 0};
}

template <typename T>
Array<T> writable(Numpy<T>& array) {
  return {array.mutable_data(), array.size()};
}

// noconvert: an array of another dtype or layout would be copied, and what is written to the copy would be lost.
inline pybind11::arg exact(const char* name) { return pybind11::arg(name).noconvert(); }

}  // namespace twinhead
