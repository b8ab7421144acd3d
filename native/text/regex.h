// Regular expressions as tokenizers' files have them: Oniguruma's syntax for Ruby, the part of it that they use.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "text/character_set.h"

namespace mnemos {

// Thrown where a match would take more steps than any honest text needs.
struct TooManySteps {};

// One step of a compiled expression.
struct RegexStep {
  enum Op : uint8_t {
    set,  // a: set. One character
    loop,  // a: set; b, c: least and most. As many characters as there are; gives some back if it must
    all,  // a: set; b, c. The same, but gives nothing back
    fork,  // a, b: where to go on; the second if the first fails. c: set that the first begins with, or `none`
    jump,  // a
    look_ahead,  // a: where to go on; c: whether it must not match. What follows here up to `done` is looked for
    look_back,  // a: set; c: whether it must not match. The character before
    atomic,  // a: where to go on. What follows here up to `done` is matched in one way only
    at_begin,
    at_end,
    at_last,
    at_line_begin,
    at_line_end,
    at_boundary,
    inside_word,
    done,
  };
  static constexpr uint32_t none = ~0u;
  Op op;
  uint32_t a = 0, b = 0, c = 0;
};

class Regex {
 public:
  // Throws Error (unsupported) for what it does not know, and for an expression that matches the empty text.
  explicit Regex(std::string_view pattern);
  static Regex literal(std::string_view text);

  // The leftmost match at or after `from`; false if there is none. Throws TooManySteps.
  bool find(std::string_view text, size_t from, size_t &begin, size_t &end) const;

 private:
  Regex() = default;
  struct Frame {
    uint32_t step;
    size_t at, least;  // least: for a loop that may give back down to there
  };
  struct Run {
    std::string_view text;
    std::vector<Frame> frames;
    size_t steps = 0;
  };
  bool match(Run &run, uint32_t step, size_t at, size_t &end) const;
  bool holds(const RegexStep &step, std::string_view text, size_t at) const;

  friend class RegexEmitter;
  std::vector<RegexStep> steps_;
  std::vector<CharacterSet> sets_;
  CharacterSet first_;  // what a match can begin with
};

}  // namespace mnemos
