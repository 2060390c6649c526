// Arrays that belong to Python, as every operation of the extension sees them, and how it refuses one.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace twinhead {

// Below this many elements a parallel region costs more than it saves.
constexpr std::int64_t kParallelElements = 1 << 14;

// A refusal reaches Python as ValueError.
inline void expect(bool holds, const std::string& sentence) {
  if (!holds) throw std::invalid_argument(sentence);
}

inline void expect_length(const char* op, const char* name, std::int64_t expected, std::int64_t got) {
  if (expected != got) {
    throw std::invalid_argument(std::string(op) + ": expected " + name + " of length " + std::to_string(expected) +
                                ", got " + std::to_string(got));
  }
}

// A one-dimensional array that belongs to somebody else; data is null where an optional array was not given.
template <typename T>
struct Array {
  T* data;
  std::int64_t size;

  T& operator[](std::int64_t i) const { return data[i]; }
  explicit operator bool() const { return data != nullptr; }
};

}  // namespace twinhead
