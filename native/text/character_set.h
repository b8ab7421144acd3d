// A set of characters, as a class of a regular expression describes it.
#pragma once

#include <string_view>

#include "text/unicode.h"

namespace mnemos {

// For each interval of code points, a mask of the classes (`regex_classes`) that belong to the set there. So
// properties, ranges and their unions, intersections and complements are all of one form.
class CharacterSet {
 public:
  CharacterSet() : intervals_{{0, 0}} {}
  static CharacterSet all() { return CharacterSet({{0, ~uint64_t(0)}}); }
  static CharacterSet range(char32_t first, char32_t last);
  static CharacterSet flag(int bit);  // of FLAGS in tools/unicode_tables.py
  // A general category ("Lu", "L") or a script, as \p{...} names them; false if it is none of those known.
  static bool find_property(std::string_view name, CharacterSet &set);

  CharacterSet operator|(const CharacterSet &b) const;
  CharacterSet operator&(const CharacterSet &b) const;
  CharacterSet operator~() const;
  bool empty() const;
  bool overlaps(const CharacterSet &b) const { return !(*this & b).empty(); }

  // To be called once, after which `contains` may be.
  void finish();
  bool contains(char32_t c) const {
    if (c < 128) return ascii_[c >> 6] >> (c & 63) & 1;
    const Interval *interval = &intervals_[0];
    if (intervals_.size() > 1) interval = find(c);
    return interval->mask >> regex_classes()[c] & 1;
  }

 private:
  struct Interval {
    char32_t first;
    uint64_t mask;
  };
  explicit CharacterSet(std::vector<Interval> intervals) : intervals_(std::move(intervals)) {}
  template <typename Combine>
  static CharacterSet merge(const CharacterSet &a, const CharacterSet &b, const Combine &combine);
  const Interval *find(char32_t c) const;

  std::vector<Interval> intervals_;
  uint64_t ascii_[2] = {0, 0};
};

}  // namespace mnemos
