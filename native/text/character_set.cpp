#include "text/character_set.h"

#include <algorithm>

#include "text/unicode_data.h"

namespace mnemos {
namespace {

constexpr const char *category_names[] = {"Cn", "Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd",
                                          "Nl", "No", "Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "Sm",
                                          "Sc", "Sk", "So", "Zs", "Zl", "Zp", "Cc", "Cf", "Co"};
constexpr const char *script_names[] = {"Han", "Hiragana", "Katakana", "Hangul"};
constexpr int first_script = 2;  // bit of the flags

}  // namespace

CharacterSet CharacterSet::range(char32_t first, char32_t last) {
  if (first > last) return CharacterSet();
  std::vector<Interval> intervals;
  if (first > 0) intervals.push_back({0, 0});
  intervals.push_back({first, ~uint64_t(0)});
  if (last + 1 < code_points) intervals.push_back({last + 1, 0});
  return CharacterSet(std::move(intervals));
}

CharacterSet CharacterSet::flag(int bit) {
  uint64_t mask = 0;
  for (size_t i = 0; i < regex_class_flags_size; i++) mask |= uint64_t(regex_class_flags[i] >> bit & 1) << i;
  return CharacterSet({{0, mask}});
}

bool CharacterSet::find_property(std::string_view name, CharacterSet &set) {
  for (int i = 0; i < 4; i++) {
    if (name == script_names[i]) {
      set = flag(first_script + i);
      return true;
    }
  }
  uint64_t mask = 0;
  for (size_t i = 0; i < regex_class_categories_size; i++) {
    const std::string_view category = category_names[regex_class_categories[i]];
    if (category == name || (name.size() == 1 && category[0] == name[0])) mask |= uint64_t(1) << i;
  }
  // Surrogates are in no text, but belong to C; Cn is left out, which old and new versions fill differently.
  if (mask == 0 || name == "C" || name == "Cn") return false;
  set = CharacterSet({{0, mask}});
  return true;
}

template <typename Combine>
CharacterSet CharacterSet::merge(const CharacterSet &a, const CharacterSet &b, const Combine &combine) {
  std::vector<Interval> merged;
  size_t i = 0, j = 0;
  for (char32_t first = 0;;) {
    const uint64_t mask = combine(a.intervals_[i].mask, b.intervals_[j].mask);
    if (merged.empty() || merged.back().mask != mask) merged.push_back({first, mask});
    const char32_t after_a = i + 1 < a.intervals_.size() ? a.intervals_[i + 1].first : code_points;
    const char32_t after_b = j + 1 < b.intervals_.size() ? b.intervals_[j + 1].first : code_points;
    first = std::min(after_a, after_b);
    if (first == code_points) return CharacterSet(std::move(merged));
    if (after_a == first) i++;
    if (after_b == first) j++;
  }
}

CharacterSet CharacterSet::operator|(const CharacterSet &b) const {
  return merge(*this, b, [](uint64_t x, uint64_t y) { return x | y; });
}

CharacterSet CharacterSet::operator&(const CharacterSet &b) const {
  return merge(*this, b, [](uint64_t x, uint64_t y) { return x & y; });
}

CharacterSet CharacterSet::operator~() const {
  CharacterSet result = *this;
  for (Interval &interval : result.intervals_) interval.mask = ~interval.mask;
  return result;
}

bool CharacterSet::empty() const {
  // Masks of classes that an interval does not have make this a cautious answer.
  return std::all_of(intervals_.begin(), intervals_.end(), [](const Interval &i) { return i.mask == 0; });
}

void CharacterSet::finish() {
  ascii_[0] = ascii_[1] = 0;
  for (char32_t c = 0; c < 128; c++) ascii_[c >> 6] |= (find(c)->mask >> regex_classes()[c] & 1) << (c & 63);
}

const CharacterSet::Interval *CharacterSet::find(char32_t c) const {
  const auto after = std::upper_bound(intervals_.begin(), intervals_.end(), c,
                                      [](char32_t value, const Interval &i) { return value < i.first; });
  return &*after - 1;
}

}  // namespace mnemos
